"""Against a real Slurm on this machine: run to a report, stop before the limit, cancel, lose a node."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from cluster import cli
from cluster.measure import refresh_rows
from cluster.plan import make_plan
from cluster.store import Store
from cluster.study import load_study
from gr.files import sha256
from tests.conftest import ROOT
from tests.slurm.conftest import leftovers, processes_of, until
from tests.slurm.start_slurm import Slurm

pytestmark = pytest.mark.slow

STUDY = """\
study: tiny
seeds: [0]
datasets:
  world: {planted: {users: 50, items: 40, topics: 3, communities: 3, subtopics: 3}}
cf: [popularity, item-knn]
"""
MEASURED = ["recall@10", "ndcg@10", "n_total"]


def submit(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The ids of the submitted jobs."""
    assert cli.main(["submit", "slurm", *words]) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    return [line.split()[2].rstrip(":") for line in lines if line.startswith("submitted job ")]


def log(folder: Path) -> str:
    return "\n".join(f"== {file.name}\n{file.read_text()}" for file in sorted((folder / "slurm").glob("*.log")))


def ended(slurm: Slurm, job: str, folder: Path, states: tuple[str, ...] = ("COMPLETED",), seconds: float = 240) -> None:
    until(lambda: set(slurm.state(job).split()) <= {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, f"job {job} ended", seconds)
    assert set(slurm.state(job).split()) == set(states), log(folder)


def rows(folder: Path) -> list[dict[str, object]]:
    files = sorted((folder / "metrics").glob("*.parquet"))
    return [{name: value for name, value in pq.read_table(file).to_pylist()[0].items() if name in MEASURED} for file in files]


def release(slurm: Slurm, job: str) -> None:
    """Lets a requeued job start, which Slurm would hold for two minutes; but not in the second that revoked its credential."""
    until(lambda: slurm.state(job) == "PENDING", f"job {job} is back in the queue", 90)
    time.sleep(3)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_a_study_runs_over_two_nodes_to_its_report(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: list[dict[str, object]]
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(STUDY)
    out = tmp_path / "a b'c\"$(touch pwned)`touch pwned`%j #"
    words = [str(study), "--nodes", "2", "--gpus-per-node", "2", "--cpus-per-node", "2", "--time", "10", "--chain", "2"]
    words += ["--out", str(out)]
    job, second = submit(capsys, *words)
    assert cli.main(["submit", "slurm", *words]) == 2
    refused = capsys.readouterr().err  # names one of the two: which, depends on how far Slurm has come
    assert f"job {job} of this study is" in refused or f"job {second} of this study is" in refused
    token = out / "slurm" / f"ray-token-{job}"
    until(token.is_file, "the job made its token", 60)
    assert token.stat().st_mode & 0o777 == 0o600
    until(lambda: len(token.read_text()) == 64, "the token is written", 10)
    secret = token.read_text()
    assert cli.main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"slurm: job {job} RUNNING" in text and f"slurm: job {second} PENDING" in text
    ended(slurm, job, out)
    assert rows(out) == undisturbed and (out / "report" / "index.html").is_file() and "report: " in log(out)
    until(lambda: slurm.state(second) == "CANCELLED", "the rest of the chain is taken out of the queue", 60)
    assert not token.exists() and not processes_of(out) and not leftovers(job)
    told = [file for file in out.rglob("*") if file.is_file() and secret in file.read_text(errors="ignore")]
    assert not told
    assert not list(tmp_path.rglob("pwned")) and not (ROOT / "pwned").exists()


def test_an_array_needs_no_ray_and_ends_with_the_report(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: list[dict[str, object]]
) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    jobs = submit(capsys, str(study), "--array", "--cpus-per-node", "1", "--out", str(out))
    assert len(jobs) == 3
    ended(slurm, jobs[2], out)
    assert rows(out) == undisturbed and (out / "report" / "index.html").is_file()
    assert not (out / "work" / "tune").exists() and not processes_of(out)
    assert len(list((out / "slurm").glob("*.log"))) == 5


def test_a_task_of_an_array_that_is_stopped_goes_back_into_the_queue_and_the_rest_waits_for_it(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: list[dict[str, object]]
) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    shared, points, report = submit(capsys, str(study), "--array", "--cpus-per-node", "1", "--time", "10", "--out", str(out))
    until(lambda: list(out.glob("work/*/log.txt")), "a stage runs", 120)
    slurm("scancel", "--batch", "--signal=USR1", f"{shared}_0")
    release(slurm, f"{shared}_0")
    assert "back into the queue" in log(out) and slurm.state(points) == "PENDING"
    assert not processes_of(out)
    ended(slurm, report, out)
    assert "restarts: 1" in log(out) and rows(out) == undisturbed


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> "Training":
    return Training(tmp_path_factory.mktemp("training"))


class Training:
    """One stage that trains on two nodes for some seconds, as often as asked, each time in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        world = {"users": 300, "items": 80, "topics": 8, "communities": 6, "subtopics": 3, "mean_length": 10}
        self._here("plant", {"world": world}, {})
        self._here("prepare", {}, {"dataset": "plant"})
        self.undisturbed = self.write("undisturbed")
        self.start(self.undisturbed)

    def _here(self, stage: str, config: dict[str, object], inputs: dict[str, str]) -> None:
        run = {
            "stage": stage,
            "id": stage,
            "out": stage,
            "work": f"work-{stage}",
            "inputs": inputs,
            "config": config,
            "launch": {},
        }
        path = self.folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(run))
        subprocess.run([sys.executable, "-m", f"jobs.{stage}", str(path)], cwd=ROOT, check=True, timeout=120)

    def write(self, name: str) -> Path:
        config = {
            "size": {"layers": 2, "d_model": 32, "heads": 2, "d_ff": 64},
            "vocab": 300,
            "optimizer": {"steps": 300, "global_batch": 32, "lr": 0.003},
        }
        run = {"stage": "pretrain_llm", "id": name, "out": f"{name}/out", "work": f"{name}/work", "inputs": {"split": "prepare"},
               "config": config, "launch": {"processes": 2}}  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def start(self, path: Path) -> None:
        """By hand, on this machine, as a person would: two processes of one launcher."""
        launcher = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
        ]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, "-m", "jobs.pretrain_llm", str(path)], cwd=ROOT, env=env, check=True, timeout=300)

    def weights(self, path: Path) -> str:
        return sha256(self.folder / path.stem / "out" / "model.safetensors")

    def events(self, path: Path) -> list[dict[str, object]]:
        file = self.folder / path.stem / "work" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        return [line for line in lines if "step" in line]

    def wait_until_it_trains(self, path: Path) -> None:
        until(lambda: len(self.events(path)) > 1, "it trains", 120)


def saved_and_goes_on(slurm: Slurm, job: str, training: Training, path: Path) -> None:
    """The job that was asked to end saved once, is requeued, resumes at just that step and ends with the undisturbed weights."""
    release(slurm, job)
    work = path.with_suffix("") / "work"
    stopped = [event for event in training.events(path) if event.get("event") == "stopped"]
    assert len(stopped) == 1, log(work)
    assert not processes_of(path)
    ended(slurm, job, work)
    resumed = [event for event in training.events(path) if event.get("event") == "resumed"]
    assert [event["step"] for event in resumed] == [stopped[0]["step"]], log(work)
    assert training.weights(path) == training.weights(training.undisturbed)
    assert "restarts: 1" in log(work) and not processes_of(path)


def test_usr1_saves_and_the_requeued_job_ends_with_the_same_weights(
    slurm: Slurm, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    path = training.write("preempted")
    [job] = submit(capsys, str(path), "--nodes", "2", "--cpus-per-node", "1", "--time", "30")
    training.wait_until_it_trains(path)
    slurm("scancel", "--batch", "--signal=USR1", job)
    saved_and_goes_on(slurm, job, training, path)


def outrank(slurm: Slurm) -> None:
    """Another job takes both nodes from one in a partition of less priority, and gives them back."""
    urgent = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    job = slurm(*urgent).strip()
    until(lambda: slurm.state(job) == "COMPLETED", "the second job had the nodes", 120)


def test_a_second_job_preempts_it_and_it_ends_with_the_same_weights(
    slurm: Slurm, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the grace time the step alone gets TERM: the training saves, and the shell finds out why it ended."""
    path = training.write("outranked")
    [job] = submit(capsys, str(path), "--nodes", "2", "--time", "30", "--partition", "low")
    training.wait_until_it_trains(path)
    outrank(slurm)
    saved_and_goes_on(slurm, job, training, path)


def test_a_node_dies_and_the_job_goes_on_when_there_is_another(
    slurm: Slurm, training: Training, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRSCALE_CHECKPOINT_SECONDS", "1")
    path = training.write("node-dies")
    [job] = submit(capsys, str(path), "--nodes", "2", "--cpus-per-node", "1", "--time", "30")
    checkpoints = training.folder / "node-dies" / "work" / "checkpoint"
    until(lambda: list(checkpoints.glob("[0-9]*")), "there is a checkpoint", 120)
    victims = [psutil.Process(slurm.daemons["n2"].pid), *step_daemons("n2", job)]
    victims += [child for victim in victims for child in victim.children(recursive=True)]
    for victim in victims:
        if victim.is_running():
            victim.kill()
    slurm.stop_daemon("n2")
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    until(lambda: slurm.state(job) == "PENDING", "the job is back in the queue", 90)
    until(lambda: not processes_of(path), "no process is left", 60)
    slurm.start_node("n2")
    slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    release(slurm, job)
    ended(slurm, job, training.folder / "node-dies" / "work")
    assert [event["step"] for event in training.events(path) if event.get("event") == "resumed"]
    assert training.weights(path) == training.weights(training.undisturbed)


def step_daemons(node: str, job: str) -> list[psutil.Process]:
    """The slurmstepd of a job on one node."""
    found = []
    for process in psutil.process_iter(["name", "cmdline", "environ"]):
        words = " ".join(process.info["cmdline"] or [])
        if "slurmstepd" in (process.info["name"] or "") and f"[{job}." in words:
            found.append(process)
    return [process for process in found if process.environ().get("SLURMD_NODENAME", node) == node]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """The rows of the study, made without Slurm and Ray: the tasks of the array, one after the other."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "study.yaml").write_text(STUDY)
    out, loaded = folder / "out", load_study(folder / "study.yaml")
    plan, store = make_plan(loaded), Store(out)
    with store.lock():
        store.prepare(plan, loaded.raw)
    for task in range(len(plan.points) + 1):
        words = [sys.executable, "-m", "cluster.allocation", "task", str(out), str(task)]
        subprocess.run(words, cwd=ROOT, check=True, timeout=120)
    refresh_rows(store, plan)
    return rows(out)


def test_a_study_is_stopped_requeued_and_cancelled_and_another_job_ends_it(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: list[dict[str, object]]
) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    [job] = submit(capsys, str(study), "--nodes", "2", "--cpus-per-node", "2", "--time", "10", "--out", str(out))
    until(lambda: list(out.glob("work/*/log.txt")), "a stage runs", 120)
    slurm("scancel", "--batch", "--signal=USR1", job)
    release(slurm, job)
    assert "stopped; run the same command to go on" in log(out) and "back into the queue" in log(out)
    assert not processes_of(out) and not leftovers(job)
    until(lambda: "restarts: 1" in log(out), "it runs again", 60)
    until(lambda: Path(f"/tmp/grscale-{job}").exists(), "Ray starts again", 60)
    slurm("scancel", job)
    ended(slurm, job, out, ("CANCELLED",), 60)
    until(lambda: not processes_of(out) and not leftovers(job), "nothing is left", 40)
    *_, last = submit(capsys, str(study), "--array", "--cpus-per-node", "1", "--out", str(out))
    ended(slurm, last, out)
    assert rows(out) == undisturbed


@pytest.mark.long
def test_a_second_job_preempts_a_study_and_it_goes_on_to_its_report(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: list[dict[str, object]]
) -> None:
    """In the grace time all of Ray gets TERM, and the driver that lost it ends: the shell finds out why."""
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(STUDY)
    words = [str(study), "--nodes", "2", "--cpus-per-node", "2", "--time", "10", "--partition", "low", "--out", str(out)]
    [job] = submit(capsys, *words)
    until(lambda: list(out.glob("work/*/log.txt")), "a stage runs", 120)
    outrank(slurm)
    assert not processes_of(out) and not leftovers(job)
    release(slurm, job)
    ended(slurm, job, out)
    assert "restarts: 1" in log(out) and rows(out) == undisturbed and (out / "report" / "index.html").is_file()
