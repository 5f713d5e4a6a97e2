"""A study that says what its SID recommenders read and are trained on: identities, prices, mistakes."""

from pathlib import Path

import pytest

from cluster import cost
from cluster.graph import Plan
from cluster.plan import make_plan
from cluster.price import price_node
from cluster.study import load_study
from gr.errors import UserError

OPTIONS = {
    "user_tokens": "2000",
    "separator": "true",
    "item_position": "true",
    "rows": "last",
}


def planned(study_file: Path, *overrides: str) -> Plan:
    return make_plan(load_study(study_file, ["seeds=[0]", *overrides]))


def trained(plan: Plan) -> set[str]:
    return {node.id for node in plan.nodes.values() if node.stage == "train_sid"}


def test_each_option_is_another_training_and_none_is_what_it_was(study_file: Path) -> None:
    plain = trained(planned(study_file))
    spelled = ["user_tokens=0", "separator=false", "item_position=false", "rows=prefixes"]
    assert trained(planned(study_file, *(f"sid.train.{words}" for words in spelled))) == plain
    others = [trained(planned(study_file, f"sid.train.{key}={value}")) for key, value in OPTIONS.items()]
    assert len(plain.union(*others)) == 2 * (1 + len(OPTIONS)), "two rungs of each"


@pytest.mark.parametrize(("architecture", "places"), [("encoder-decoder", 20), ("decoder-only", 21)])
def test_the_price_has_the_tables_and_the_tokens(study_file: Path, architecture: str, places: int) -> None:
    """A history is priced with as many items as the data has per user."""
    given = [f"sid.train.{key}={value}" for key, value in OPTIONS.items()]
    plans = [planned(study_file, f"sid.train.architecture={architecture}", *more) for more in ([], given)]
    for name in ("train_sid", "evaluate_sid"):
        plain, full = ([n for n in plan.nodes.values() if n.stage == name] for plan in plans)
        prices = [[price_node(plan, n, done=False) for n in nodes] for plan, nodes in zip(plans, (plain, full), strict=True)]
        for before, after, d_model in zip(*prices, (16, 32), strict=True):
            assert after.n_parameters - before.n_parameters == (2000 + 1 + places) * d_model
            assert after.n_non_embedding == before.n_non_embedding
        plain_tokens, tokens = (
            cost.tokens(plan, n, cost.facts_of(plan, n)) for plan, (n, *_) in zip(plans, (plain, full), strict=True)
        )
        history = cost.facts_of(plans[0], plain[0]).interactions // 50
        units = 4 * 8 if name == "train_sid" else 50
        assert tokens - plain_tokens == units * (1 + min(20, history)), "the user's token, and a separator for each item"


def test_all_sub_sequences_of_a_decoder_are_refused(study_file: Path) -> None:
    given = ["sid.train.architecture=decoder-only", "sid.train.rows=subsequences"]
    with pytest.raises(
        UserError, match=r"sid\.train: rows: subsequences is for architecture: encoder-decoder; .*item already"
    ) as e:
        planned(study_file, *given)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"'suffixes' is not one of last, prefixes, subsequences"):
        planned(study_file, "sid.train.rows=suffixes")
