"""The linearised design against closed forms and against simulation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fit import FitError, fit_law
from fit.experiment import next_experiment
from fit.laws import LAWS
from fit.problem import Problem
from fit.solve import solve_tables

LADDER = np.geomspace(3e5, 3e8, 6)
N = np.repeat(LADDER, 3)
COLUMNS = {"N": "N", "R": "R"}
OFFERED = {"N": np.array([3e5, 1e7, 3e8, 3e9]), "cost": np.array([1.0, 30.0, 900.0, 9000.0])}


def straight(noise=5e-4, seed=0):
    return {"N": N, "R": 0.02 + 0.004 * np.log2(N / 3e5) + noise * np.random.default_rng(seed).normal(size=len(N))}


def test_a_lines_errors_are_the_textbooks():
    """Var of the mean at x: s^2 (1/n + (x - mean)^2/Sxx), with s of the replicates."""
    table = straight()
    result = next_experiment(table, "log-linear", COLUMNS, OFFERED, {"N": 1e10}, loss="least-squares", runs=2)
    s = np.sqrt(np.sum((table["R"].reshape(6, 3) - table["R"].reshape(6, 3).mean(1, keepdims=True)) ** 2) / 12)

    def error(x):
        return s * np.sqrt(1 / len(x) + (np.log2(1e10) - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))

    x = np.log2(N)
    for row in result.rows:
        assert row.before == pytest.approx(error(x), rel=1e-6)
        assert row.after == pytest.approx(error(np.append(x, [np.log2(row.sizes["N"])] * 2)), rel=1e-6)
        assert row.shrinks == pytest.approx(1 - row.after / row.before, rel=1e-6)
        assert row.per_cost == pytest.approx(row.shrinks / row.cost)
    assert [row.cost for row in result.rows] == [2.0, 60.0, 1800.0, 18000.0]
    assert result.rows[3].shrinks == max(row.shrinks for row in result.rows)  # the farthest point teaches most
    assert result.best == max(result.rows, key=lambda row: row.per_cost) and result.best.sizes["N"] == 3e5
    assert sum(row.support for row in result.rows) == pytest.approx(1) and result.best.support == 1.0
    assert [row.distance for row in result.rows] == pytest.approx([0, 0, 0, 1 / 3], abs=1e-6)


def test_the_slope_of_the_verdict():
    """Over the top four sizes, and a new largest size drops the smallest of them."""
    result = next_experiment(straight(), "log-linear", COLUMNS, OFFERED, "slope", loss="least-squares")
    top = np.repeat(np.log2(LADDER[-4:]), 3)
    spread = np.sum((top - top.mean()) ** 2)
    far = np.append(top[3:], np.log2(3e9))
    small, middle, largest, beyond = result.rows
    assert small.shrinks == pytest.approx(0, abs=1e-12)
    for row, x in ((middle, np.append(top, np.log2(1e7))), (largest, np.append(top, np.log2(3e8))), (beyond, far)):
        assert 1 - row.shrinks == pytest.approx(np.sqrt(spread / np.sum((x - x.mean()) ** 2)), rel=1e-6)
    assert result.target == "slope"


@pytest.mark.parametrize("loss", ["least-squares", "log-huber"])
def test_what_is_promised_is_what_simulated_runs_give(loss):
    """A ceiling, 400 simulated tables refitted with each candidate's runs added: the error falls as promised."""
    target, log, sd = 3e9, loss == "log-huber", 3e-4
    base, more = sd * np.random.default_rng(0).normal(size=(400, 18)), sd * np.random.default_rng(1).normal(size=(400, 3))

    def curve(sizes):
        return 0.1 - 0.06 * (sizes / 3e5) ** -0.4

    def noisy(sizes, luck):
        return curve(sizes) * np.exp(luck / 0.08) if log else curve(sizes) + luck

    def spread(sizes, luck):
        problem = Problem(LAWS["ceiling"], {"N": np.log(sizes)}, noisy(sizes, luck), np.ones((1, len(sizes))), loss, np.inf)
        middle = problem.refs["N"][0]
        p = solve_tables(problem, np.array([0.1, 0.1 - curve(np.exp(middle)), 0.4]))
        return np.std(p[:, 0] - p[:, 1] * np.exp(-p[:, 2] * (np.log(target) - middle)))

    offered = {"N": [3e5, 3e8, 3e9]}
    kwargs = {"loss": loss} | ({"delta": 10.0} if log else {})
    table = {"N": N, "R": noisy(N, base[0])}
    result = next_experiment(table, "ceiling", COLUMNS, offered, {"N": target}, runs=3, bootstrap=50, **kwargs)
    now = spread(N, base)
    assert result.rows[0].before == pytest.approx(now, rel=0.4)  # by this one table's own noise and exponent
    for row, size in zip(result.rows, offered["N"], strict=True):
        measured = spread(np.append(N, [size] * 3), np.concatenate([base, more], axis=1)) / now
        assert row.after / row.before == pytest.approx(measured, abs=0.05)
    assert [r.shrinks for r in result.rows] == sorted(r.shrinks for r in result.rows)


def test_a_size_that_never_moved_is_what_to_move():
    """All runs have the same D: only a run at another D says what another D would give."""
    n, d = np.repeat(np.geomspace(1e6, 1e9, 8), 2), np.full(16, 1e9)
    L = (1.7 + 400 / n**0.34 + 1500 / d**0.37) * np.exp(0.002 * np.random.default_rng(0).normal(size=16))
    columns, offered = {"N": "N", "D": "D", "L": "L"}, {"N": [1e9, 1e8], "D": [1e9, 1e11]}
    result = next_experiment({"N": n, "D": d, "L": L}, "chinchilla", columns, offered, {"N": 1e9, "D": 1e11}, bootstrap=0)
    same, moved = result.rows
    assert moved.shrinks > 0.5 > 0.1 > same.shrinks
    assert result.best == moved and [w for w in result.warnings if w.startswith("unidentified")]
    json.dumps(result.to_json(), allow_nan=False)


def test_a_parameter_at_a_bound_is_no_certainty():
    """A floor of zero: the error is above that of the power law without one."""
    luck = 1e-3 * np.random.default_rng(1).normal(size=len(N))
    table, columns, target = {"N": N, "L": 40 / N**0.2 - 0.2 + luck}, {"N": "N", "L": "L"}, {"N": 1e10}
    floored = next_experiment(table, "power-floor", columns, OFFERED, target, loss="least-squares", bootstrap=0)
    power = next_experiment(table, "power", columns, OFFERED, target, loss="least-squares", bootstrap=0)
    assert "bound:E" in floored.warnings and floored.rows[0].support is None
    assert all(one.after > 1.5 * other.after for one, other in zip(floored.rows[:3], power.rows[:3], strict=True))


def test_a_hinge_beyond_which_nothing_was_seen():
    if "hinge" not in LAWS:
        pytest.skip("no law hinge yet")
    R = np.minimum(0.02 + 0.004 * np.log2(N / 3e5), 0.04) + 1e-4 * np.random.default_rng(2).normal(size=len(N))
    result = next_experiment({"N": N, "R": R}, "hinge", COLUMNS, OFFERED, {"N": 1e9}, loss="least-squares", bootstrap=30)
    assert 0 < result.rows[0].before < 1e-3 and all(0 <= row.shrinks < 1 for row in result.rows)


def test_the_offer_may_be_named_as_in_the_law_and_cost_alike():
    table = {"params": N, "R": straight()["R"]}
    named = [
        next_experiment(table, "log-linear", {"N": "params", "R": "R"}, {name: OFFERED["N"]}, {"N": 1e10}, bootstrap=0)
        for name in ("N", "params")
    ]
    assert named[0].rows == named[1].rows and {row.cost for row in named[0].rows} == {1.0}
    fit = fit_law(table, "log-linear", {"N": "params", "R": "R"})
    assert replace(named[0].rows[0], after=0.0).before == pytest.approx(named[1].rows[0].before) and fit.noise[1] == 12


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target": {"D": 1e9}}, "law ceiling needs N, each above zero"),
        ({"target": {"N": -1.0}}, "law ceiling needs N, each above zero"),
        ({"target": "verdict"}, "unknown target 'verdict'; slope, or sizes"),
        ({"runs": 0}, "runs 0 must be 1 or more"),
        ({"candidates": {"M": [1.0]}}, "no column 'N'"),
        ({"candidates": {"N": [1e6], "cost": [0.0]}}, "row 1: 0; sizes must be above zero"),
        ({"candidates": {"N": [1e6, -2.0]}}, "row 2: -2; sizes must be above zero"),
    ],
)
def test_requests_that_make_no_sense(kwargs, message):
    request = {"candidates": OFFERED, "target": {"N": 1e9}, "bootstrap": 0} | kwargs
    with pytest.raises(FitError) as error:
        next_experiment({"N": N, "R": 0.1 - 0.06 * (N / 3e5) ** -0.4 + straight()["R"] / 100}, "ceiling", COLUMNS, **request)
    assert message in str(error.value) and "\n" not in str(error.value)
