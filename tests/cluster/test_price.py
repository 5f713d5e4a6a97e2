from pathlib import Path

import pytest

from cluster import cost
from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.price import price as price_plan
from cluster.price import price_node, table
from cluster.study import load_study


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


def test_the_table_has_a_line_per_rung(plan: Plan) -> None:
    found = table(plan, price_plan(plan, None), slots=2)
    assert found.row_count == 11
    assert [*found.columns[0].cells][3:6] == ["encode", "quantize", "train_sid sid xs"]
