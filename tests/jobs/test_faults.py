"""What may go wrong while a job trains, injected for real: no memory, no disk, a process that stands still."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gr.files import read_json
from jobs.launcher import command, environment
from tests.conftest import ROOT, Finished, Jobs
from tests.jobs.launching import begin, launch, losses, said, training, write

pytestmark = pytest.mark.slow
HUNGRY = {"layers": 2, "d_model": 256, "heads": 4, "d_kv": 64, "d_ff": 1024}


def address_space(process: subprocess.Popen[bytes]) -> int:
    """Bytes at most of the largest process of the group, read until it ends."""
    most, group = 0, psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            for member in [group, *group.children(recursive=True)]:
                found = re.search(r"VmPeak:\s+(\d+) kB", Path(f"/proc/{member.pid}/status").read_text())
                most = max(most, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    return most


def limited(path: Path, kind: int, limit: int) -> subprocess.CompletedProcess[str]:
    """Runs a run.yaml in processes that the kernel limits."""
    run = yaml.safe_load(path.read_text())
    return subprocess.run(
        command(run, "jobs", path),
        cwd=ROOT,
        env=environment(run, 0),
        capture_output=True,
        text=True,
        timeout=400,
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
    )


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(
    jobs: Jobs,
    split: str,
    launch_sids: str,
    processes: int,
) -> None:
    config = training(HUNGRY, steps=2, global_batch=1024 * processes, validations=1, lr=1e-5)
    inputs, peaks = {"split": split, "sids": launch_sids}, []
    for accumulation in (1, 16):
        how = {"processes": processes, "accumulation": accumulation}
        path = write(jobs, "train_sid", f"memory-{processes}-{accumulation}", config, how, **inputs)
        process = begin(path)
        peaks.append(address_space(process))
        assert process.returncode == 0, said(path)[-4000:]
    path = write(jobs, "train_sid", f"memory-{processes}-short", config, {"processes": processes}, **inputs)
    done = limited(path, resource.RLIMIT_AS, (peaks[0] + 2 * peaks[1]) // 3)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "out of memory" in done.stderr and "starting again with accumulation 2" in done.stderr
    plenty, short = (Finished(jobs.folder, f"memory-{processes}-{name}", "") for name in ("1", "short"))
    facts = short.facts
    assert facts["accumulation"] > 1 and facts["launches"][-1] == [0, processes, 0, facts["accumulation"]]
    assert facts["micro_batch"] == -(-plenty.facts["micro_batch"] // facts["accumulation"])
    assert losses(short) == pytest.approx(losses(plenty), rel=0, abs=1e-6)
    assert list((jobs.folder / "artifacts").glob(f".memory-{processes}*")) == []  # other tests kill what writes there
    assert not (short.work / "accumulation.json").exists()


@pytest.mark.long
def test_too_little_memory_for_one_row_is_said(jobs: Jobs, split: str, launch_sids: str) -> None:
    config = training(HUNGRY | {"d_ff": 400_000}, steps=1, global_batch=8, validations=1)
    path = write(jobs, "train_sid", "memory-none", config, {}, split=split, sids=launch_sids)
    process = begin(write(jobs, "train_sid", "memory-base", training(steps=1), {}, split=split, sids=launch_sids))
    done = limited(path, resource.RLIMIT_AS, address_space(process) + 5 * 2**30)
    assert done.returncode == 1 and "error: out of memory with one row in a micro-batch" in done.stderr


def test_files_that_can_not_grow_fail_the_artifact_but_no_checkpoint(
    jobs: Jobs,
    split: str,
    launch_sids: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(jobs, "train_sid", "quota", training(), {}, split=split, sids=launch_sids)
    monkeypatch.setenv("GRSCALE_CHECKPOINT_SECONDS", "0")
    done = limited(path, resource.RLIMIT_FSIZE, 50_000)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "checkpoint of step 2 could not be written" in done.stderr and "the training goes on without it" in done.stderr
    failure = read_json(jobs.folder / "work" / "quota" / "failure.json")["reason"]
    assert failure.startswith("a file would be larger than allowed: ")
    assert [p.name for p in (jobs.folder / "artifacts").iterdir() if "quota" in p.name] == []
    assert list((jobs.folder / "work" / "quota" / "checkpoint").iterdir()) == []
    assert launch(jobs, "train_sid", "quota", training(), {}, split=split, sids=launch_sids).out.is_dir()


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_the_older_checkpoint(jobs: Jobs, split: str, launch_sids: str) -> None:
    """The first checkpoint fits; the later ones hold the best weights too, and two do not fit."""
    config, inputs = training(steps=200), {"split": split, "sids": launch_sids}
    calm = launch(jobs, "train_sid", "disk-calm", config, {}, **inputs)
    weights = (calm.out / "model.safetensors").stat().st_size
    checkpoints = jobs.folder / "work" / "disk" / "checkpoint"
    with small_disk(checkpoints, int(5.5 * weights)):
        path = write(jobs, "train_sid", "disk", config, {}, **inputs)
        process = begin(path, GRSCALE_CHECKPOINT_SECONDS="0")
        log = jobs.folder / "work" / "disk" / "metrics.jsonl"
        end = time.monotonic() + 200
        while not (log.is_file() and '"loss_val"' in log.read_text()):  # a third of the way, long after the disk is full
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert "could not be written (Error while serializing" in said(path) and "goes on without it" in said(path)
        kept = [p.name for p in checkpoints.glob("[0-9]*")]
        assert len(kept) == 1
        resumed = launch(jobs, "train_sid", "disk", config, {}, **inputs)
    assert [row["step"] for row in resumed.rows if row.get("event") == "resumed"] == [int(kept[0])]
    mine, its = (load_file(run.out / "model.safetensors") for run in (calm, resumed))
    assert all(torch.equal(mine[k], its[k]) for k in mine)


def test_a_process_that_stands_still_ends_the_run_with_its_reason(jobs: Jobs, split: str, launch_sids: str) -> None:
    """One of two ranks is stopped; the other waits for it in a collective, and no process is left after that."""
    config: dict[str, Any] = training(steps=10**6, validations=1)
    path = write(jobs, "train_sid", "hanging", config, {"processes": 2}, split=split, sids=launch_sids)
    process = begin(path, GRSCALE_HANG_SECONDS="5")
    log = jobs.folder / "work" / "hanging" / "metrics.jsonl"
    end = time.monotonic() + 200
    while not log.is_file():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    stopped = next(p for p in ranks if p.environ().get("RANK") == "1")
    stopped.send_signal(signal.SIGSTOP)
    assert process.wait(timeout=200) != 0
    reason = read_json(jobs.folder / "work" / "hanging" / "failure.json")["reason"]
    assert re.match(r"hangs: step \d+ goes on for over \d+ s \(longest so far: ", reason), reason
    assert "most recent call first" in said(path) and "in _step" in said(path), "where it stood"
    assert not psutil.wait_procs(ranks, timeout=30)[1]


def test_checkpoints_cost_what_they_say(jobs: Jobs, split: str, launch_sids: str) -> None:
    config, inputs = training(steps=40), {"split": split, "sids": launch_sids}
    often = launch(jobs, "train_sid", "often", config, {}, env={"GRSCALE_CHECKPOINT_SECONDS": "0"}, **inputs)
    seldom = launch(jobs, "train_sid", "seldom", config, {}, **inputs)
    assert often.facts["checkpoints"] == 40 and often.facts["checkpoint_seconds"] > 0
    assert seldom.facts["checkpoints"] == 0 and seldom.facts["checkpoint_seconds"] == 0
    shutil.rmtree(often.work)
