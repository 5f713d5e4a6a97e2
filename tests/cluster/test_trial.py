"""A job's process group: real processes, no Ray cluster."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.group import Group, grace, last_words
from gr.errors import UserError
from jobs.launcher import command, environment


def write_run(folder: Path, stage: str, config: dict[str, Any], processes: int = 1) -> Path:
    work = folder / "work"
    work.mkdir()
    document = {
        "stage": stage,
        "id": "x",
        "out": "../artifact",
        "work": ".",
        "config": config,
        "launch": {"processes": processes, "threads": 1},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(document))
    return work / "run.yaml"


TRAIN = {
    "size": {"layers": 1, "d_model": 8, "heads": 1, "d_kv": 8, "d_ff": 8},
    "optimizer": {"steps": 4, "global_batch": 8, "lr": 0.1},
}


@pytest.mark.usefixtures("fake_jobs")
def test_a_job_that_does_its_work(tmp_path: Path) -> None:
    group = Group(write_run(tmp_path, "quantize", {}), "fakejobs", 0)
    assert group.reason() is None
    assert (tmp_path / "artifact" / "artifact.json").is_file()
    assert not (tmp_path / "work" / "process.json").exists()


@pytest.mark.usefixtures("fake_jobs")
def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    group = Group(write_run(tmp_path, "train_sid", {**TRAIN, "seed": 13}), "fakejobs", 0)
    assert group.reason() == "loss is nan at step 3 of 4"


@pytest.mark.usefixtures("fake_jobs")
def test_a_program_that_does_not_load_is_told_by_its_last_words(tmp_path: Path) -> None:
    group = Group(write_run(tmp_path, "quantize", {}), "nojobs", 0)
    assert "No module named" in str(group.reason())
    assert "No module named" in json.loads((tmp_path / "work" / "failure.json").read_text())["reason"]


def test_last_words_are_words(tmp_path: Path) -> None:
    """torch's launcher ends with a rule, after the error that one of its ranks told."""
    log = tmp_path / "log.txt"
    log.write_text("--- first try\nerror: of the first try\n\n--- second try\nTraceback\nboom\n  error: no room\nFAILED\n=====\n")
    assert last_words(log) == "no room"
    log.write_text("--- a try\nImportError: no such thing\n=======\n")
    assert last_words(log) == "ImportError: no such thing"


def running(group: Group) -> None:
    deadline = time.monotonic() + 60
    while not (group.work / "metrics.jsonl").is_file():
        assert group.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("fake_jobs")
def test_kill_9_is_named(tmp_path: Path) -> None:
    group = Group(write_run(tmp_path, "train_sid", {**TRAIN, "seed": 99}), "fakejobs", 0)
    running(group)
    assert json.loads((tmp_path / "work" / "process.json").read_text())["pid"] == group.process.pid
    os.kill(group.process.pid, signal.SIGKILL)
    assert group.reason() == "killed by signal 9 (SIGKILL)"


@pytest.mark.usefixtures("fake_jobs")
def test_stop_ends_the_whole_group_and_blames_nobody(tmp_path: Path) -> None:
    group = Group(write_run(tmp_path, "train_sid", {**TRAIN, "seed": 99}), "fakejobs", 0)
    running(group)
    group.stop()
    assert not psutil.pid_exists(group.process.pid)
    assert not (tmp_path / "work" / "failure.json").exists() and not (tmp_path / "work" / "process.json").exists()


@pytest.mark.usefixtures("fake_jobs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_that_does_not_train_ends_at_once_and_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    group = Group(write_run(tmp_path, "train_sid", {**TRAIN, "seed": 99}), "fakejobs", 0)
    running(group)
    assert list(tmp_path.glob(".artifact.*"))
    group.process.send_signal(number)
    assert group.process.wait(60) == 143
    assert not list(tmp_path.glob("*artifact*")) and not (group.work / "failure.json").exists()


STUBBORN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), Path(sys.argv[1]).with_name("saved").touch(), sys.exit(143)))
Path(sys.argv[1]).with_name("metrics.jsonl").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(("seconds", "saved"), [("30", True), ("0.3", False)])
def test_how_long_a_job_may_save_is_the_users_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str, saved: bool
) -> None:
    package = tmp_path / "path" / "stubborn"
    package.mkdir(parents=True)
    (package / "quantize.py").write_text(STUBBORN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("GRSCALE_GRACE_SECONDS", seconds)
    group = Group(write_run(tmp_path, "quantize", {}), "stubborn", 0)
    running(group)
    group.stop()
    assert (group.work / "saved").is_file() == saved and group.process.returncode == (143 if saved else -signal.SIGKILL)


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_grace_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GRSCALE_GRACE_SECONDS", text)
    with pytest.raises(UserError, match=f"GRSCALE_GRACE_SECONDS is '{text}'"):
        grace()


def test_tasks_of_a_slurm_array_load_no_ray() -> None:
    words = "import sys, cluster.allocation; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0


def test_two_processes_start_as_two_processes(tmp_path: Path) -> None:
    run = yaml.safe_load(write_run(tmp_path, "train_sid", {}, processes=2).read_text())
    words = command(run, "jobs", Path("run.yaml"))
    assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert "--multi_gpu" in words and words[words.index("--num_processes") + 1] == "2"
    assert words[-3:] == ["-m", "jobs.train_sid", "run.yaml"] and "--cpu" not in words
    assert environment(run, 0)["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in environment(run, 2)


def test_a_stage_without_a_gpu_of_its_own_sees_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    run = yaml.safe_load(write_run(tmp_path, "encode", {}).read_text())
    assert environment(run, 0)["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(run, 1)["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.slow
@pytest.mark.usefixtures("fake_jobs")
def test_two_processes_through_the_launcher(tmp_path: Path) -> None:
    """The job itself checks that the number of processes is what its run.yaml says."""
    group = Group(write_run(tmp_path, "train_sid", {**TRAIN, "seed": 0}, processes=2), "fakejobs", 0)
    assert group.reason() is None, (tmp_path / "work" / "log.txt").read_text()


def test_what_schedules_loads_no_torch() -> None:
    """Seconds and half a gigabyte in every worker, which only the jobs themselves need."""
    words = (
        "import sys, cluster.trial, cluster.schedule, cluster.run; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0
