"""The best split of compute against brute force and the published one; crossings against closed forms."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fit import FitError, fit_law
from fit.allocation import allocate
from fit.crossing import crossover

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "fit"
NAMES = {"N": "N", "D": "D", "L": "L"}
LADDER = np.geomspace(1e6, 1e9, 6)


def chinchilla(E=1.7, A=400.0, B=1500.0, a=0.34, b=0.37, noise=0.0, bootstrap=0, seed=0, **kwargs):
    N, D = (g.ravel() for g in np.meshgrid(LADDER, np.geomspace(1e8, 1e11, 6)))
    L = (E + A / N**a + B / D**b) * np.exp(noise * np.random.default_rng(seed).normal(size=36))
    return fit_law({"N": N, "D": D, "L": L}, "chinchilla", NAMES, bootstrap=bootstrap, delta=1.0, **kwargs)


@pytest.fixture(scope="module")
def bootstrapped():
    return chinchilla(noise=0.002, bootstrap=200)


@settings(max_examples=30, deadline=None)
@given(
    A=st.floats(10, 1e4),
    B=st.floats(10, 1e4),
    a=st.floats(0.1, 0.8),
    b=st.floats(0.1, 0.8),
    compute=st.floats(1e16, 1e26),
    flops=st.floats(1, 20),
)
def test_no_other_split_is_better(A, B, a, b, compute, flops):
    fit = replace(EXACT, params={"E": 1.7, "A": A, "B": B, "a": a, "b": b})
    best = allocate(fit, [compute], flops).rows[0]
    assert flops * best.N.value * best.D.value == pytest.approx(compute, rel=1e-9)
    assert best.tokens_per_parameter.value == pytest.approx(best.D.value / best.N.value, rel=1e-9)
    N = best.N.value * np.geomspace(1e-3, 1e3, 2001)
    others = 1.7 + A / N**a + B / (compute / flops / N) ** b
    assert best.loss.value == pytest.approx(others.min(), rel=1e-12)
    assert np.argmin(others) == 1000


EXACT = chinchilla()


def test_exponents_and_what_they_mean():
    result = allocate(EXACT, [1e17, 1e19])
    assert result.exponents["N"].value == pytest.approx(0.37 / 0.71, rel=1e-4)
    assert result.exponents["D"].value == pytest.approx(0.34 / 0.71, rel=1e-4)
    small, large = result.rows
    assert large.N.value / small.N.value == pytest.approx(100 ** (0.37 / 0.71), rel=1e-3)
    assert small.N.low is None and "no-draws" in result.warnings and result.interior is None
    assert large.distance == 0.0 and not [w for w in result.warnings if w.startswith("extrapolates")]
    far = allocate(EXACT, [1e18, 1e24])
    assert far.rows[0].distance == 0.0 and far.rows[1].distance > 0.5
    assert [w for w in far.warnings if w.startswith("extrapolates")]


def test_every_draw_is_carried_through(bootstrapped):
    result = allocate(bootstrapped, [1e19, 1e21], interval=0.8)
    names = list(bootstrapped.params)
    E, A, B, a, b = (bootstrapped.draws[:, names.index(name)] for name in ("E", "A", "B", "a", "b"))
    G = (a * A / (b * B)) ** (1 / (a + b))
    for row in result.rows:
        N = G * (row.compute / 6) ** (b / (a + b))
        D = row.compute / 6 / N
        for estimate, drawn in ((row.N, N), (row.D, D), (row.loss, E + A / N**a + B / D**b)):
            low, high = np.quantile(drawn, [0.1, 0.9])
            assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=0.02)
            assert estimate.low < estimate.value < estimate.high
    widths = [row.N.high / row.N.low for row in result.rows]
    assert widths[1] > widths[0] > 1  # the further out, the less certain
    exponent = result.exponents["N"]
    assert (exponent.low, exponent.high) == pytest.approx(tuple(np.quantile(b / (a + b), [0.1, 0.9])), rel=0.01)
    assert exponent.low + result.exponents["D"].high == pytest.approx(1, abs=0.01)
    assert result.interior == 1.0


def test_draws_without_an_optimum_open_the_interval(bootstrapped):
    """A draw whose B is zero puts everything into N: that end of the interval is open, not left out."""
    draws = bootstrapped.draws.copy()
    draws[::4, list(bootstrapped.params).index("B")] = 0.0
    result = allocate(replace(bootstrapped, draws=draws), [1e20])
    row = result.rows[0]
    assert result.interior == pytest.approx(0.75) and "no-optimum:25.0%" in result.warnings
    assert row.N.high == np.inf and row.D.low == 0.0 and np.isfinite(row.loss.high)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["rows"][0]["N"]["high"] is None and document["exponents"]["N"]["low"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute": []}, "compute must be a list of FLOPs above zero"),
        ({"compute": [1e20, -1.0]}, "compute must be a list of FLOPs above zero"),
        ({"compute": 1e20}, "compute must be a list"),
        ({"flops_per_token": 0}, "flops_per_token 0 must be above zero"),
        ({"interval": 90}, "interval 90 between 0 and 1"),
        ({"result": replace(EXACT, params=EXACT.params | {"A": 0.0})}, "A is 0: that term does nothing"),
        ({"result": fit_law({"N": LADDER, "L": 9 / LADDER**0.2}, "power", {"N": "N", "L": "L"})}, "law power: the best split"),
    ],
)
def test_what_has_no_split(change, message):
    with pytest.raises(FitError) as error:
        allocate(**({"result": EXACT, "compute": [1e20]} | change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_law_counts_and_not_its_name():
    N, D = (g.ravel() for g in np.meshgrid(LADDER, np.geomspace(1e8, 1e11, 6)))
    table = {"N": N, "D": D, "L": 1.7 + 400 / N**0.34 + 1500 / D**0.37}
    same = fit_law(table, "L = E + A/N**a + B/D**b", NAMES)
    assert allocate(same, [1e20]).rows[0].N.value == pytest.approx(allocate(EXACT, [1e20]).rows[0].N.value, rel=1e-3)
    product = fit_law(table, "L = E + A/N**a * B/D**b", NAMES, fixed={"B": 1.0})
    with pytest.raises(FitError, match="law chinchilla"):
        allocate(product, [1e20])


def test_epochs_exponent():
    """Besiroglu et al. 2024: N grows as C^0.513 (standard error .020, 80% interval .051 wide), about 20 tokens a parameter."""
    path = SHARED / "epoch_chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("shared/data/fit/epoch_chinchilla is not here")
    rows = list(csv.DictReader(path.open()))
    N, C, L = (np.array([float(r[name]) for r in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    keep = np.sort(L)[-5] > L
    table = {"N": N[keep], "D": (C / 6 / N)[keep], "L": L[keep]}
    printed = allocate(fit_law(table, "chinchilla", NAMES, loss="l1"), [5.76e23])
    assert printed.exponents["N"].value == pytest.approx(0.513, abs=5e-4)
    assert 15 < printed.rows[0].tokens_per_parameter.value < 30
    fitted = allocate(fit_law(table, "chinchilla", NAMES, delta=1e-3, bootstrap=400, seed=1), [5.76e23], interval=0.8)
    exponent = fitted.exponents["N"]
    assert exponent.value == pytest.approx(0.514, abs=1e-3)
    assert exponent.high - exponent.low == pytest.approx(0.051, abs=0.008)
    assert fitted.rows[0].distance > 0 and fitted.rows[0].N.low < fitted.rows[0].N.value < fitted.rows[0].N.high


def straight(c, g, noise=0.0, luck=0, ladder=LADDER, **kwargs):
    """A fitted R = c + g log2(N/1e6)."""
    N = np.repeat(ladder, 3)
    R = c + g * np.log2(N / 1e6) + noise * np.random.default_rng(luck).normal(size=len(N))
    return fit_law({"N": N, "R": R}, "log-linear", {"N": "N", "R": "R"}, loss="least-squares", **kwargs)


def test_lines_cross_where_they_do():
    one, other = straight(0.05, 0.002), straight(0.03, 0.006)
    result = crossover(one, other)
    assert result.at == pytest.approx(1e6 * 2**5, rel=1e-6) and (result.winner, result.crossings) == ("other", 1)
    assert result.sizes == pytest.approx((result.at, result.at)) and result.distance == (0.0, 0.0)
    assert result.low is result.crosses is None and "no interval" in result.text
    assert crossover(other, one).at == pytest.approx(result.at) and crossover(other, one).winner == "one"
    losses = [
        fit_law({"N": LADDER, "L": c + A / LADDER**0.3}, "power-floor", {"N": "N", "L": "L"}) for c, A in ((2, 40), (1.5, 80))
    ]
    crossed = crossover(*losses)
    assert crossed.at == pytest.approx((40 / 0.5) ** (1 / 0.3), rel=1e-3) and crossed.winner == "other"


def test_at_equal_cost():
    """Costs of 6 N per token for one, twice that for the other, from a function or from measured points."""
    one, other = straight(0.05, 0.002), straight(0.03, 0.006)
    flops = (lambda N: 6 * N * 1e6, lambda N: 12 * N * 1e6)
    result = crossover(one, other, by=flops)
    # 0.05 + 0.002 log2(C/6e12) = 0.03 + 0.006 log2(C/12e12)
    assert result.at == pytest.approx(6e12 * 2 ** (0.026 / 0.004), rel=1e-4)
    assert result.sizes[0] == pytest.approx(2 * result.sizes[1], rel=1e-6)
    assert result.within == pytest.approx((6e12, 12e15))
    measured = tuple({size: float(cost(size)) for size in LADDER} for cost in flops)
    points = crossover(one, other, by=measured)
    assert points.at == pytest.approx(result.at, rel=1e-6) and points.within == pytest.approx((12e12, 6e15))


def test_no_crossing_is_said():
    one, other = straight(0.05, 0.004), straight(0.03, 0.004)
    result = crossover(one, other, within=(1e6, 1e8))
    assert (result.at, result.winner, result.crossings) == (None, "one", 0)
    assert "no crossing within 1e+06 to 1e+08: log-linear (one) is better throughout" in result.text
    assert result.sizes is result.distance is None
    json.dumps(result.to_json(), allow_nan=False)


def test_the_interval_holds_the_truth_and_opens_where_draws_do_not_cross():
    """Of 30 pairs of fits 90% intervals hold the true crossing; where only some draws cross, the interval's end is open."""
    truth, held = 1e6 * 2**5, 0
    for seed in range(30):
        one = straight(0.05, 0.002, 2e-3, 2 * seed, bootstrap=100, seed=1)
        other = straight(0.03, 0.006, 2e-3, 2 * seed + 1, bootstrap=100, seed=2)
        result = crossover(one, other)
        held += result.low <= truth <= result.high
    assert 0.8 <= held / 30 <= 1.0
    assert result.crosses == 1.0 and 0 < result.low < result.at < result.high
    short = crossover(one, other, within=(1e6, result.at * 1.01))
    assert short.winner == "other" and short.high == np.inf and 0.2 < short.never < 0.8
    assert short.crosses + short.throughout + short.never == pytest.approx(1)
    assert "of draws never get there" in short.text and f"above {short.within[1]:.3g}" in short.text
    assert short.to_json()["high"] is None
    late = crossover(one, other, within=(result.at * 1.01, 1e9))
    assert late.at is None and late.low == 0.0 and late.throughout > 0.2


def test_the_last_of_several_crossings_counts_and_is_warned_of():
    table = {"N": LADDER, "R": 0.1 - 0.08 * (LADDER / 1e6) ** -0.5}
    ceiling = fit_law(table, "ceiling", {"N": "N", "R": "R"}, loss="least-squares")
    result = crossover(ceiling, straight(0.03, 0.008))
    assert result.crossings == 2 and "crossings:2" in result.warnings and result.winner == "other"
    curve = 0.1 - 0.08 * (result.at / 1e6) ** -0.5
    assert curve == pytest.approx(0.03 + 0.008 * np.log2(result.at / 1e6), rel=1e-4) and result.at > 1e7


def test_beyond_the_fitted_sizes_is_warned_of():
    near = straight(0.05, 0.002, ladder=LADDER[:3])
    result = crossover(near, straight(0.02, 0.006))
    span = np.log(LADDER[2] / LADDER[0])
    assert result.distance == (pytest.approx(np.log(result.at / LADDER[2]) / span, rel=1e-3), 0.0)
    assert [w for w in result.warnings if w.startswith("one:extrapolates:")]


def test_a_law_of_several_sizes_moves_along_one():
    result = crossover(EXACT, chinchilla(A=200.0, E=1.9), size=("N", "N"), at=({"D": 1e10}, {"D": 1e10}))
    assert result.at == pytest.approx((200 / 0.2) ** (1 / 0.34), rel=1e-3) and result.winner == "one"


NAMELESS = fit_law({"N": LADDER, "y": LADDER**-0.2}, "acc = A/N**a", {"N": "N", "acc": "y"})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"other": EXACT}, "law log-linear is of R and law chinchilla of L; a gain and a loss do not cross"),
        ({"one": NAMELESS, "other": NAMELESS}, "is of acc: name the metric R (more is better) or L (less is better)"),
        ({"one": EXACT, "other": EXACT}, "law chinchilla has sizes N, D; name the one that moves in size"),
        ({"one": EXACT, "other": EXACT, "size": ("N", "N")}, "a value above zero is needed for D in at"),
        ({"by": (lambda N: 1 / N, lambda N: N)}, "costs of law log-linear do not grow with N"),
        ({"by": (lambda _: 1.0, lambda N: N)}, "the function gave shape ()"),
        ({"by": ({1e6: 1.0}, lambda N: N)}, "two or more sizes above zero are needed"),
        ({"by": ({1e6: 1.0, 1e7: 10.0}, {1e6: 100.0, 1e7: 1000.0})}, "no cost in common"),
        ({"within": (1e9, 1e6)}, "is not a range above zero"),
        ({"interval": 0}, "interval 0 is not between 0 and 1"),
    ],
)
def test_requests_that_make_no_sense(kwargs, message):
    request = {"one": straight(0.05, 0.002), "other": straight(0.03, 0.006)} | kwargs
    with pytest.raises(FitError) as error:
        crossover(**request)
    assert message in str(error.value) and "\n" not in str(error.value)
