"""The order of the work, without Ray's processes: a loop stands for Tune, and writes the artifact of each stage itself."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.search import Searcher

from cluster.graph import Plan
from cluster.machines import check_room
from cluster.plan import make_plan
from cluster.room import Need
from cluster.schedule import DIED, NO_ROOM, Schedule, need, resources
from cluster.store import Stop, Store
from cluster.study import load_study
from gr.errors import UserError
from gr.files import write_json
from jobs.artifact import write_manifest

MACHINES = {"here": Need(2, 0, 16e9)}
FACTS = {"prepare": {"users": 50, "interactions": 600}}
RECALL = {f"{name}@{k}": 0.1 for name in ("recall", "ndcg") for k in (1, 5, 10, 20)}


def run_all(plan: Plan, store: Store, fails: str | None = None) -> list[str]:
    """Runs what the schedule suggests, one trial at a time; returns the stages that ran."""
    schedule, ran = Schedule(plan, store, "jobs", Stop(), lambda: MACHINES), []
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


def test_64_cores_are_filled_at_once(study_file: Path, store: Store) -> None:
    """Tune asks until it hears None: nothing waits for a trial before it to have started."""
    few = make_plan(load_study(study_file))
    run_all(few, store)
    plan = make_plan(load_study(study_file, [f"seeds={list(range(2, 42))}"]))
    schedule = Schedule(plan, store, "jobs", Stop(), lambda: {"a": Need(48, 0, 1e12), "b": Need(16, 0, 1e12)})
    asked = [schedule.suggest(str(i)) for i in range(65)]
    assert [config["machine"] for config in asked[:64] if isinstance(config, dict)].count("a") == 48 and asked[64] is None


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


def test_a_trial_that_died_is_tried_once_more_elsewhere(plan: Plan, store: Store) -> None:
    machines = {"a": Need(2, 0, 16e9), "b": Need(64, 0, 512e9)}
    schedule = Schedule(plan, store, "jobs", Stop(), lambda: machines)
    first, second = schedule.suggest("1"), None
    assert isinstance(first, dict) and first["machine"] == "a"
    schedule.on_trial_complete("1", error=True)
    second = schedule.suggest("2")
    assert isinstance(second, dict) and second["runs"] == first["runs"] and second["machine"] == "b"
    schedule.on_trial_complete("2", error=True)
    assert store.failure(next(iter(plan.nodes.values()))) == DIED
    assert schedule.suggest("3") == Searcher.FINISHED


def test_a_job_that_said_why_it_failed_is_not_tried_again(plan: Plan, store: Store) -> None:
    schedule = Schedule(plan, store, "jobs", Stop(), lambda: MACHINES)
    config = schedule.suggest("1")
    assert isinstance(config, dict)
    write_json(Path(config["runs"][0]).parent / "failure.json", {"reason": "out of disk"})
    schedule.on_trial_complete("1", error=True)
    assert schedule.suggest("2") == Searcher.FINISHED


def test_when_the_last_machine_with_room_is_gone_the_study_ends(plan: Plan, store: Store) -> None:
    machines, now = {"here": Need(2, 0, 16e9)}, [0.0]
    schedule = Schedule(plan, store, "jobs", Stop(), lambda: machines, lambda: now[0])
    schedule.suggest("1")
    machines, now[0] = {"small": Need(0, 0, 16e9)}, 60.0
    schedule.on_trial_complete("1", error=True)
    assert schedule.suggest("2") == Searcher.FINISHED
    assert store.failure(next(iter(plan.nodes.values()))) == NO_ROOM


def test_after_a_stop_nothing_is_suggested_or_blamed(plan: Plan, store: Store) -> None:
    stop = Stop()
    schedule = Schedule(plan, store, "jobs", stop, lambda: MACHINES)
    schedule.suggest("a")
    assert schedule.suggest("b") is None  # everything else waits for the first chain
    stop.asked = True
    schedule.on_trial_complete("a", error=True)
    assert schedule.suggest("c") == Searcher.FINISHED
    assert all(store.failure(node) is None for node in plan.nodes.values())


def needs(plan: Plan) -> list[tuple[str, Need]]:
    return [(node.id, need(plan, node)) for node in plan.nodes.values()]


def test_a_rung_that_fits_nowhere_is_refused(study_file: Path) -> None:
    plan = make_plan(load_study(study_file, ["sid.ladder[0].launch.processes=4"]))
    with pytest.raises(UserError, match=r"train_sid-\w+ needs 4 CPUs and 0 GPUs .* of one machine; the largest has 2 and 0"):
        check_room(plan, needs(plan), {"a": Need(2, 0, 16e9), "b": Need(1, 0, 64e9)})
    check_room(plan, needs(plan), {"a": Need(4, 0, 1e6)})  # memory is an estimate, and refuses nobody


def test_a_tiny_rung_gets_a_share_of_a_gpu(study_file: Path) -> None:
    def gpus(*overrides: str) -> dict[str, set[float]]:
        plan = make_plan(load_study(study_file, ["resources.gpus_per_process=1", *overrides]))
        return {
            stage: {need(plan, n).gpus for n in plan.nodes.values() if n.stage == stage} for stage in ("train_sid", "prepare")
        }

    wide = "sid.ladder[1]={name: s, layers: 12, d_model: 2048, heads: 16, d_kv: 128, d_ff: 8192}"
    assert gpus() == {"train_sid": {1.0}, "prepare": {0.0}}
    assert gpus("resources.gpu_memory=80") == {"train_sid": {0.125}, "prepare": {0.0}}
    assert gpus("resources.gpu_memory=80", wide)["train_sid"] == {0.125, 1.0}
    assert gpus("resources.gpu_memory=80", "sid.ladder[0].launch.processes=2")["train_sid"] == {0.125, 2.0}
    assert gpus("resources.gpu_memory=3")["train_sid"] == {0.5}


def test_a_rung_of_several_gpus_is_evaluated_in_a_trial_of_its_own(study_file: Path) -> None:
    plan = make_plan(load_study(study_file, ["resources.gpus_per_process=1", "sid.ladder[0].launch.processes=4"]))
    chains = [[plan.nodes[node].stage for node in chain.nodes] for chain in plan.chains()]
    assert chains.count(["train_sid"]) == 2 and chains.count(["train_sid", "evaluate_sid"]) == 2


def test_resources() -> None:
    asked = resources({"need": {"cpus": 4.0, "gpus": 0.25, "memory": 2.0**30}, "machine": "ab" * 28})
    assert asked.bundles == [{"CPU": 4.0, "GPU": 0.25, "memory": 2.0**30}] and asked.strategy == "STRICT_PACK"
    assert asked == resources({"need": {"cpus": 4.0, "gpus": 0.25, "memory": 2.0**30}, "machine": "ab" * 28})
    assert asked != resources({"need": {"cpus": 4.0, "gpus": 0.25, "memory": 2.0**30}, "machine": "cd" * 28})
