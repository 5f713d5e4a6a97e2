"""Weights from replicates: they help where sizes differ in noise, and cost little where they do not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fit import FitError, fit_law
from fit.laws import law_named
from fit.problem import Problem
from fit.replicates import replicate_weights
from fit.solve import solve, solve_tables
from fit.uncertainty import Design

LADDER = np.geomspace(3e5, 3e8, 6)
CURVES = {
    "ceiling": 0.1 - 0.06 * (LADDER / 3e5) ** -0.3,
    "log-linear": 0.04 + 0.004 * np.log2(LADDER / 3e5),
}
NR = {"N": "N", "R": "R"}


def _errors(law, sd, seeds=3, data_sets=300, rows=slice(None)):
    """Root mean square error of the fitted curve at some rows, with weights from the replicates over without."""
    rng = np.random.default_rng([*law.encode(), seeds])
    mean, sd = np.repeat(CURVES[law], seeds), np.repeat(sd, seeds)
    y = mean + sd * rng.normal(size=(data_sets, len(mean)))
    design = Design(np.repeat(np.arange(len(LADDER)), seeds))
    found = []
    for weights in (np.ones((1, len(mean))), np.array([replicate_weights(row, design, log=False) for row in y])):
        problem = Problem(law_named(law), {"N": np.log(np.repeat(LADDER, seeds))}, y, weights, "least-squares", np.inf)
        start = solve(problem.take(np.zeros(1, dtype=np.intp))).p
        off = problem.fitted(solve_tables(problem, start)) - mean
        found.append(np.sqrt(np.mean(off[:, rows] ** 2)))
    return found[1] / found[0]


@pytest.mark.parametrize("law", CURVES)
def test_noise_of_one_size_costs_under_five_per_cent(law):
    assert _errors(law, np.full(6, 0.001)) < 1.05


@pytest.mark.parametrize("law", CURVES)
def test_sizes_that_differ_in_noise_are_fitted_better(law):
    assert _errors(law, np.where(np.arange(6) == 5, 0.005, 0.001)) < 0.8  # the largest runs are few and short
    assert _errors(law, np.where(np.arange(6) % 2, 0.003, 0.001)) < 0.95  # no trend at all
    assert _errors(law, 0.003 * (LADDER / 3e5) ** -0.3, rows=slice(-1, None)) < 0.85  # at the largest, which is known best


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), unit=st.floats(1e-6, 1e6), log=st.booleans(), runs=st.integers(2, 5))
def test_weights_do_not_depend_on_units_or_order(seed, unit, log, runs):
    rng = np.random.default_rng(seed)
    rung = np.repeat(np.arange(5), runs)
    y = (1 + rung) * np.exp(0.05 * rng.normal(size=len(rung)) * rng.uniform(0.2, 3, size=5)[rung])
    weights = replicate_weights(y, Design(rung), log)
    assert (weights > 0).all() and weights.mean() == pytest.approx(1)
    assert all(np.ptp(weights[rung == r]) == 0 for r in range(5))
    assert replicate_weights(unit * y, Design(rung), log) == pytest.approx(weights, rel=1e-6)
    order = rng.permutation(len(y))
    assert replicate_weights(y[order], Design(rung[order]), log) == pytest.approx(weights[order], rel=1e-9)


def test_two_runs_that_agree_do_not_rule_the_fit():
    y = np.array([1.0, 1.02, 1.1, 1.07, 1.2, 1.2])  # the last two are equal: the raw reciprocal variance is infinite
    weights = replicate_weights(y, Design(np.repeat(np.arange(3), 2)), log=True)
    assert weights[4] == weights.max() and weights.max() < 5 * weights.min()


def test_many_runs_come_near_their_own_variance():
    rng = np.random.default_rng(0)
    y = 1 + np.concatenate([0.01 * rng.normal(size=200), 0.04 * rng.normal(size=200)])
    weights = replicate_weights(y, Design(np.repeat(np.arange(2), 200)), log=False)
    raw = np.var(y[200:], ddof=1) / np.var(y[:200], ddof=1)
    assert weights[0] / weights[200] == pytest.approx(raw, rel=0.05)


def test_a_size_with_one_run_has_the_others_common_weight():
    y = np.array([1.0, 1.01, 1.1, 1.09, 1.2])
    weights = replicate_weights(y, Design(np.array([0, 0, 1, 1, 2])), log=True)
    assert weights.min() <= weights[4] <= weights.max()


def test_the_fit_takes_them_by_name():
    rng = np.random.default_rng(1)
    N = np.repeat(LADDER, 3)
    R = np.repeat(CURVES["ceiling"], 3) + np.repeat(np.linspace(1e-3, 4e-3, 6), 3) * rng.normal(size=18)
    w = replicate_weights(R, Design(np.repeat(np.arange(6), 3)), log=False)
    named = fit_law({"N": N, "R": R}, "ceiling", NR, loss="least-squares", weights="replicates")
    given_ = fit_law({"N": N, "R": R, "w": w}, "ceiling", NR, loss="least-squares", weights="w")
    assert named.params == pytest.approx(given_.params, rel=1e-9)
    plain = fit_law({"N": N, "R": R}, "ceiling", NR, loss="least-squares")
    assert named.params["R0"] != pytest.approx(plain.params["R0"], rel=1e-6)


def test_mistakes():
    R = CURVES["ceiling"]
    with pytest.raises(FitError, match="needs two or more runs of a size; every size has one row only"):
        fit_law({"N": LADDER, "R": R}, "ceiling", NR, weights="replicates")
    twice = {"N": np.tile(LADDER, 2), "R": np.tile(R, 2)}
    with pytest.raises(FitError, match="agree exactly"):
        fit_law(twice, "ceiling", NR, weights="replicates")
    with pytest.raises(FitError, match="the table has a column of that name; rename it"):
        fit_law({**twice, "replicates": np.ones(12)}, "ceiling", NR, weights="replicates")
    with pytest.raises(FitError, match="has no logarithm"):
        fit_law({"N": twice["N"], "R": [-0.01, *twice["R"][1:]]}, "ceiling", NR, weights="replicates")
