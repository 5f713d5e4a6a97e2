"""The learning rate over a training, and its early end."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

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
    plain = Optimizer(steps=steps, lr=1.0).model_dump()
    assert plain.keys().isdisjoint({"schedule", "patience", "keep"}), "no part of old identities"
    assert Optimizer(steps=steps, lr=1.0, schedule="wsd", patience=2).model_dump()["patience"] == 2


def test_the_last_weights_are_kept_on_request(jobs: Jobs, split: str) -> None:
    """At so high a rate the least loss is not the last."""
    best = jobs.run("pretrain_llm", "best", CONFIG | {"optimizer": OPTIMIZER}, split=split)
    last = jobs.run("pretrain_llm", "last", CONFIG | {"optimizer": OPTIMIZER | {"keep": "last"}}, split=split)
    assert last.facts["validations"] == best.facts["validations"], "nothing else is another"
    assert last.facts["best_step"] == last.facts["steps"] == 60 > best.facts["best_step"]
    assert last.facts["loss_val"] == last.facts["validations"][-1][1] > best.facts["loss_val"]
    weights = [load_file(run.out / "model.safetensors") for run in (best, last)]
    assert any(not torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_patience_and_the_last_weights_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="patience ends a run where its best weights lie behind it"):
        Optimizer(steps=10, lr=1.0, patience=2, keep="last")


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
