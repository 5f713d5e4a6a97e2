"""Whole runs through a real local Ray, with jobs that train nothing."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import run as runs
from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.run import run_study
from cluster.spec import Study
from cluster.store import Store
from cluster.study import load_study
from gr.errors import UserError
from gr.files import write_json

DRIVER = """
import os
import sys
from pathlib import Path
from cluster import run as runs
from cluster.spec import Study
from cluster.study import load_study
from gr.errors import UserError
runs._report = lambda store, plan: print("report written")
try:
    code = runs.run_study(load_study(Path(sys.argv[1]), sys.argv[3:]), Path(sys.argv[2]), os.environ.get("RAY"), "fakejobs")
except UserError as error:
    print(error, file=sys.stderr)
    code = 2
print("ray loaded:", "ray" in sys.modules)
sys.exit(code)
"""


def driver(study: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(study), str(out), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out, err


def test_one_failing_point_does_not_stop_the_others_and_a_second_run_does_only_what_failed(
    study_file: Path, tmp_path: Path, fake_jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    text, err = finished(driver(study_file, out, "seeds=[0, 13]"), 1)
    started = Counter(line.split("-")[0] for line in fake_jobs.read_text().splitlines())
    assert started == {
        "plant": 1, "prepare": 1, "baseline": 2, "train_encoder": 1, "encode": 1, "quantize": 1, "train_sid": 4,
        "evaluate_sid": 2,
    }  # fmt: skip
    assert sorted(p.name.rsplit("-", 1)[0] for p in (out / "metrics").iterdir()) == [
        "world-loo-cf-bayes-optimal-s0", "world-loo-cf-popularity-s0", "world-loo-sid-s-s0", "world-loo-sid-xs-s0",
    ]  # fmt: skip
    failures = json.loads((out / "failures.json").read_text())
    assert [f["reason"] for f in failures] == ["train_sid: loss is nan at step 3 of 4"] * 2
    for failure in failures:
        assert f"failed: {failure['point']}: train_sid: loss is nan at step 3 of 4\n        log: {failure['log']}" in err
        assert "loss is nan" in Path(failure["log"]).read_text()
    assert "measured world-loo-sid-xs-s0-" in text and "recall@10 0.1000" in text and "report written" in text
    assert "Traceback" not in err and "ray" not in err.lower()

    fake_jobs.write_text("")
    monkeypatch.setattr(runs, "_with_ray", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr(runs, "_report", lambda *_: None)
    assert run_study(load_study(study_file, ["seeds=[0]"]), out, module="fakejobs") == 0
    assert not (out / "failures.json").exists() and fake_jobs.read_text() == ""
    row = next((out / "metrics").glob("*sid-xs-s0*"))
    row.unlink()  # a row is made from the manifests again, without any work
    assert run_study(load_study(study_file, ["seeds=[0]"]), out, module="fakejobs") == 0
    assert row.is_file()


@pytest.mark.slow
def test_a_finished_study_is_left_alone_and_a_deleted_artifact_rebuilt(study_file: Path, tmp_path: Path, fake_jobs: Path) -> None:
    out = tmp_path / "out"
    finished(driver(study_file, out), 0)
    fake_jobs.write_text("")
    began = time.monotonic()
    text, _ = finished(driver(study_file, out), 0)
    assert time.monotonic() - began < 15 and "ray loaded: False" in text and fake_jobs.read_text() == ""
    [encode] = (out / "artifacts" / "encode").iterdir()
    shutil.rmtree(encode)
    finished(driver(study_file, out), 0)
    assert fake_jobs.read_text() == f"encode-{encode.name}\n"


def wait_for_training(out: Path, process: subprocess.Popen[str]) -> list[psutil.Process]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        files = [f for f in out.glob("work/train_sid-*/process.json") if (f.parent / "metrics.jsonl").is_file()]
        if files:
            return [psutil.Process(json.loads(f.read_text())["pid"]) for f in files]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no training started: {process.communicate()}")


@pytest.mark.slow
def test_kill_9_of_a_job_names_its_point(study_file: Path, tmp_path: Path, fake_jobs: Path) -> None:
    assert fake_jobs.is_file()
    out = tmp_path / "out"
    process = driver(study_file, out, "seeds=[99]", "sid.ladder=[{name: xs, layers: 1, d_model: 8, heads: 1, d_kv: 8, d_ff: 8}]")
    [job] = wait_for_training(out, process)
    job.kill()
    _, err = finished(process, 1)
    assert "failed: world-loo-sid-xs-s99-" in err and "train_sid: killed by signal 9 (SIGKILL)" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_process_and_the_same_command_goes_on(
    study_file: Path, tmp_path: Path, fake_jobs: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = driver(study_file, out, "seeds=[99]")
    jobs = wait_for_training(out, process)
    second = driver(study_file, out, "seeds=[99]")
    assert "another `grscale run` works here" in finished(second, 2)[1]
    os.kill(process.pid, number)
    _, err = finished(process, 130)
    assert "run the same command to go on" in err and not any(job.is_running() for job in jobs)
    assert not list(out.glob("work/*/process.json"))
    fake_jobs.write_text("")
    finished(driver(study_file, out, "seeds=[0]"), 0)
    assert {line.split("-")[0] for line in fake_jobs.read_text().splitlines()} == {"train_sid", "evaluate_sid"}


@pytest.mark.slow
def test_kill_9_of_the_driver_leaves_no_job_behind(study_file: Path, tmp_path: Path, fake_jobs: Path) -> None:
    assert fake_jobs.is_file()
    out = tmp_path / "out"
    process = driver(study_file, out, "seeds=[99]")
    jobs = wait_for_training(out, process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(job.is_running() and job.status() != psutil.STATUS_ZOMBIE for job in jobs):
        assert time.monotonic() < deadline, "a job outlived its study"
        time.sleep(0.2)
    finished(driver(study_file, out, "seeds=[0]"), 0)


def test_another_study_in_the_same_folder_is_refused(study_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text('{"study": "other"}')
    with pytest.raises(UserError, match="holds study 'other', not 'tiny'"):
        run_study(load_study(study_file), out, module="fakejobs")


@pytest.mark.parametrize("text", ['{"study": ', "[]"])
def test_a_damaged_plan_is_named(study_file: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan.json: damaged; remove it"):
        run_study(load_study(study_file), tmp_path, module="fakejobs")


@pytest.mark.parametrize("out", ["study.yaml", "study.yaml/below", "/proc/nowhere/out", "taken"])
def test_a_folder_that_can_not_be_one_is_named(study_file: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "metrics").write_text("a file, where a folder would have to be")
    with pytest.raises(UserError, match=r"no folder to write a study in \(.+\); give another --out"):
        run_study(load_study(study_file), tmp_path / out, module="fakejobs")


def test_a_wrong_ray_address_is_named(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(**_: object) -> None:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(ray, "init", init)
    for address, words in (
        ("auto", r"no Ray cluster there that lets us in \(nobody answers\); its token is given by .*"),
        ("127.0.0.1:9", r"nothing listens there; it is HOST:PORT of the cluster's head \(or: auto\)"),
        ("ray://127.0.0.1:10001", "start it on a machine of the cluster, with the address of its head: HOST:PORT"),
    ):
        with pytest.raises(UserError, match=rf"^--ray {address}: {words}$"):
            run_study(load_study(study_file), tmp_path / "out", address, module="fakejobs")
    with pytest.raises(ConnectionError):  # of this machine's own Ray it is no mistake of the user's
        run_study(load_study(study_file), tmp_path / "out", module="fakejobs")


LISTENING = """
import logging, os, sys
import psutil
os.environ["RAY_ADDRESS"] = "192.0.2.1:1"  # somebody else's cluster: without --ray it is not ours to join
from cluster import run as runs
def look(*_):
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for c in process.net_connections("inet"):
            if c.status == psutil.CONN_LISTEN:
                print(c.laddr.ip)
    return runs.os.nice(0)
runs._tune = look
class Store:
    def done(self, node): return True
    def end_groups(self, plan): pass
class Plan:
    nodes = {}
from cluster.store import Stop
runs._with_ray(Plan(), Store(), None, "jobs", Stop())
"""


def test_a_ray_of_our_own_listens_on_loopback_only_and_joins_no_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    heard = set(done.stdout.split())
    assert heard and all(ip in ("::1", "::ffff:127.0.0.1") or ip.startswith("127.") for ip in heard), heard


def test_failures_tell_what_failed_from_what_did_not_run(study_file: Path, tmp_path: Path) -> None:
    plan, store = make_plan(load_study(study_file)), Store(tmp_path / "out")
    assert {(f.reason, f.ran) for f in runs.failures(store, plan)} == {
        (f"needs {next(iter(plan.nodes.values())).key}, which did not run", False)
    }
    prepare = next(node for node in plan.nodes.values() if node.stage == "prepare")
    store.work(prepare).mkdir(parents=True)
    write_json(store.work(prepare) / "failure.json", {"reason": "did not run well"})
    assert {(f.reason, f.ran) for f in runs.failures(store, plan)} == {
        (f"needs {prepare.key}, which failed: did not run well", True)
    }


def test_what_a_kill_left_half_written_is_swept(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, store = load_study(study_file), Store(tmp_path / "out")
    plan = make_plan(loaded)
    store.prepare(plan, loaded.raw)
    nodes = {node.stage: node for node in plan.nodes.values()}
    half = store.artifact(nodes["encode"]).with_name(f".{nodes['encode'].id}.x7_ab")
    elsewhere = store.artifact(nodes["quantize"]).with_name(f".{nodes['quantize'].id}.x7_ab")
    whole, notes = store.artifact(nodes["plant"]), store.artifact(nodes["encode"]).with_name(".notes.d")
    damaged = store.artifact(nodes["prepare"])
    for folder in (half, elsewhere, whole, notes, damaged):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    write_json(whole / "artifact.json", {"files": {"file": "00"}})
    write_json(damaged / "artifact.json", {"files": {"another": "00"}})
    store.work(nodes["quantize"]).mkdir()
    write_json(store.work(nodes["quantize"]) / "process.json", {"pid": 1, "host": "elsewhere", "started": 0})
    row = store.folder / "metrics" / ".x.parquet.77"
    row.touch()
    monkeypatch.setattr(runs, "_run", lambda *_: [path.exists() for path in (half, row)] == [True, True])
    assert run_study(loaded, store.folder) == 1  # not interrupted: both were gone before the work began
    assert (
        not half.exists()
        and not row.exists()
        and not damaged.exists()
        and elsewhere.is_dir()
        and (whole / "file").is_file()
        and notes.is_dir()
    )


def test_who_asks_whether_a_study_runs_keeps_nobody_out(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    with store.lock():
        assert store.locked()
        with pytest.raises(UserError, match="another `grscale run` works here"), Store(tmp_path / "out").lock():
            pass
    with (tmp_path / "out" / ".lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not store.locked()


def test_the_studys_copy_means_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    raw = {
        "study": "x",
        "datasets": {"a": {"path": "data"}, "b": {"planted": {}}},
        "sid": {"encoders": {"near": {"model": "model"}, "hub": {"model": "org/name"}}},
        "llm": {"ladder": [{"name": "m", "model": "model"}, {"name": "fresh"}]},
    }
    store, study_plan = Store(tmp_path / "out"), Plan(Study(study="x", datasets={"a": {"planted": {}}}))
    store.prepare(study_plan, raw)
    copy = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    assert copy["datasets"] == {"a": {"path": str(tmp_path / "data")}, "b": {"planted": {}}}
    assert copy["sid"]["encoders"] == {"near": {"model": str(tmp_path / "model")}, "hub": {"model": "org/name"}}
    assert copy["llm"]["ladder"][0]["model"] == str(tmp_path / "model")
