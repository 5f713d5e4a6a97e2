"""The learning rate over a training, and its early end."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.options import Optimizer
from jobs.trainer import DECAY, LEAST_LR, learning_rate
from tests.conftest import Jobs

CONFIG = {"size": {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32}, "vocab": 300}
OPTIMIZER = {"steps": 60, "global_batch": 16, "lr": 0.5, "validations": 30}


@given(steps=st.integers(40, 5000), warmup=st.floats(0, 0.5), lr=st.floats(1e-6, 1))
def test_wsd_warms_up_stays_and_decays(steps: int, warmup: float, lr: float) -> None:
    wsd = Optimizer(steps=steps, lr=lr, warmup=warmup, schedule="wsd")
    rates = [learning_rate(wsd, step) for step in range(steps)]
    warm, decay = max(1, round(warmup * steps)), round(DECAY * steps)
    assert rates[:warm] == pytest.approx([lr * (i + 1) / warm for i in range(warm)])
    assert set(rates[warm : steps - decay]) == {lr}
    tail = rates[steps - decay :]
    assert tail == sorted(tail, reverse=True)
    assert [b / a for a, b in itertools.pairwise(tail)] == pytest.approx([LEAST_LR ** (1 / decay)] * (decay - 1))
    assert learning_rate(wsd, steps) == pytest.approx(LEAST_LR * lr), "where a next step would be"


@given(steps=st.integers(10, 5000))
def test_the_default_stays_a_cosine(steps: int) -> None:
    rates = [learning_rate(Optimizer(steps=steps, lr=1.0), step) for step in range(steps + 1)]
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(LEAST_LR)
    assert Optimizer(steps=steps, lr=1.0).model_dump().keys().isdisjoint({"schedule", "patience"}), "no part of old identities"
    assert Optimizer(steps=steps, lr=1.0, schedule="wsd", patience=2).model_dump()["patience"] == 2


def test_patience_ends_a_training_that_no_longer_improves(jobs: Jobs, split: str) -> None:
    """At so high a rate the loss soon rises; up to its end the run is the one without patience."""
    whole = jobs.run("pretrain_llm", "patient", CONFIG | {"optimizer": OPTIMIZER}, split=split).facts
    ended = jobs.run("pretrain_llm", "impatient", CONFIG | {"optimizer": OPTIMIZER | {"patience": 3}}, split=split)
    facts = ended.facts
    assert (whole["steps"], whole["stopped_early"], facts["stopped_early"]) == (60, False, True)
    assert facts["steps"] < 60 and facts["validations"] == whole["validations"][: len(facts["validations"])]
    losses = [loss for _, loss in facts["validations"]]
    assert losses.index(min(losses)) == len(losses) - 4, "three validations without a new least loss"
    assert facts["best_step"] == facts["steps"] - 6 and ended.rows[-1] == {
        "event": "stopped early",
        "step": facts["steps"],
        "steps": 60,
    }
