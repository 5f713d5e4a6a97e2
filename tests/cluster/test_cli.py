import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.plan import make_plan
from cluster.store import Store
from cluster.study import load_study
from tests.cluster.test_schedule import run_all


@pytest.fixture
def folder(study_file: Path, tmp_path: Path) -> Path:
    """A study whose recommenders all failed."""
    loaded = load_study(study_file)
    plan, store = make_plan(loaded), Store(tmp_path / "out")
    store.prepare(plan, loaded.raw)
    run_all(plan, store, fails="train_sid")
    for node in plan.nodes.values():
        if node.stage == "train_sid":
            (store.work(node) / "log.txt").write_text(f"log of {node.key}\n")
    return store.folder


def test_help_is_quick() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "cluster.cli", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 1.0
    assert re.findall(r"^    (\w+) ", done.stdout, re.M) == [
        "run",
        "plan",
        "status",
        "logs",
        "report",
        "data",
        "fit",
        "submit",
        "doctor",
    ]


def test_plan_prints_one_json_document(study_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(study_file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["points"]) == 6
    prices = {node["stage"]: node["price"] for node in document["nodes"]}
    assert prices["train_sid"]["n_parameters"] == 21184  # counted by hand, as in test_price
    assert prices["plant"]["n_parameters"] is None and not prices["plant"]["done"]
    assert document["seconds"] > 0


def test_plan_shows_what_is_done(study_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(study_file), "--out", str(folder)]) == 0
    assert "15 stages (8 to run)" in " ".join(capsys.readouterr().out.split())


def test_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sorted(document["points"].values()) == ["done"] * 2 + ["failed"] * 4 and not document["running"]
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "2 of 6 points measured" in text and "train_sid: told to" in text and "nothing runs here" in text


def test_status_of_a_damaged_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / "plan.json").read_text()
    for text in (whole[: len(whole) // 2], "[1]", '{"study": "tiny"}', '{"nodes": [{"id": "x"}], "points": []}'):
        (folder / "plan.json").write_text(text)
        assert main(["status", str(folder)]) == 2
        err = capsys.readouterr().err
        assert "plan.json: damaged; remove it, and the same `grscale run`" in err and err.count("\n") == 1


def test_status_tells_only_of_what_failed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reason may hold any words; a stage whose turn has not come has none."""
    for file in folder.glob("work/*/failure.json"):
        file.write_text('{"reason": "the launcher did not run"}')
    assert main(["status", str(folder), "--json"]) == 0
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert [f["reason"] for f in failures] == ["train_sid: the launcher did not run"] * 4
    for file in folder.glob("work/*/failure.json"):
        file.unlink()
    assert main(["status", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == []


def test_run_into_a_file(study_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(study_file), "--out", str(study_file)]) == 2
    err = capsys.readouterr().err
    assert "no folder to write a study in (File exists); give another --out" in err and err.count("\n") == 1


def test_logs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", str(folder), "world-loo-sid-s-s1"]) == 0
    assert capsys.readouterr().out.startswith("log of train_sid-")
    assert main(["logs", str(folder), "world-loo-cf-popularity"]) == 2
    assert "so there is no log" in capsys.readouterr().err


def test_a_width_that_failed_shows_in_status_and_logs(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_study(study_file, ["seeds=[0]", "sid.evaluate={widths: [50]}"])
    plan, store = make_plan(loaded), Store(tmp_path / "out")
    store.prepare(plan, loaded.raw)
    run_all(plan, store)
    point = next(point for point in plan.points if point.widths)
    node = plan.nodes[point.widths[0]]
    shutil.rmtree(store.artifact(node))
    (store.work(node) / "failure.json").write_text('{"reason": "no memory"}')
    (store.work(node) / "log.txt").write_text(f"log of {node.key}\n")
    (store.work(plan.nodes[point.nodes[-1]]) / "log.txt").write_text("log of the point's own\n")
    assert main(["status", str(store.folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    name = f"{point.run_id} with 50 beams"
    assert document["widths"][name] == "failed" and sorted(document["widths"].values()) == ["done", "failed"]
    assert set(document["points"].values()) == {"done"}
    assert [(f["point"], f["reason"]) for f in document["failures"]] == [(name, "evaluate_sid: no memory")]
    assert main(["logs", str(store.folder), point.run_id]) == 0
    assert capsys.readouterr().out == f"log of {node.key}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["status", "nowhere"], "nowhere: not a study's folder"),
        (["report", "nowhere"], "nowhere: not a study's folder"),
        (["run", "--set", "seds=[1]"], "seds: unknown key; did you mean seeds?"),
        (["fit", "nowhere.csv", "--law", "power", "--columns", "N=n,L=l"], "nowhere.csv"),
        (["fit", "nowhere.csv"], "fit: the following arguments are required: --law"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "the following arguments are required: COMMAND"),
        (["data", "jsonl", "nowhere.jsonl", "nowhere2.jsonl", "--out", "x"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("grscale") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def jsonl(folder: Path) -> list[str]:
    """The words of `grscale data jsonl` for a data set of one user, but --out."""
    (folder / "s.jsonl").write_text('{"user": "u", "items": [1, 1, 1], "timestamps": [1, 2, 3]}\n')
    (folder / "i.jsonl").write_text('{"item": 1, "asin": "a", "title": "A", "attributes": []}\n')
    return ["data", "jsonl", str(folder / "s.jsonl"), str(folder / "i.jsonl")]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("../file/y", "../file/y: no folder can be written there (File exists); name another"),
        ("../file", "../file: is a file; give --out a folder"),
        ("/proc/nowhere/y", "/proc/nowhere/y: no folder can be written there"),
        (".", ".: is the current folder, which would be replaced; give --out another"),
        ("../here", "../here: is the current folder"),
    ],
)
def test_data_into_no_place_for_it(
    out: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("dear to somebody")
    monkeypatch.chdir(tmp_path / "here")
    words = jsonl(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([*words, "--out", out]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*words, "--out", "../new"]) == 0 and (tmp_path / "new" / "manifest.json").is_file()


def test_data_that_is_terminated_leaves_nothing(tmp_path: Path) -> None:
    slow = "import sys, time; from cluster import cli; from gr.data import importer\n"
    slow += "importer._users = lambda _: time.sleep(60); sys.exit(cli.main(sys.argv[1:]))"
    words = [*jsonl(tmp_path), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", slow, *words])
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/items.parquet")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.jsonl", "s.jsonl"]


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from cluster import doctor

    monkeypatch.setattr(
        doctor, "requires", lambda _: ["numpy>=2.0", "nosuchpackage>=1", "pydantic>=999", "deepspeed; extra == 'x'"]
    )
    monkeypatch.setattr(doctor, "_imports", lambda name: (True, f"import {name}", "works"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BAD  nosuchpackage: not installed" in text and re.search(r"BAD  pydantic: .* \(needs 999\)", text)
    assert "ok   numpy" in text and "to mend: nosuchpackage, pydantic" in text and "deepspeed" not in text


@pytest.mark.slow
def test_doctor_on_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "cluster.cli", "doctor"], capture_output=True, text=True)
    findings = done.stdout.splitlines()
    assert any(line.startswith("ok   import ray.tune: works") for line in findings), done.stdout + done.stderr
    assert done.returncode == ("BAD" in done.stdout)
