import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.identity import canonical, identity
from cluster.plan import make_plan
from cluster.study import load_study
from jobs.config import STAGES
from tests.cluster.test_measure import LLM

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_golden() -> None:
    """Hashes must not drift: a drift throws every finished artifact away."""
    assert identity("prepare", 1, {"protocol": {"kind": "leave-one-out"}}, {"dataset": "abc"}, 1) == "34340e0a6a99d773"
    assert identity("plant", 2, {"a": [1, 2.5, None, "é"]}, {}, 4) == "746d9c1dfdb97830"


def test_golden_study(study_file: Path) -> None:
    """One identity of each stage. It fails too when a stage's configuration grows a key: change it then on purpose."""
    study_file.write_text(study_file.read_text() + LLM)
    plan = make_plan(load_study(study_file, ["seeds=[0]"]))
    first = {node.stage: node.id for node in reversed(plan.nodes.values())}
    assert first == {
        "plant": "014c44764a12c694",
        "prepare": "551a1591e2a47b52",
        "train_encoder": "67110620b542985c",
        "encode": "72208fd0b6226045",
        "quantize": "53acc18511294049",
        "train_sid": "0d035c1896ad9b42",
        "evaluate_sid": "8824e312e3128b73",
        "pretrain_llm": "560dc3fd17da337b",
        "train_llm": "e737c6dd31bedfae",
        "evaluate_llm": "7333a1b2c6b5b2f4",
        "baseline": "1b4ebb3812c06986",
    }
    assert set(first) == set(STAGES)


def test_words_about_the_learning_rate_do_not_count(study_file: Path) -> None:
    """A rate that is scaled and the same rate stated are the same run."""
    scaled = make_plan(load_study(study_file))
    stated = make_plan(load_study(study_file, ["sid.ladder[0].lr=0.02", "sid.train.optimizer.lr_choice=swept"]))
    assert set(scaled.nodes) == set(stated.nodes)
    words = [{n.config["optimizer"]["lr_choice"] for n in p.nodes.values() if n.stage == "train_sid"} for p in (scaled, stated)]
    assert words[0] != words[1]
    assert set(scaled.nodes) != set(make_plan(load_study(study_file, ["sid.ladder[0].lr=0.021"])).nodes)


@given(st.dictionaries(st.text(), VALUES))
def test_order_of_keys_and_tuples_do_not_matter(config: dict[str, object]) -> None:
    turned = {key: tuple(value) if isinstance(value, list) else value for key, value in reversed(config.items())}
    assert identity("s", 1, config, {}, 1) == identity("s", 1, turned, {}, 1)


def test_everything_that_counts_is_in() -> None:
    base = ("s", 1, {"lr": 0.1}, {"split": "a"}, 1)
    others = [
        ("t", *base[1:]),
        ("s", 2, *base[2:]),
        ("s", 1, {"lr": 0.2}, *base[3:]),
        (*base[:3], {"split": "b"}, 1),
        (*base[:3], {"spilt": "a"}, 1),
        (*base[:4], 2),
    ]
    assert len({identity(*arguments) for arguments in [base, *others]}) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("x"), len, {1: 2}, {1, 2}, b"x"])
def test_raises_on_what_has_no_single_spelling(value: object) -> None:
    with pytest.raises(TypeError, match="deep"):
        canonical({"deep": [value]})
