"""The SID paradigm's stages as real processes: the whole chain, two processes, death and resumption, NaN, mistakes."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from torch import equal

from gr.metrics import ranking_metrics
from tests.conftest import ROOT, Jobs

SIZE = {"layers": 1, "d_model": 32, "heads": 2, "d_kv": 16, "d_ff": 64}
OPTIMIZER = {"steps": 60, "global_batch": 64, "lr": 0.01, "validations": 3}


def training(**optimizer: Any) -> dict[str, Any]:
    return {"size": SIZE, "dropout": 0.1, "max_history": 10, "optimizer": OPTIMIZER | optimizer, "seed": 3}


@pytest.fixture(scope="module")
def sids(jobs: Jobs, split: str) -> str:
    encoder = {"size": {"layers": 1, "d_model": 32, "heads": 2, "d_ff": 64}, "vocab": 400}
    encoder["optimizer"] = {"steps": 30, "global_batch": 64, "lr": 0.003, "validations": 1}
    jobs.run("train_encoder", "encoder", encoder, split=split)
    jobs.run("encode", "embeddings", {}, split=split, encoder="encoder")
    jobs.run("quantize", "sids", {"levels": 2, "width": 8}, embeddings="embeddings")
    return "sids"


@pytest.fixture(scope="module")
def trained(jobs: Jobs, split: str, sids: str) -> str:
    jobs.run("train_sid", "undisturbed", training(), split=split, sids=sids)
    return "undisturbed"


def test_the_whole_chain_beats_popularity(jobs: Jobs, split: str, sids: str) -> None:
    trained = jobs.run("train_sid", "long", training(steps=250), split=split, sids=sids)
    evaluated = jobs.run("evaluate_sid", "evaluated", {}, split=split, sids=sids, model="long")
    floor = jobs.run("baseline", "popularity", {"method": "popularity"}, split=split)
    best = jobs.run("baseline", "bayes", {"method": "bayes-optimal"}, split=split, dataset="planted")
    recall = [run.facts["recall@10"] for run in (floor, evaluated, best)]
    assert recall[0] + 0.05 < recall[1] < recall[2] + 0.05, recall
    hits = pq.read_table(evaluated.out / "hits.parquet")
    assert hits.num_rows == 300
    again = ranking_metrics(hits["rank"].to_numpy())
    assert {k: evaluated.facts[k] for k in again} == pytest.approx(again)
    assert trained.facts["n_rs"] > trained.facts["n_non_embedding"] > 0
    assert trained.rows[-1]["step"] == 250


@pytest.mark.usefixtures("sids")  # which make the embeddings
def test_rqvae_codes_the_same_embeddings_repeatably(jobs: Jobs) -> None:
    config = {"method": "rqvae", "levels": 2, "width": 8, "hidden": [32], "latent": 16, "steps": 200}
    first = jobs.run("quantize", "rqvae", config, embeddings="embeddings")
    second = jobs.run("quantize", "rqvae-again", config, embeddings="embeddings")
    assert first.facts == second.facts
    assert pq.read_table(first.out / "sids.parquet").equals(pq.read_table(second.out / "sids.parquet"))
    assert first.facts["reconstruction_error"] < 0.8
    assert min(first.facts["code_use"]) > 0.5


def test_two_processes_train_like_one(jobs: Jobs, split: str, sids: str) -> None:
    """Without dropout (whose random numbers differ by process) the losses agree to float error."""
    config = training(steps=20) | {"dropout": 0.0}
    one = jobs.run("train_sid", "one", config, split=split, sids=sids)
    two = jobs.run("train_sid", "two", config, processes=2, split=split, sids=sids)
    assert two.facts["validations"] == [pytest.approx(v, abs=1e-4) for v in one.facts["validations"]]
    assert two.facts["train_tokens"] == one.facts["train_tokens"]


def start(jobs: Jobs, stage: str, path: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        jobs.command(stage, path, processes),
        cwd=ROOT,
        env=jobs.environment() | {"GRSCALE_CHECKPOINT_SECONDS": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("damage", [False, True])
def test_killed_and_resumed_ends_bitwise_like_undisturbed(jobs: Jobs, split: str, sids: str, trained: str, damage: bool) -> None:
    name = f"killed-{damage}"
    path = jobs.write("train_sid", name, training(), split=split, sids=sids)
    process = start(jobs, "train_sid", path)
    checkpoints = jobs.folder / "work" / name / "checkpoint"
    wait_for(checkpoints / "000000025", process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = max(checkpoints.glob("[0-9]*"))
    if damage:
        weights = newest / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
    resumed = jobs.run("train_sid", name, training(), split=split, sids=sids)
    steps = [row["step"] for row in resumed.rows if row.get("event") == "resumed"]
    assert len(steps) == 1 and (steps[0] < int(newest.name) if damage else steps[0] == int(newest.name))
    assert ("is damaged" in resumed.stderr) == damage
    one, other = (load_file(jobs.folder / "artifacts" / n / "model.safetensors") for n in (trained, name))
    assert one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    assert not checkpoints.exists()


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_and_two_processes_resume_bitwise(jobs: Jobs, split: str, sids: str) -> None:
    jobs.run("train_sid", "two-undisturbed", training(), processes=2, split=split, sids=sids)
    path = jobs.write("train_sid", "two-killed", training(), processes=2, split=split, sids=sids)
    launcher = start(jobs, "train_sid", path, processes=2)
    wait_for(jobs.folder / "work" / "two-killed" / "checkpoint" / "000000025", launcher)
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    assert len(ranks) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
    jobs.run("train_sid", "two-killed", training(), processes=2, split=split, sids=sids)
    one, other = (load_file(jobs.folder / "artifacts" / n / "model.safetensors") for n in ("two-undisturbed", "two-killed"))
    assert all(equal(one[k], other[k]) for k in one)


def test_another_configuration_takes_up_neither_checkpoint_nor_artifact(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    other = jobs.run("train_sid", trained, training(lr=0.02), expect=2, split=split, sids=sids)
    assert "holds the result of another run (config.optimizer was" in other.stderr
    path = jobs.write("train_sid", "begun", training(), split=split, sids=sids)
    process = start(jobs, "train_sid", path)
    wait_for(jobs.folder / "work" / "begun" / "checkpoint" / "000000005", process)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert not [p for p in (jobs.folder / "artifacts").iterdir() if p.name.startswith(".begun")], "nothing half-written"
    changed = jobs.run("train_sid", "begun", training(steps=70), expect=2, split=split, sids=sids)
    assert "a checkpoint of another run (config.optimizer was" in changed.stderr


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason(jobs: Jobs, split: str, sids: str) -> None:
    run = jobs.run("train_sid", "diverging", training(lr=1e30), expect=1, split=split, sids=sids)
    assert "loss is nan at step" in run.stderr or "loss is inf at step" in run.stderr
    assert "of 60" in (run.work / "failure.json").read_text()
    assert not run.out.exists()


def test_mistakes_are_one_line_and_exit_2(jobs: Jobs, split: str, sids: str) -> None:
    wrong_key = jobs.run("train_sid", "wrong", training() | {"drop_out": 1}, expect=2, split=split, sids=sids)
    assert "config: drop_out" in wrong_key.stderr and "Traceback" not in wrong_key.stderr
    missing = jobs.run("train_sid", "missing", training(), expect=2, split=split, sids="nowhere")
    assert "inputs.sids" in missing.stderr and "Traceback" not in missing.stderr
    for config, word in (({}, "either"), ({"model": "no/such-model"}, "can't be loaded as an encoder")):
        wrong_model = jobs.run("encode", "no-encoder", config, expect=2, split=split)
        assert word in wrong_model.stderr and "Traceback" not in wrong_model.stderr
    path = jobs.write("train_sid", "processes", training(), processes=2, split=split, sids=sids)
    done = subprocess.run(jobs.command("train_sid", path), cwd=ROOT, env=jobs.environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "launch.processes is 2, but 1 process(es) were started" in done.stderr


def test_a_finished_run_is_not_done_again(jobs: Jobs, split: str, sids: str, trained: str) -> None:
    before = (jobs.folder / "artifacts" / trained / "artifact.json").stat().st_mtime_ns
    jobs.run("train_sid", trained, training(), split=split, sids=sids)
    assert (jobs.folder / "artifacts" / trained / "artifact.json").stat().st_mtime_ns == before
