"""The order of the work, without Ray's processes: a loop stands for Tune, and writes the artifact of each stage itself."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.search import Searcher

from cluster.plan import Plan, make_plan
from cluster.run import check_room
from cluster.schedule import Schedule, resources
from cluster.store import Stop, Store
from cluster.study import load_study
from gr.errors import UserError
from gr.files import write_json
from jobs.artifact import write_manifest

FACTS = {"prepare": {"users": 50, "interactions": 600}}
RECALL = {f"{name}@{k}": 0.1 for name in ("recall", "ndcg") for k in (1, 5, 10, 20)}


def run_all(plan: Plan, store: Store, fails: str | None = None) -> list[str]:
    """Runs what the schedule suggests, one trial at a time; returns the stages that ran."""
    schedule, ran = Schedule(plan, store, "jobs", Stop()), []
    for trial in map(str, range(99)):
        config = schedule.suggest(trial)
        if config == Searcher.FINISHED:
            break
        assert isinstance(config, dict)
        for path in map(Path, config["runs"]):
            run = yaml.safe_load(path.read_text())
            ran.append(f"{run['stage']}-{run['id']}")
            if run["stage"] == fails:
                write_json(path.parent / "failure.json", {"reason": "told to"})
                break
            finish(path, run)
        schedule.on_trial_complete(trial)
    return ran


def finish(path: Path, run: dict[str, Any]) -> None:
    out = path.parent / run["out"]
    for name, folder in run["inputs"].items():
        assert (path.parent / folder / "artifact.json").is_file(), f"{run['stage']} started before its {name} was there"
    out.mkdir(parents=True)
    write_manifest(
        out,
        stage=run["stage"],
        id=run["id"],
        config=run["config"],
        inputs=run["inputs"],
        launch=run["launch"],
        started=time.time(),
        facts=FACTS.get(run["stage"], RECALL),
    )


@pytest.fixture
def plan(study_file: Path) -> Plan:
    return make_plan(load_study(study_file))


@pytest.fixture
def store(tmp_path: Path, plan: Plan) -> Store:
    found = Store(tmp_path / "out")
    found.prepare(plan, {"study": "tiny", "datasets": {}})
    return found


def test_everything_runs_once_and_after_its_inputs(plan: Plan, store: Store) -> None:
    ran = run_all(plan, store)
    assert sorted(ran) == sorted(node.key for node in plan.nodes.values())
    assert all(store.row(point).is_file() for point in plan.points)
    order = [name.split("-")[0] for name in ran]
    assert order[2:4] == ["baseline"] * 2  # measured within seconds
    assert run_all(plan, store) == []


def test_a_larger_rung_starts_before_a_smaller_one(plan: Plan, store: Store) -> None:
    trained = [name.split("-")[1] for name in run_all(plan, store) if name.startswith("train_sid")]
    assert [plan.nodes[id].config["size"]["d_model"] for id in trained] == [32, 32, 16, 16]


def test_a_failure_stops_only_what_needs_it(plan: Plan, store: Store) -> None:
    ran = [name.split("-")[0] for name in run_all(plan, store, fails="quantize")]
    assert ran.count("train_sid") == 0 and ran.count("baseline") == 2
    assert sum(store.row(point).is_file() for point in plan.points) == 2


def test_one_point_failing_leaves_the_others(plan: Plan, store: Store) -> None:
    ran = [name.split("-")[0] for name in run_all(plan, store, fails="train_sid")]
    assert ran.count("train_sid") == 4 and ran.count("evaluate_sid") == 0


def test_deleting_an_artifact_rebuilds_only_it(plan: Plan, store: Store) -> None:
    import shutil

    run_all(plan, store)
    for stage in ("quantize", "evaluate_sid"):
        node = next(node for node in plan.nodes.values() if node.stage == stage)
        shutil.rmtree(store.artifact(node))
        assert run_all(plan, store) == [node.key]


@pytest.mark.parametrize("damage", ["manifest", "file"])
def test_a_damaged_artifact_is_rebuilt(plan: Plan, store: Store, damage: str) -> None:
    run_all(plan, store)
    node = next(node for node in plan.nodes.values() if node.stage == "train_sid")
    manifest = store.artifact(node) / "artifact.json"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(manifest.read_text().replace('"files": {}', '"files": {"model.safetensors": "00"}'))
    assert not store.done(node) and store.state(node) == "waiting"
    store.sweep(plan)
    assert run_all(plan, store) == [node.key]


def test_a_seed_more_runs_only_that(plan: Plan, store: Store, study_file: Path) -> None:
    run_all(plan, store)
    more = make_plan(load_study(study_file, ["seeds=[0, 1, 5]"]))
    assert sorted(name.split("-")[0] for name in run_all(more, store)) == ["evaluate_sid"] * 2 + ["train_sid"] * 2


def test_a_killed_actor_gets_a_reason(plan: Plan, store: Store) -> None:
    schedule = Schedule(plan, store, "jobs", Stop())
    assert isinstance(schedule.suggest("a"), dict)
    schedule.on_trial_complete("a", error=True)
    first = next(iter(plan.nodes.values()))
    assert "its trial died" in str(store.failure(first))
    assert schedule.suggest("b") == Searcher.FINISHED


def test_after_a_stop_nothing_is_suggested_or_blamed(plan: Plan, store: Store) -> None:
    stop = Stop()
    schedule = Schedule(plan, store, "jobs", stop)
    schedule.suggest("a")
    assert schedule.suggest("b") is None  # everything else waits for the first chain
    stop.asked = True
    schedule.on_trial_complete("a", error=True)
    assert schedule.suggest("c") == Searcher.FINISHED
    assert all(store.failure(node) is None for node in plan.nodes.values())


def test_a_rung_that_fits_nowhere_is_refused(study_file: Path) -> None:
    plan = make_plan(load_study(study_file, ["sid.ladder[0].launch.processes=4"]))
    machines = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    with pytest.raises(UserError, match=r"train_sid-\w+ needs 4 CPUs and 0 GPUs .* the largest machine has 2 and 0"):
        check_room(list(plan.nodes.values()), machines)
    check_room(list(plan.nodes.values()), [{"Alive": True, "Resources": {"CPU": 4.0}}])


def test_resources() -> None:
    assert resources({"cpus": 4, "gpus": [2, 1]}).bundles == [{"CPU": 4.0, "GPU": 2.0}]
    assert resources({"cpus": 1, "gpus": [0]}).bundles == [{"CPU": 1.0}]
