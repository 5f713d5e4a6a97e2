"""Profile likelihood intervals: the textbook's where the law is linear, and what they say where the data say nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fit import FitError, fit_law
from fit.tables import read_table

N = np.repeat(np.geomspace(3e5, 3e8, 6), 3)
NR, NL = {"N": "N", "R": "R"}, {"N": "N", "L": "L"}
SHARED = Path(__file__).parents[3] / "shared" / "data" / "fit"


def _noise(seed, sd=0.001):
    return sd * np.random.default_rng(seed).normal(size=len(N))


def _ceiling(seed=0, loss="least-squares", **options):
    return fit_law({"N": N, "R": 0.1 - 0.06 * (N / 3e5) ** -0.3 + _noise(seed)}, "ceiling", NR, loss=loss, **options)


@settings(max_examples=8, deadline=None)
@given(
    slope=st.floats(-0.01, 0.01),
    scale=st.floats(1e-6, 1e6),
    level=st.floats(0.5, 0.99),
    seed=st.integers(0, 10**6),
    weighted=st.booleans(),
)
def test_a_linear_law_has_the_textbooks_t_intervals(slope, scale, level, seed, weighted):
    rng = np.random.default_rng(seed)
    R = scale * (0.04 + slope * np.log2(N / 3e5) + 0.001 * rng.normal(size=len(N)))
    w = rng.uniform(0.2, 5.0, size=len(N)) if weighted else np.ones(len(N))
    result = fit_law({"N": N, "R": R, "w": w}, "log-linear", NR, loss="least-squares", weights="w")
    x, root = np.column_stack([np.ones(len(N)), np.log2(N)]), np.sqrt(w)
    best = np.linalg.lstsq(x * root[:, None], R * root, rcond=None)[0]
    variance = np.sum(w * (R - x @ best) ** 2) / 16 * np.linalg.inv((x * w[:, None]).T @ x)
    t = stats.t.ppf((1 + level) / 2, 16)
    for what, d in (("c", np.array([1.0, 0.0])), ("g", np.array([0.0, 1.0])), ({"N": 3e9}, np.array([1.0, np.log2(3e9)]))):
        found, half = result.profile(what, level), t * np.sqrt(d @ variance @ d)
        assert found.low == pytest.approx(d @ best - half, abs=1e-6 * half)
        assert found.high == pytest.approx(d @ best + half, abs=1e-6 * half)
        assert not found.warnings


@settings(max_examples=4, deadline=None)
@given(metric=st.floats(1e-3, 1e3), size=st.floats(1e-6, 1e6), seed=st.integers(0, 20))
def test_the_unit_of_metric_and_sizes_does_not_matter(metric, size, seed):
    R = 0.1 - 0.06 * (N / 3e5) ** -0.3 + _noise(seed)
    one = fit_law({"N": N, "R": R}, "ceiling", NR, loss="least-squares")
    other = fit_law({"N": size * N, "R": metric * R}, "ceiling", NR, loss="least-squares")
    for what, there in (("R0", "R0"), ("a", "a"), ({"N": 3e9}, {"N": 3e9 * size})):
        unit = 1.0 if what == "a" else metric
        before, after = one.profile(what), other.profile(there)
        assert [after.low, after.high] == pytest.approx([unit * before.low, unit * before.high], rel=1e-5)


@pytest.mark.parametrize("name", ["R0", "A", "a"])
def test_at_the_ends_the_fit_is_worse_by_just_what_noise_explains(name):
    result = _ceiling()
    found = result.profile(name, 0.9)
    cut = result.objective * (1 + stats.f.ppf(0.9, 1, 15) / 15)
    for end in (found.low, found.high):
        held = _ceiling(fixed={name: end})  # another search, from its own starts
        assert held.objective == pytest.approx(cut, rel=1e-6)
    inside = (found.points[:, 0] > found.low * (1 + 1e-6)) & (found.points[:, 0] < found.high * (1 - 1e-6))
    assert (found.points[inside, 1] < cut).all() and found.points[:, 1].min() == pytest.approx(result.objective)


def test_a_predictions_ends_are_those_of_a_constrained_optimiser():
    result = _ceiling()
    at = 3e9
    found = result.profile({"N": at}, 0.9)
    cut = result.objective * (1 + stats.f.ppf(0.9, 1, 15) / 15)
    R = 0.1 - 0.06 * (N / 3e5) ** -0.3 + _noise(0)

    def law(p, n):
        return p[0] - p[1] * (n / 1e7) ** -p[2]

    for sign, end in ((1, found.low), (-1, found.high)):
        best = optimize.minimize(
            lambda p, sign=sign: 100 * sign * law(p, at),
            [result.params["R0"], result.params["A"] * 1e7 ** -result.params["a"], result.params["a"]],
            constraints={"type": "ineq", "fun": lambda p: (cut - np.sum((law(p, N) - R) ** 2)) / cut},
            bounds=[(0.05, 0.2), (0.001, 0.1), (0.05, 1.0)],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert law(best.x, at) == pytest.approx(end, rel=1e-5)


def test_what_the_data_leave_open_has_open_ends():
    flat = fit_law({"N": N, "R": 0.05 + _noise(0, 5e-4)}, "ceiling", NR, loss="least-squares")
    for name in ("R0", "A", "a"):
        assert flat.profile(name).warnings == (f"open:{name}",), name
    assert flat.profile("A").low == 0.0 and np.isinf(flat.profile("A").high)
    assert flat.profile("A").to_json()["high"] is None
    mean = flat.profile({"N": 3e8})  # though no parameter is known, the mean among the sizes is
    assert 0.049 < mean.low < mean.high < 0.051 and not mean.warnings
    # Growth without an end in sight: the ceiling may be anywhere above, and the range of the exponent is no finding.
    line = fit_law({"N": N, "R": 0.04 + 0.004 * np.log2(N / 3e5) + _noise(1)}, "ceiling", NR, loss="least-squares")
    ceiling = line.profile("R0")
    assert np.isfinite(ceiling.low) and np.isinf(ceiling.high) and ceiling.warnings == ("open:R0",)
    assert np.isinf(line.profile("a").low)


def test_a_floor_that_may_be_zero_ends_there():
    table = {"N": N, "L": 5 * (N / 3e5) ** -0.3 * (1 + _noise(0, 0.01))}
    floor = fit_law(table, "power-floor", NL, delta=1.0).profile("E")
    assert floor.low == 0.0 < floor.high < 0.2 and not floor.warnings
    bounded = fit_law(table, "power-floor", NL, delta=1.0, bounds={"a": (0.29, 0.303)}).profile("a")
    assert bounded.low < 0.303 == bounded.high and not bounded.warnings  # what the user ruled out is not open


def test_huber_that_reaches_no_row_is_least_squares():
    table = {"N": N, "R": (0.1 - 0.06 * (N / 3e5) ** -0.3) * (1 + _noise(0, 0.01))}
    wide, wider = (fit_law(table, "ceiling", NR, delta=delta).profile("a") for delta in (0.1, 10.0))
    assert [wide.low, wide.high] == pytest.approx([wider.low, wider.high], rel=1e-6)


def test_huber_and_l1_agree_where_delta_is_small():
    table = {"N": N, "R": (0.1 - 0.06 * (N / 3e5) ** -0.3) * (1 + _noise(3, 0.01))}
    huber = fit_law(table, "ceiling", NR, delta=1e-5).profile({"N": 3e8})
    l1 = fit_law(table, "ceiling", NR, loss="l1").profile({"N": 3e8})
    assert [huber.low, huber.high] == pytest.approx([l1.low, l1.high], rel=1e-3)


def test_an_outlier_moves_least_squares_and_hardly_huber():
    R = (0.1 - 0.06 * (N / 3e5) ** -0.3) * (1 + _noise(0, 0.003))
    R[4] *= 1.5
    width = {}
    for loss in ("huber", "least-squares"):
        found = fit_law({"N": N, "R": R}, "ceiling", NR, loss=loss).profile({"N": 3e8})
        width[loss] = found.high - found.low
    assert width["huber"] < 0.3 * width["least-squares"]


def test_groups():
    R = np.concatenate([0.1 - 0.06 * (N / 3e5) ** -0.3, 0.08 - 0.03 * (N / 3e5) ** -0.3]) + 0.001 * np.tile(_noise(0, 1.0), 2)
    table = {"N": np.tile(N, 2), "R": R, "set": ["x"] * 18 + ["y"] * 18}
    result = fit_law(table, "ceiling", NR, loss="least-squares", groups="set", shared=["a"])
    shared = result.profile("a")
    held = fit_law(table, "ceiling", NR, loss="least-squares", groups="set", shared=["a"], fixed={"a": shared.high})
    assert held.objective == pytest.approx(result.objective * (1 + stats.f.ppf(0.95, 1, 31) / 31), rel=1e-5)
    mean = result.profile({"N": 3e9, "set": "y"})
    assert mean.low < result.predict({"N": [3e9], "set": ["y"]}).value[0] < mean.high
    with pytest.raises(FitError, match="no group 'z' in this fit; there are x, y"):
        result.profile({"N": 3e9, "set": "z"})


def test_mistakes():
    result = _ceiling()
    with pytest.raises(FitError, match="no parameter 'q'; it has R0, A, a"):
        result.profile("q")
    with pytest.raises(FitError, match="level 95 is not between 0 and 1"):
        result.profile("a", 95)
    with pytest.raises(FitError, match="one prediction at a time"):
        result.profile({"N": [1e9, 2e9]})
    with pytest.raises(FitError, match="a is held at"):
        _ceiling(fixed={"a": 0.3}).profile("a")
    with pytest.raises(FitError, match="3 rows for 3 parameters"):
        fit_law({"N": N[::6], "R": [0.04, 0.07, 0.08]}, "ceiling", NR, loss="least-squares").profile("a")
    with pytest.raises(FitError, match="without noise a profile has no end"):
        fit_law({"N": N, "R": 0.1 - 0.06 * (N / 3e5) ** -0.3}, "ceiling", NR, loss="least-squares").profile("a")


def test_a_better_fit_found_on_the_way_is_told():
    result = _ceiling()
    worse = result.optimum.copy()
    worse[0] *= 1.2
    found = replace(result, optimum=worse).profile("a")
    assert "better-elsewhere:a" in found.warnings


@pytest.mark.slow
def test_on_epochs_points_it_agrees_with_the_bootstrap():
    """240 rows, noise that differs by size, delta far under it: a variance from the middle of all residuals would be half."""
    path = SHARED / "epoch_chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("shared/data/fit/epoch_chinchilla is not here")
    rows = read_table(path)
    size, flops, loss = (np.array(rows[name]) for name in ("Model Size", "Training FLOP", "loss"))
    tokens = flops / 6 / size
    kept = np.argsort(tokens / size)[5:]
    table = {"N": size[kept], "D": tokens[kept], "L": loss[kept]}
    result = fit_law(table, "chinchilla", {"N": "N", "D": "D", "L": "L"}, bootstrap=1000)
    for name in ("E", "a", "b"):
        low, high = result.intervals[name]
        found = result.profile(name)
        assert 0.65 < (found.high - found.low) / (high - low) < 1.35, name
