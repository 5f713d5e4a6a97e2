"""Criteria against the textbook's, and the bootstrap's p values: uniform where the smaller law holds, small where it does not."""

import json

import numpy as np
import pytest

from fit import FitError, fit_law
from fit.compare import NESTED, compare_laws
from fit.laws import LAWS
from fit.problem import Problem
from fit.refit import sums_of_squares

LADDER = np.geomspace(3e5, 3e8, 6)
N = np.repeat(LADDER, 2)
D = np.tile(np.geomspace(1e8, 1e11, 4), 3)
CEILING = 0.1 - 0.06 * (N / 3e5) ** -0.4
FLOOR = 1.5 + 2.0 * (N / 3e5) ** -0.3
POWER = 5 * (N / 3e5) ** -0.1
STRAIGHT = 0.02 + 0.004 * np.log2(N / 3e5)


def noise(seed, sd=0.01):
    return sd * np.random.default_rng(seed).normal(size=len(N))


def needs(*laws):
    if missing := [law for law in laws if law not in LAWS]:
        pytest.skip(f"no law {missing[0]} yet")


def test_criteria_are_the_textbooks():
    """Least squares by hand on both scales, with the normal density of the metric itself."""
    y = STRAIGHT + noise(0, 4e-4)
    linear = compare_laws({"N": N, "y": y}, ["log-linear", "ceiling"], {"N": "N", "R": "y"}, bootstrap=0)
    straight = linear.laws[0]
    squares = np.sum((np.polyval(np.polyfit(np.log2(N), y, 1), np.log2(N)) - y) ** 2)
    likelihood = -6 * (np.log(2 * np.pi * squares / 12) + 1)
    assert (straight.k, straight.sd) == (3, pytest.approx(np.sqrt(squares / 12), rel=1e-6))
    assert straight.log_likelihood == pytest.approx(likelihood, rel=1e-9)
    assert straight.aicc == pytest.approx(-2 * likelihood + 6 + 24 / 8, rel=1e-9)
    assert straight.bic == pytest.approx(-2 * likelihood + 3 * np.log(12), rel=1e-9)
    assert sum(score.weight for score in linear.laws) == pytest.approx(1)
    assert linear.scale == "linear" and linear.best == "log-linear" and linear.tests == ()
    odds = linear.laws[1].weight / straight.weight
    assert odds == pytest.approx(np.exp(-(linear.laws[1].aicc - straight.aicc) / 2))

    p = POWER * np.exp(noise(1))
    log = compare_laws({"N": N, "y": p}, ["power", "power-floor"], {"N": "N", "L": "y"}, loss="log-huber", bootstrap=0)
    residuals = np.polyval(np.polyfit(np.log(N), np.log(p), 1), np.log(N)) - np.log(p)
    density = np.sum(-np.log(p) - 0.5 * np.log(2 * np.pi * np.mean(residuals**2)) - 0.5)
    assert log.scale == "log" and log.laws[0].log_likelihood == pytest.approx(density, rel=1e-9)


def test_every_loss_is_judged_on_the_same_scale():
    """The fits differ by loss, the criteria do not; two scales share a density, so the right one wins where it matters."""
    wide = np.exp(noise(2, 0.3)) * 5 * (N / 3e5) ** -0.5
    columns = {"N": "N", "L": "y"}
    by_loss = [
        compare_laws({"N": N, "y": wide}, ["power", "power-floor"], columns, loss=loss, scale="log", bootstrap=0)
        for loss in ("log-huber", "l1", "huber", "least-squares")
    ]
    assert len({round(score.aicc, 4) for result in by_loss for score in result.laws[:1]}) == 1
    assert len({round(result.laws[0].fit.params["a"], 4) for result in by_loss}) == 4
    linear = compare_laws({"N": N, "y": wide}, ["power", "power-floor"], columns, scale="linear", bootstrap=0)
    assert by_loss[0].laws[0].aicc < linear.laws[0].aicc - 5


def test_units_do_not_matter():
    y = CEILING + noise(3, 1e-3)
    laws = [law for law in ("ceiling", "log-linear", "hinge") if law in LAWS]
    one = compare_laws({"N": N, "y": y}, laws, {"N": "N", "R": "y"}, bootstrap=39)
    other = compare_laws({"N": N * 1e3, "y": y * 100}, laws, {"N": "N", "R": "y"}, bootstrap=39)
    assert [s.difference for s in other.laws] == pytest.approx([s.difference for s in one.laws], abs=1e-3)
    assert [t.p for t in other.tests] == [t.p for t in one.tests]
    assert other.laws[0].aicc == pytest.approx(one.laws[0].aicc + 2 * 12 * np.log(100), abs=1e-3)


CASES = {
    ("log-linear", "hinge"): (STRAIGHT, "log", 0.01, {"N": "N", "R": "y"}),
    ("power", "power-floor"): (POWER, "linear", 0.04, {"N": "N", "L": "y"}),
}


@pytest.mark.parametrize("pair", CASES)
def test_p_is_uniform_under_the_smaller_law(pair):
    """60 tables of the smaller law: p is under each level about as often as it says (within 3 and 4 standard errors)."""
    needs(*pair)
    mean, scale, sd, columns = CASES[pair]
    ps = []
    for seed in range(60):
        y = mean * np.exp(noise(seed, sd)) if scale == "log" else mean + noise(seed, sd)
        ps.append(compare_laws({"N": N, "y": y}, pair, columns, scale=scale, bootstrap=19, seed=seed).tests[0].p)
    ps = np.array(ps)
    for level in (0.1, 0.25, 0.5):
        assert abs(np.mean(ps <= level) - level) <= 4 * np.sqrt(level * (1 - level) / 60)
    assert np.mean(ps <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)


ALTERNATIVES = {
    ("log-linear", "hinge"): (np.minimum(STRAIGHT, STRAIGHT[6]) + noise(4, 4e-4), {"N": "N", "R": "y"}),
    ("power", "power-floor"): (FLOOR * np.exp(noise(5)), {"N": "N", "L": "y"}),
    ("power-floor", "broken"): (
        (1.5 + 2 * (N / 3e5) ** -0.05 / (1 + (N / 1e7) ** 4) ** 0.2) * np.exp(noise(6, 0.005)),
        {"N": "N", "L": "y"},
    ),
    ("ceiling", "two-term"): (
        CEILING - 0.03 * (D / 1e8) ** -0.3 + noise(7, 1e-3),
        {"N": "N", "N_SI": "N", "N_CF": "D", "R": "y"},
    ),
    ("power-floor", "chinchilla"): (FLOOR + 2 * (D / 1e8) ** -0.3 + noise(8), {"N": "N", "D": "D", "L": "y"}),
}


@pytest.mark.parametrize("pair", ALTERNATIVES)
def test_p_is_small_where_the_larger_law_holds(pair):
    needs(*pair)
    y, columns = ALTERNATIVES[pair]
    result = compare_laws({"N": N, "D": D, "y": y}, list(pair)[::-1], columns, bootstrap=59)
    (test,) = result.tests
    assert (test.small, test.large, test.adds) == (*pair, NESTED[pair][0])
    assert test.p == pytest.approx(1 / 60) and test.draws == 59 and test.statistic > 10
    assert result.best == pair[1]


def test_the_larger_law_never_fits_worse():
    """Under the smaller law a break may lie anywhere, and one start would miss most of the statistic: the search must find what a
    dense grid finds."""
    needs("hinge")
    y = STRAIGHT + 4e-4 * np.random.default_rng(9).normal(size=(40, len(N)))
    found = {
        law: sums_of_squares(Problem(LAWS[law], {"N": np.log(N)}, y / 0.03, np.ones((1, len(N))), "least-squares", np.inf))
        for law in ("log-linear", "hinge")
    }
    assert np.all(found["hinge"] <= found["log-linear"] * (1 + 1e-9))
    x = np.log2(N)
    dense = np.full(40, np.inf)
    for break_ in np.linspace(x.min(), x.max(), 4001)[1:]:
        design = np.stack([np.ones_like(x), np.minimum(x, break_)], axis=1)
        residuals = y - (design @ np.linalg.lstsq(design, y.T, rcond=None)[0]).T
        dense = np.minimum(dense, np.sum(residuals**2, axis=1) / 0.03**2)
    assert len(N) * np.log(found["hinge"] / dense) == pytest.approx(np.zeros(40), abs=2e-3)


def test_noise_comes_from_replicates_where_there_are_enough():
    y = POWER * np.exp(noise(10))
    columns = {"N": "N", "L": "y"}
    repeated = compare_laws({"N": N, "y": y}, ["power", "power-floor"], columns, bootstrap=9, scale="log").tests[0]
    pairs = np.log(y).reshape(6, 2)
    assert (repeated.noise, repeated.dof) == ("replicates", 6)
    assert repeated.sd == pytest.approx(np.sqrt(np.sum(np.diff(pairs) ** 2) / 2 / 6), rel=1e-6)
    single = compare_laws({"N": np.geomspace(3e5, 3e8, 12), "y": y}, ["power", "power-floor"], columns, bootstrap=9, scale="log")
    assert (single.tests[0].noise, single.tests[0].dof) == ("residuals", 10)


def test_pairs_that_are_not_nested_are_said_to_be_so():
    y = CEILING + noise(11, 1e-3)
    result = compare_laws({"N": N, "y": y}, ["ceiling", "log-linear"], {"N": "N", "R": "y"}, bootstrap=9)
    assert result.tests == () and result.not_nested[0][:2] == ("ceiling", "log-linear")
    assert "no value of its parameters is log-linear" in result.not_nested[0][2]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["best"] == "ceiling" and document["not_nested"][0]["laws"] == ["ceiling", "log-linear"]
    assert {"law", "k", "aicc", "bic", "weight", "params"} <= document["laws"][0].keys()


def test_a_second_term_needs_the_first_ones_size():
    needs("two-term")
    table = {"N": N**1.1, "N_SI": N, "N_CF": D, "y": CEILING + noise(12, 1e-3)}
    columns = {"N": "N", "N_SI": "N_SI", "N_CF": "N_CF", "R": "y"}
    result = compare_laws(table, ["ceiling", "two-term"], columns, bootstrap=9)
    assert result.tests == () and "only where its N is the column of N_SI or N_CF" in result.not_nested[0][2]


def test_the_same_seed_gives_the_same_answer_and_the_fits_are_fit_laws():
    table, columns = {"N": N, "y": POWER * np.exp(noise(13))}, {"N": "N", "L": "y"}
    one = compare_laws(table, ["power", "power-floor"], columns, bootstrap=29, seed=4)
    assert compare_laws(table, ["power", "power-floor"], columns, bootstrap=29, seed=4).tests == one.tests
    assert one.laws[1].fit.params == fit_law(table, "power-floor", columns, loss="least-squares").params


def test_a_law_that_runs_through_every_point_has_no_likelihood():
    result = compare_laws({"N": LADDER, "y": POWER[::2]}, ["power", "log-linear"], {"N": "N", "L": "y"}, bootstrap=9)
    assert result.laws[0].aicc is None and result.laws[0].weight is None and "perfect" in result.laws[0].fit.warnings
    few = compare_laws({"N": LADDER[:4], "y": CEILING[:8:2] + noise(1)[:4] / 10}, ["ceiling", "log-linear"], {"N": "N", "R": "y"})
    assert few.laws[0].aicc is None and few.laws[0].bic is not None and few.best is None


@pytest.mark.parametrize(
    ("laws", "columns", "kwargs", "message"),
    [
        (["ceiling"], {"N": "N", "R": "y"}, {}, "two or more different laws"),
        (["ceiling", "ceiling"], {"N": "N", "R": "y"}, {}, "two or more different laws"),
        ("ceiling", {"N": "N", "R": "y"}, {}, "two or more different laws"),
        (["ceiling", "power"], {"N": "N"}, {}, "one metric (as R or L) beside the sizes N; got none"),
        (["ceiling", "power"], {"N": "N", "R": "y", "L": "y"}, {}, "got L, R"),
        (["power", "chinchilla"], {"N": "N", "L": "y"}, {}, "law chinchilla (L = E + A/N^a + B/D^b) needs a column for D"),
        (["ceiling", "power"], {"N": "N", "R": "y"}, {"scale": "lin"}, "unknown scale 'lin'"),
        (["ceiling", "power"], {"N": "N", "R": "y"}, {"loss": "mse"}, "unknown loss 'mse'"),
        (["ceiling", "power"], {"N": "N", "R": "y"}, {"bootstrap": -1}, "bootstrap -1 is negative"),
        (["ceiling", "log-linear"], {"N": "N", "R": "minus"}, {"scale": "log"}, "row 1: -0.04 has no logarithm"),
        (["ceiling", "log-linear"], {"N": "N", "R": "z"}, {}, "no column 'z'"),
    ],
)
def test_requests_that_make_no_sense(laws, columns, kwargs, message):
    with pytest.raises(FitError) as error:
        compare_laws({"N": N, "y": CEILING, "minus": -CEILING}, laws, columns, **kwargs)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_are_reciprocal_variances():
    """By hand: the density of each row with its own variance, at weighted least squares; and a common factor changes nothing."""
    w = np.random.default_rng(2).uniform(0.2, 5, size=12)
    bent = STRAIGHT - 0.0005 * np.log2(np.maximum(N, 5e6) / 5e6)
    table = {"N": N, "y": bent + noise(0, 4e-4) / np.sqrt(w), "w": w, "w7": 7 * w}
    columns, laws = {"N": "N", "R": "y"}, ["log-linear", "hinge"]
    found = compare_laws(table, laws, columns, bootstrap=49, weights="w")
    root = np.sqrt(w)
    line = np.polyfit(np.log2(N), table["y"], 1, w=root)
    variance = np.mean((root * (np.polyval(line, np.log2(N)) - table["y"])) ** 2) / w
    by_hand = -0.5 * np.sum(np.log(2 * np.pi * variance) + (np.polyval(line, np.log2(N)) - table["y"]) ** 2 / variance)
    assert found.laws[0].log_likelihood == pytest.approx(by_hand, rel=1e-9)
    again = compare_laws(table, laws, columns, bootstrap=49, weights="w7")
    assert [law.aicc for law in again.laws] == pytest.approx([law.aicc for law in found.laws], rel=1e-9)
    assert found.tests[0].statistic > 0.1 and again.tests[0].statistic == pytest.approx(found.tests[0].statistic, rel=1e-4)


def test_replicates_weights_are_the_same_for_every_law():
    table = {"N": N, "M": np.tile([1e5, 1e6], 6), "y": CEILING + noise(0, 4e-4)}
    columns = {"N": "N", "N_SI": "N", "N_CF": "M", "R": "y"}
    with pytest.raises(FitError, match="every size has one row only"):  # in both sizes together there are no replicates
        compare_laws(table, ["ceiling", "two-term"], columns, bootstrap=0, weights="replicates")
    one = compare_laws(table, ["ceiling", "log-linear"], {"N": "N", "R": "y"}, bootstrap=0, weights="replicates")
    assert np.allclose(one.laws[0].fit.problem.weights, one.laws[1].fit.problem.weights)


def test_bounds_and_fixed_values_are_of_the_laws_that_have_them():
    table, columns = {"N": N, "y": CEILING + noise(0, 4e-4)}, {"N": "N", "R": "y"}
    found = compare_laws(table, ["ceiling", "log-linear"], columns, bootstrap=0, fixed={"R0": 0.1}, bounds={"a": (0.3, 0.35)})
    ceiling, line = found.laws
    assert ceiling.fit.params["R0"] == 0.1 and 0.3 <= ceiling.fit.params["a"] <= 0.35 and (ceiling.k, line.k) == (3, 3)
    with pytest.raises(FitError, match="none of the laws ceiling, log-linear has a parameter 'q'"):
        compare_laws(table, ["ceiling", "log-linear"], columns, bootstrap=0, fixed={"q": 1.0})
