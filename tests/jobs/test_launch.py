"""How a job is started, and what it refuses: every launcher that would train the wrong thing without a word."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from jobs.launcher import command, environment
from jobs.options import Launch
from jobs.runtime import Context
from tests.conftest import ROOT, Finished, Jobs
from tests.jobs.launching import training, write

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0"]


def run_of(**launch: Any) -> dict[str, Any]:
    return {"stage": "train_sid", "launch": launch}


def test_what_a_person_would_type() -> None:
    job = ["-m", "jobs.train_sid", "run.yaml"]
    assert command(run_of(), "jobs", Path("run.yaml")) == [sys.executable, *job]
    two = command(run_of(processes=2), "jobs", Path("run.yaml"))
    assert "--multi_gpu" in two and "--use_deepspeed" not in two and "--cpu" not in two and two[-3:] == job
    for processes in (1, 2):
        zero = command(run_of(processes=processes, zero=2), "jobs", Path("run.yaml"))
        assert "--use_deepspeed" in zero and "--multi_gpu" not in zero
        assert zero[zero.index("--num_processes") + 1] == str(processes) and zero[-3:] == job


def test_on_cpu_ddp_is_told_so_and_deepspeed_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """ACCELERATE_USE_CPU makes a gloo group of --multi_gpu, and nothing of --use_deepspeed."""
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "RANK", "WORLD_SIZE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "1")
    assert environment(run_of(processes=2), 0)["ACCELERATE_USE_CPU"] == "true"
    zero = environment(run_of(processes=2, zero=3), 0)
    assert zero["DS_ACCELERATOR"] == "cpu" and "ACCELERATE_USE_CPU" not in zero
    on_gpu = environment(run_of(processes=2, zero=3), 2)
    for env in (zero, on_gpu, environment(run_of(), 1)):
        assert not [k for k in env if k.startswith("ACCELERATE_") or k in ("RANK", "WORLD_SIZE", "RAY_AUTH_TOKEN", "x")]
    assert "DS_ACCELERATOR" not in on_gpu and "CUDA_VISIBLE_DEVICES" not in on_gpu.keys() - os.environ.keys()


def test_the_identity_holds_all_that_may_change_a_bit_and_no_defaults() -> None:
    assert Launch(threads=7).identity() == {"processes": 1}
    everything = Launch(processes=2, precision="bf16", zero=3, offload="cpu", accumulation=4)
    assert everything.identity() == everything.model_dump(exclude={"threads", "graphs"})
    assert Launch.model_validate(everything.identity()) == everything
    assert Launch(graphs=True).identity() == {"processes": 1, "graphs": True}
    with pytest.raises(ValidationError, match="offload cpu needs zero"):
        Launch(processes=2, offload="cpu")
    with pytest.raises(ValidationError, match="graphs are of one process without zero"):
        Launch(processes=2, graphs=True)


def start(words: list[str], path: Path, stage: str = "train_sid", **env: str) -> subprocess.CompletedProcess[str]:
    """As typed into a shell that has no variable of accelerate's but ``env``."""
    shell = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "-m", f"jobs.{stage}", str(path)], cwd=ROOT, env=shell | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    return done


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    """``words`` stand in a line of their own, and before torch's launcher adds its report no traceback does."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines and all(words in line for line in lines), done.stderr[-3000:]
    assert "Traceback" not in done.stderr.split("error: ")[0]


def test_zero_needs_its_launcher(jobs: Jobs, split: str) -> None:
    path = write(jobs, "train_sid", "bare", training(), {"zero": 2}, split=split, sids="none")
    refused(start([sys.executable], path), "launch.zero needs accelerate's launcher: accelerate launch --use_deepspeed")
    assert not (jobs.folder / "artifacts" / "bare").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_are_recorded_on_a_gpu_only(jobs: Jobs, split: str, launch_sids: str) -> None:
    path = write(jobs, "train_sid", "graphs", training(), {"graphs": True}, split=split, sids=launch_sids)
    refused(start([sys.executable], path), "launch.graphs needs a CUDA device, and this machine has none; leave it out")
    assert not (jobs.folder / "artifacts" / "graphs").exists()


def test_what_reads_back_from_a_gpu_is_not_recorded(jobs: Jobs, split: str, launch_sids: str) -> None:
    config = training() | {"architecture": "decoder-only"}
    path = write(jobs, "train_sid", "graphs-alone", config, {"graphs": True}, split=split, sids=launch_sids)
    refused(start([sys.executable], path), "launch.graphs: train_sid of this kind can't be recorded; leave it out")
    encode = write(jobs, "encode", "graphs-encode", {}, {"graphs": True})
    refused(
        start([sys.executable], encode, stage="encode"), "launch.graphs is True; only pretrain_llm, train_llm, train_sid have"
    )


def test_only_what_trains_takes_zero(jobs: Jobs) -> None:
    path = write(jobs, "encode", "zero-encode", {}, {"zero": 2})
    refused(start([sys.executable], path, stage="encode"), "launch.zero is 2; only pretrain_llm, train_llm, train_sid have it")


def test_an_accumulation_that_accelerate_was_told_would_divide_the_loss(jobs: Jobs, split: str) -> None:
    path = write(jobs, "train_sid", "divided", training(), {}, split=split, sids="none")
    done = start([sys.executable], path, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    refused(done, "accelerate was told to accumulate 4 steps")


TRAPS: dict[str, tuple[list[str], dict[str, str], dict[str, Any], str]] = {
    "--cpu starts one process": (["--cpu", "--num_processes", "2"], {}, {"processes": 2}, "but 1 process(es) were started"),
    "ACCELERATE_USE_CPU switches DeepSpeed off": (
        ["--use_deepspeed", "--num_processes", "2"],
        {"ACCELERATE_USE_CPU": "true"},
        {"processes": 2, "zero": 2},
        "ACCELERATE_USE_CPU switches DeepSpeed off",
    ),
    "DeepSpeed that nobody asked for": (
        ["--use_deepspeed", "--num_processes", "1"],
        {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        {"processes": 1},
        "launch.zero is 0, but accelerate was told to use DeepSpeed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_a_launcher_that_would_train_the_wrong_thing_is_refused(jobs: Jobs, split: str, trap: str) -> None:
    words, env, launch, expected = TRAPS[trap]
    path = write(jobs, "train_sid", f"trap-{list(TRAPS).index(trap)}", training(), launch, split=split, sids="none")
    done = start([*ACCELERATE, "--mixed_precision", "no", "--dynamo_backend", "no", *words], path, **env)
    refused(done, expected)
    assert not (jobs.folder / "artifacts" / path.stem).exists()


@pytest.mark.slow
def test_on_cpu_the_group_forms_without_accelerate_being_told(jobs: Jobs, split: str, launch_sids: str) -> None:
    """--multi_gpu without ACCELERATE_USE_CPU would train two copies; the job says itself that it is on CPU."""
    path = write(jobs, "train_sid", "untold", training(steps=2, validations=1), {"processes": 2}, split=split, sids=launch_sids)
    words = [*ACCELERATE, "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu", "--num_processes", "2"]
    shell = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    shell |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*words, "-m", "jobs.train_sid", str(path)], cwd=ROOT, env=shell, check=True, capture_output=True, timeout=300)
    facts = Finished(jobs.folder, "untold", "").facts
    assert facts["launches"] == [[0, 2, 0, 1]] and facts["micro_batch"] == 32, "each process has half of the batch"


def test_a_checkpoint_of_other_devices_is_the_same_run_but_for_rounding(tmp_path: Path) -> None:
    from jobs.config import STAGES, Run

    def context(**launch: Any) -> Context[Any]:
        run = Run.model_validate({"stage": "train_sid", "id": "x", "out": "o", "work": "w", "launch": launch})
        return Context(run, STAGES["train_sid"].model_validate(training()), tmp_path)

    saved = context(processes=2, zero=3).signature()
    assert yaml.safe_load(yaml.safe_dump(saved)) == saved
    assert context(processes=4).differs(saved) == "launch.processes was 2, is 4"
    assert context(processes=4).differs(saved, placed_alike=False) == ""
    assert context(precision="bf16").differs(saved, placed_alike=False) == "launch.precision was fp32, is bf16"
    assert context(processes=2, zero=3, threads=5).differs(saved) == ""
