import io
import json
import os
import platform
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.progress import Progress, Watch, duration
from cluster.run import failures
from cluster.store import Store, last_line
from cluster.study import load_study
from gr.files import write_json
from tests.cluster.test_schedule import run_all


@pytest.fixture
def plan(study_file: Path) -> Plan:
    return make_plan(load_study(study_file))


@pytest.fixture
def store(tmp_path: Path, plan: Plan) -> Store:
    found = Store(tmp_path / "out")
    found.prepare(plan, {"study": "tiny", "datasets": {}})
    return found


def pretend(store: Store, plan: Plan, stage: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the first node of the stage look as if a process worked on it."""
    node = next(node for node in plan.nodes.values() if node.stage == stage)
    work = store.work(node)
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text('{"step": 3, "steps": 4, "loss": 2.345}\n{"step": 4, "st')
    write_json(work / "process.json", {"pid": os.getpid(), "host": platform.node(), "started": time.time()})
    monkeypatch.setattr("psutil.Process.cmdline", lambda _: ["python", str(work / "run.yaml")])
    return node.id


def test_what_happens_is_told_once(plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(plan, store)
    assert watch.look() == []
    assert watch.line(2).startswith("points: 0 done, 0 running, 6 waiting; about ")
    node = pretend(store, plan, "train_sid", monkeypatch)
    assert watch.look() == ["started train_sid sid xs seed 0"]
    assert "1 running, 5 waiting" in watch.line(2) and "train_sid sid xs seed 0 step 3/4 loss 2.345" in watch.line(2)
    (store.work(plan.nodes[node]) / "process.json").unlink()
    write_json(store.work(plan.nodes[node]) / "failure.json", {"reason": "loss is nan"})
    assert watch.look() == ["FAILED train_sid sid xs seed 0: loss is nan"]
    assert "1 failed" in watch.line(2)
    run_all(plan, store)
    news = watch.look()
    assert sum(line.startswith("measured world-loo-") for line in news) == 6 and "recall@10 0.1000" in news[-1]
    assert watch.look() == [] and watch.line(2) == "points: 6 done, 0 running, 0 waiting"


def test_other_beam_widths_have_lines_of_their_own(study_file: Path, tmp_path: Path) -> None:
    plan = make_plan(load_study(study_file, ["sid.evaluate={widths: [50]}"]))
    store = Store(tmp_path / "out")
    store.prepare(plan, {"study": "tiny", "datasets": {}})
    watch = Watch(plan, store)
    watch.look()
    assert "6 waiting; other beam widths: 0 of 4 done; about " in watch.line(2)
    run_all(make_plan(load_study(study_file)), store)
    watch.look()
    assert watch.line(2).startswith("points: 6 done, 0 running, 0 waiting; other beam widths: 0 of 4 done; about ")
    node = plan.points[2].widths[0]
    store.work(plan.nodes[node]).mkdir(parents=True)
    write_json(store.work(plan.nodes[node]) / "failure.json", {"reason": "no room"})
    assert watch.look() == ["FAILED evaluate_sid sid xs seed 0 with 50 beams: no room"]
    assert watch.groups()[-1].name == "sid, 50 beams" and watch.groups()[-1].states == {"failed": 1, "waiting": 3}
    failed, *waiting = failures(store, plan)
    assert (failed.point, failed.reason) == (f"{plan.points[2].run_id} with 50 beams", "evaluate_sid: no room") and failed.ran
    assert len(waiting) == 3 and not any(failure.ran for failure in waiting)
    (store.work(plan.nodes[node]) / "failure.json").unlink()
    run_all(plan, store)
    news = watch.look()
    told = re.compile(r"finished evaluate_sid sid \w+ seed \d with 50 beams in .*: recall@10 0.1000")
    assert len(news) == 4 and all(told.match(line) for line in news)
    assert watch.line(2) == "points: 6 done, 0 running, 0 waiting; other beam widths: 4 of 4 done" and failures(store, plan) == []


def test_a_width_fails_with_its_training(study_file: Path, tmp_path: Path) -> None:
    plan = make_plan(load_study(study_file, ["sid.evaluate={widths: [50]}"]))
    store = Store(tmp_path / "out")
    store.prepare(plan, {"study": "tiny", "datasets": {}})
    run_all(plan, store, fails="quantize")
    watch = Watch(plan, store)
    watch.look()
    assert watch.widths_left() == 0 and watch.groups()[-1].states == {"failed": 4}
    assert len(failures(store, plan)) == 4, "told once, of the point"


def test_time_left_falls_as_work_is_done_and_forgets_what_will_not_run(plan: Plan, store: Store) -> None:
    watch = Watch(plan, store)
    watch.look()
    all_of_it, one_core = watch.seconds_left(2), watch.seconds_left(1)
    assert 0 < all_of_it <= one_core
    run_all(plan, store, fails="quantize")
    watch.look()
    assert watch.seconds_left(2) == 0


def test_a_pipe_gets_plain_lines(plan: Plan, store: Store) -> None:
    out = io.StringIO()
    with Progress(plan, store, 2, Console(file=out, width=80)) as progress:
        run_all(plan, store)
        deadline = time.monotonic() + 10
        while len(progress.watch.points) < 6 and time.monotonic() < deadline:
            time.sleep(0.05)
    text = out.getvalue()
    assert "\x1b" not in text
    assert text.count("measured ") == 6 and text.strip().endswith("points: 6 done, 0 running, 0 waiting")


def test_a_terminal_gets_a_table(plan: Plan, store: Store) -> None:
    out = io.StringIO()
    with Progress(plan, store, 2, Console(file=out, width=100, force_terminal=True)):
        run_all(plan, store)
    assert "6 of 6 points measured" in out.getvalue() and "sid xs" in out.getvalue()


def test_the_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert last_line(file) == {}
    file.write_text('{"step": 1}\n' + json.dumps({"step": 2, "long": "x" * 500}) + '\n{"step": 3')
    assert last_line(file)["step"] == 2


def test_a_process_id_taken_by_another_program_is_no_sign_of_life(plan: Plan, store: Store) -> None:
    node = next(iter(plan.nodes.values()))
    store.work(node).mkdir(parents=True)
    write_json(store.work(node) / "process.json", {"pid": os.getpid(), "host": platform.node(), "started": 0})
    assert store.state(node) == "waiting"
    store.end_groups(plan)  # this test would not survive a mistake here
    assert store.process(node) is None


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (200, "3 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
