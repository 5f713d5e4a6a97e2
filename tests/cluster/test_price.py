from pathlib import Path

import pytest

from cluster import cost
from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.price import price as price_plan
from cluster.price import price_node, table
from cluster.schedule import need
from cluster.study import BUILTIN, load_study
from tests.cluster.conftest import LLM


@pytest.fixture
def plan(study_file: Path) -> Plan:
    return make_plan(load_study(study_file, ["sid.quantizers.rk={levels: 3, width: 256}"]))


def test_parameters_are_those_of_the_module(plan: Plan) -> None:
    """Counted by hand for one layer, d 16, one head of 16, d_ff 32, with a vocabulary of 1 + 3 x 256 + 1."""
    node = next(n for n in plan.nodes.values() if n.stage == "train_sid" and n.config["size"]["d_model"] == 16)
    attention, feed_forward, buckets = 4 * 16 * 16, 2 * 16 * 32, 32 * 1
    norms = 16 * ((2 + 1) + (3 + 1))
    layers = 3 * attention + 2 * feed_forward + 2 * buckets + norms
    price = price_node(plan, node, done=False)
    assert price.n_non_embedding == layers
    assert price.n_parameters == layers + 770 * 16
    assert price.bytes > price.n_parameters * 16 and price.seconds > 0


def test_parameters_and_flops_of_the_decoder_only_architecture(study_file: Path) -> None:
    """By hand for one layer, d 16, one head of 16, d_ff 32: attention with its two norms of a head, SwiGLU, and three norms."""
    plan = make_plan(load_study(study_file, ["sid.train.architecture=decoder-only"]))
    node = next(n for n in plan.nodes.values() if n.stage == "train_sid" and n.config["size"]["d_model"] == 16)
    price = price_node(plan, node, done=False)
    assert price.n_non_embedding == 4 * 16 * 16 + 2 * 16 + 3 * 16 * 32 + 3 * 16
    assert price.flops == 6 * price.n_non_embedding * cost.tokens(plan, node, cost.facts_of(plan, node))


def test_a_rung_of_more_steps_costs_more(study_file: Path) -> None:
    def flops(*overrides: str) -> float:
        plan = make_plan(load_study(study_file, overrides))
        return float(price_plan(plan, None)["flops"])

    assert flops("sid.train.optimizer.steps=4000") > 10 * flops()


def test_a_wider_search_costs_more_and_has_a_line_of_its_own(study_file: Path) -> None:
    plan = make_plan(load_study(study_file, ["sid.evaluate={widths: [200]}"]))
    of = {plan.beams(n.id): price_node(plan, n, done=False) for n in plan.nodes.values() if n.stage == "evaluate_sid"}
    assert of[200].flops > 5 * of[20].flops
    found = table(plan, price_plan(plan, None), slots=2)
    assert "evaluate_sid sid s, 200 beams" in [*found.columns[0].cells] and found.row_count == 13


def test_a_backbone_that_is_trained_whole_costs_more_than_adapters(study_file: Path) -> None:
    study_file.write_text(study_file.read_text() + LLM)
    adapters, whole = (
        next(price_node(plan, n, done=False) for n in plan.nodes.values() if n.stage == "train_llm")
        for plan in (make_plan(load_study(study_file, more)) for more in ([], ["llm.train.tune=full", "llm.train.lora=null"]))
    )
    assert whole.flops == pytest.approx(6 / 4 * adapters.flops)
    assert whole.bytes - adapters.bytes == 12 * adapters.n_parameters, "gradients and Adam's moments, of 4 bytes each"


def test_the_study_for_a_gpu_is_priced_and_small_rungs_share_the_gpu() -> None:
    beauty = "datasets.beauty={planted: {users: 22363, items: 12101, mean_length: 9}}"
    plan = make_plan(load_study(BUILTIN.with_name("beauty-gpu.yaml"), [beauty, "seeds=[0]"]), priced=True)
    document = price_plan(plan, None)
    trained = {p.model: plan.nodes[p.nodes[0]] for p in plan.points if p.paradigm != "cf"}
    counted = {e["id"]: e["price"]["n_parameters"] for e in document["nodes"]}
    for name, size in {"1m": 1e6, "3m": 3e6, "10m": 1e7, "30m": 3e7, "100m": 1e8, "300m": 3e8}.items():
        assert counted[trained[name].id] == pytest.approx(size, rel=0.16)
    sid = [counted[trained[name].id] for name in ("336k", "778k", "1.9m", "3.3m", "6.7m", "13m", "21m", "43m")]
    assert sid == sorted(sid) and sid[0] > 3e5 and sid[-1] > 2e7
    assert all(node.launch == {"precision": "bf16"} and node.gpus == 1 for node in trained.values())
    shares = {name: need(plan, node).gpus for name, node in trained.items()}
    assert shares["336k"] == shares["1m"] == 0.125 and shares["300m"] > 0.125
    assert document["seconds"] > 3600 and len(document["pending"]) == 14


def test_the_gpu_benchmark_has_the_sizes_of_that_study() -> None:
    from tests.benchmarks import gpu_llm, gpu_sid

    study = load_study(BUILTIN.with_name("beauty-gpu.yaml")).study
    assert study.sid and study.llm
    sid = {rung.name: (rung.layers, rung.d_model, rung.heads, rung.d_ff) for rung in study.sid.ladder}
    assert sid == {name.lower(): size for name, size in list(gpu_sid.LADDER.items())[:8]}
    assert {rung.name: (rung.layers, rung.d_model, rung.heads, rung.d_ff) for rung in study.llm.ladder} == {
        name.lower(): size for name, size in gpu_llm.LADDER.items()
    }


def test_the_table_has_a_line_per_rung(plan: Plan) -> None:
    found = table(plan, price_plan(plan, None), slots=2)
    assert found.row_count == 11
    assert [*found.columns[0].cells][3:6] == ["encode", "quantize", "train_sid sid xs"]
