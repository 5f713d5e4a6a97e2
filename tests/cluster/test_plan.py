import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import plan as plans
from cluster.allocation import task_nodes
from cluster.graph import Node, Plan, Point, nearest_point
from cluster.plan import make_plan
from cluster.spec import Beams, EncoderSpec, Evaluate, FreshEncoder, LlmTrain, Pretrain, SidTrain, TitleBeams
from cluster.store import Store, open_store
from cluster.study import load_study
from gr.data.dataset import DatasetWriter, Item, User
from gr.errors import UserError
from jobs.config import BaselineConfig, EvaluateLlmConfig, EvaluateSidConfig
from jobs.llm_config import PretrainLlmConfig, TrainLlmConfig
from jobs.options import Config
from jobs.sid_config import EncodeConfig, TrainEncoderConfig, TrainSidConfig
from tests.cluster.conftest import LLM


def planned(file: Path, *overrides: str) -> Plan:
    return make_plan(load_study(file, overrides))


def stages(plan: Plan) -> Counter[str]:
    return Counter(node.stage for node in plan.nodes.values())


def test_common_stages_are_one_node(study_file: Path) -> None:
    plan = planned(study_file)
    assert stages(plan) == {
        "plant": 1, "prepare": 1, "baseline": 2, "train_encoder": 1, "encode": 1, "quantize": 1, "train_sid": 4,
        "evaluate_sid": 4,
    }  # fmt: skip
    assert [p.run_id.rsplit("-", 1)[0] for p in plan.points] == [
        "world-loo-cf-popularity-s0", "world-loo-cf-bayes-optimal-s0",
        "world-loo-sid-xs-s0", "world-loo-sid-xs-s1", "world-loo-sid-s-s0", "world-loo-sid-s-s1",
    ]  # fmt: skip


def test_chains_are_whole_disjoint_and_free_of_deadlock(study_file: Path) -> None:
    plan = planned(study_file, "protocols=[leave-one-out, temporal]")
    chains = plan.chains()
    assert sorted(n for c in chains for n in c.nodes) == sorted(plan.nodes)
    assert max(len(c.nodes) for c in chains) >= 3  # encoder, encode, quantize
    done: set[str] = set()
    while ready := [c for c in chains if c.needs <= done and not set(c.nodes) <= done]:
        done |= {n for c in ready for n in c.nodes}
    assert done == set(plan.nodes)


def test_a_seed_or_rung_more_adds_only_its_own_nodes(study_file: Path) -> None:
    before = planned(study_file)
    after = planned(study_file, "seeds=[0, 1, 2]")
    assert set(before.nodes) <= set(after.nodes)
    assert sorted(after.nodes[n].stage for n in set(after.nodes) - set(before.nodes)) == ["evaluate_sid"] * 2 + ["train_sid"] * 2


def test_placement_is_no_part_of_the_identity_but_processes_are(study_file: Path) -> None:
    before = planned(study_file)
    threads = planned(study_file, "sid.ladder[0].launch.threads=2", "resources.gpus_per_process=1")
    assert set(threads.nodes) == set(before.nodes)
    processes = planned(study_file, "sid.ladder[0].launch.processes=2")
    changed = [n for n in processes.nodes.values() if n.id not in before.nodes]
    assert Counter(n.stage for n in changed) == {"train_sid": 2, "evaluate_sid": 2}
    assert {(n.stage, n.processes, n.threads) for n in changed} == {("train_sid", 2, 1), ("evaluate_sid", 1, 2)}


def test_an_evaluation_is_launched_as_the_study_says(study_file: Path) -> None:
    before = planned(study_file)
    shared = planned(study_file, "sid.evaluate={launch: {processes: 2, threads: 3}}")
    changed = [n for n in shared.nodes.values() if n.id not in before.nodes]
    assert len(changed) == 4 and {(n.stage, n.processes, n.threads) for n in changed} == {("evaluate_sid", 2, 3)}
    assert set(planned(study_file, "sid.evaluate={launch: {threads: 2}}").nodes) == set(before.nodes)
    with pytest.raises(UserError, match="zero"):
        planned(study_file, "sid.evaluate={launch: {zero: 2}}")


def test_other_beam_widths_are_evaluations_of_the_same_models_beside_the_points(study_file: Path, tmp_path: Path) -> None:
    study_file.write_text(study_file.read_text() + LLM)
    before = planned(study_file)
    wide = "sid.evaluate={widths: [10, 50]}", "llm.evaluate={widths: [50], length: mean}"
    after, titles = planned(study_file, *wide), planned(study_file, wide[1].replace("widths: [50], ", ""))
    assert [p.run_id for p in after.points] == [p.run_id for p in titles.points], "a row stays what it was"
    assert set(titles.nodes) < set(after.nodes)
    added = [n for n in after.nodes.values() if n.id not in titles.nodes]
    assert Counter((n.stage, n.config["beams"]) for n in added) == {
        ("evaluate_sid", 10): 4, ("evaluate_sid", 50): 4, ("evaluate_llm", 50): 2,
    }  # fmt: skip
    points = {p.run_id: p for p in after.points}
    of, chains = after.points_of(), {c.nodes: c.needs for c in after.chains()}
    for node in added:
        (point,) = (points[name] for name in of[node.id])
        main = after.nodes[point.nodes[-1]]
        assert node.inputs == main.inputs and {**node.config, "beams": 20} == main.config and node.id in point.widths
        assert node not in after.upstream(point), "a point is measured without them"
        assert chains[(node.id,)] == set(node.inputs.values()), "and none waits for the point's own evaluation"
    sid = [p for p in after.points if p.paradigm == "sid"]
    assert set(after.part([], sid).nodes) == {n for n in after.nodes if any(p.paradigm == "sid" for p in map(points.get, of[n]))}
    store = Store(tmp_path / "out")
    store.prepare(after, load_study(study_file, wide).raw)
    assert open_store(store.folder)[1].points == after.points
    document = json.loads((store.folder / "plan.json").read_text())
    for entry in document["points"]:
        del entry["widths"]  # a folder from before there were any
    (store.folder / "plan.json").write_text(json.dumps(document))
    assert open_store(store.folder)[1].points == [replace(p, widths=()) for p in after.points]
    assert before.points[2] == titles.points[2] != after.points[2]


def test_a_job_array_evaluates_a_points_widths_after_it(study_file: Path) -> None:
    plan = planned(study_file, "sid.evaluate={widths: [10, 50]}")
    tasks = [task_nodes(plan, number) for number in range(len(plan.points) + 1)]
    assert sorted(n.id for task in tasks for n in task) == sorted(plan.nodes)
    beams = [[(n.stage, n.config.get("beams")) for n in task] for task, p in zip(tasks[1:], plan.points, strict=True) if p.widths]
    assert beams == [[("train_sid", None), ("evaluate_sid", 20), ("evaluate_sid", 10), ("evaluate_sid", 50)]] * 4


def test_what_ranks_titles_is_part_of_the_identity_where_it_is_not_the_sum(study_file: Path) -> None:
    study_file.write_text(study_file.read_text() + LLM)
    before, said = planned(study_file), planned(study_file, "llm.evaluate={length: sum}")
    assert set(before.nodes) == set(said.nodes)
    changed = [n for n in planned(study_file, "llm.evaluate={length: mean}").nodes.values() if n.id not in before.nodes]
    assert {n.stage for n in changed} == {"evaluate_llm"} and all(n.config["length"] == "mean" for n in changed)


def test_learning_rates_say_how_they_were_chosen(study_file: Path) -> None:
    plan = planned(study_file, "sid.ladder[1].lr=0.25")
    rates = {
        n.config["size"]["d_model"]: (n.config["optimizer"]["lr"], n.config["optimizer"]["lr_choice"])
        for n in plan.nodes.values()
        if n.stage == "train_sid"
    }
    assert rates == {16: (0.02, "scaled by 1/width from d_model 32, not swept"), 32: (0.25, "stated for this rung")}


def write_dataset(path: Path, length: int) -> None:
    with DatasetWriter(path, "x", {}, [Item(f"i{i}", f"title {i}") for i in range(9)]) as writer:
        for user in range(5):
            writer.add(User(f"u{user}", list(range(length)), [None] * length))


def test_a_dataset_counts_by_content_not_by_place(study_file: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_dataset(tmp_path / "c", 7)
    plans = [planned(study_file, f"datasets.world={{path: {tmp_path / name}}}") for name in "abc"]
    assert set(plans[0].nodes) == set(plans[1].nodes)
    assert not set(plans[0].nodes) & set(plans[2].nodes)
    assert "bayes-optimal" not in {p.model for p in plans[0].points}


def test_a_missing_dataset_is_named_with_its_line(study_file: Path, tmp_path: Path) -> None:
    study_file.write_text(
        study_file.read_text().replace(
            "{planted: {users: 50, items: 40, topics: 3, communities: 3, subtopics: 3}}", f"{{path: {tmp_path}/no}}"
        )
    )
    with pytest.raises(UserError, match=r"study.yaml:4: datasets.world.path: .*no: not a dataset folder"):
        planned(study_file)


def test_points_are_found_by_how_they_begin(study_file: Path) -> None:
    plan = planned(study_file)
    assert nearest_point(plan, "world-loo-sid-xs-s1").seed == 1
    with pytest.raises(UserError, match="2 points begin with it"):
        nearest_point(plan, "world-loo-sid-xs")
    with pytest.raises(UserError, match="nearest: world-loo-sid-xs-s"):
        nearest_point(plan, "world-loo-sid-xz-s0")


@pytest.mark.parametrize(
    ("study", "job", "resolved"),
    [
        (SidTrain, TrainSidConfig, {"size", "seed"}),
        (LlmTrain, TrainLlmConfig, {"model", "seed"}),
        (Pretrain, PretrainLlmConfig, {"size", "seed"}),
        (EncoderSpec, EncodeConfig, set()),
        (FreshEncoder, TrainEncoderConfig, {"size", "seed"}),
        (Beams, EvaluateSidConfig, {"which", "users"}),
        (TitleBeams, EvaluateLlmConfig, {"which", "users"}),
        (Evaluate, BaselineConfig, {"method"}),
        (Evaluate, EvaluateSidConfig, {"beams", "batch"}),
    ],
)
def test_a_study_can_say_what_its_jobs_can_be_told(study: type[Config], job: type[Config], resolved: set[str]) -> None:
    """``resolved``: what the plan fills in for each rung."""
    shared = set(job.model_fields) - resolved
    assert shared <= set(study.model_fields)
    defaults = [{name: model.model_fields[name].get_default() for name in shared} for model in (study, job)]
    assert defaults[0] == defaults[1]


def test_a_local_models_weights_count_whatever_their_size(study_file: Path, tmp_path: Path) -> None:
    """Two files of one size that differ in their last byte, the second as young as the first."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = model / "model.safetensors"
    weights.touch()
    os.truncate(weights, 65 << 20)  # sparse: no disk is used
    encoder = f"sid.encoders.small={{model: {model}}}"
    before = planned(study_file, encoder)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    after = planned(study_file, encoder)
    changed = {before.nodes[id].stage for id in set(before.nodes) - set(after.nodes)}
    assert changed == {"encode", "quantize", "train_sid", "evaluate_sid"}


def test_weights_are_read_once_however_many_rungs_ask(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(plans, "sha256", lambda path: read.append(path) or "0")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    planned(study_file, f"sid.encoders.small={{model: {tmp_path / 'model'}}}")
    assert read == [tmp_path / "model" / "model.safetensors"]


def test_a_diamond_is_no_deadlock(study_file: Path) -> None:
    """b needs d and x, which both need a: a chain a-d-b would wait for x, and x for a."""
    plan = Plan(load_study(study_file).study)
    inputs = {"a": {}, "d": {"1": "a"}, "x": {"1": "a"}, "b": {"1": "d", "2": "x"}}
    plan.nodes = {id: Node(id, "quantize", {}, i) for id, i in inputs.items()}
    plan.points = [Point("p", "", "", "cf", "", 0, ("b",))]
    chains = {chain.nodes: chain.needs for chain in plan.chains()}
    assert chains == {("a", "d"): set(), ("x",): {"a"}, ("b",): {"d", "x"}}


def test_each_seed_has_a_backbone_of_its_own(study_file: Path) -> None:
    """Seeds that shared one would vary less than the rungs do, and a verdict would look surer than it is."""
    study_file.write_text(study_file.read_text() + LLM)
    plan = make_plan(load_study(study_file, ["seeds=[0, 1, 2]"]))
    backbones = [node for node in plan.nodes.values() if node.stage == "pretrain_llm"]
    assert [node.config["seed"] for node in backbones] == [0, 1, 2]
    assert len([node for node in plan.nodes.values() if node.stage == "encode"]) == 1
    for point in plan.points:
        if point.paradigm == "llm":
            (backbone,) = [node for node in plan.upstream(point) if node.stage == "pretrain_llm"]
            assert backbone.config["seed"] == point.seed
