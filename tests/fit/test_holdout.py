"""Rolling leave-largest-out: errors by hand, coverage on planted ladders, and that only smaller sizes are ever used."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fit import FitError, fit_law
from fit.holdout import leave_largest_out

LADDER = np.geomspace(3e5, 3e8, 8)
COLUMNS = {"N": "N", "R": "R"}
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "fit"


def table(seed=0, noise=8e-4, seeds=3):
    N = np.repeat(LADDER, seeds)
    luck = noise * np.random.default_rng(seed).normal(size=len(N))
    return {"N": N, "R": 0.1 - 0.06 * (N / 3e5) ** -0.4 + luck, "seed": np.tile(np.arange(seeds), len(LADDER))}


def test_errors_are_those_of_fits_to_the_smaller_sizes():
    rows = table()
    result = leave_largest_out(rows, "log-linear", COLUMNS, loss="least-squares", bootstrap=0)
    assert sorted({row.fitted for row in result.rows}) == [3, 4, 5, 6, 7]  # one more than its parameters, and so on
    for row in result.rows:
        k, rank = row.fitted, row.fitted + row.steps - 1
        small, held = rows["N"] < LADDER[k] * 0.99, np.isclose(rows["N"], LADDER[rank])
        slope, start = np.polyfit(np.log2(rows["N"][small]), rows["R"][small], 1)
        observed = rows["R"][held].mean()
        assert row.sizes == {"N": pytest.approx(LADDER[rank])} and row.runs == 3
        assert row.observed == pytest.approx(observed)
        assert row.predicted == pytest.approx(start + slope * np.log2(LADDER[rank]), rel=1e-6)
        assert row.error == pytest.approx(row.predicted / observed - 1)
        assert row.naive == pytest.approx(rows["R"][3 * k - 3 : 3 * k].mean() / observed - 1)
        assert row.distance == pytest.approx(row.steps / (k - 1))  # sizes are evenly spaced in their logarithm
        assert row.low is row.high is row.covered is None
    assert result.coverage is None and result.next_coverage is None
    assert [row.fitted for row in result.next] == [3, 4, 5, 6, 7]
    assert result.next_error == pytest.approx(np.mean([abs(row.error) for row in result.next]))
    assert result.bias > 0  # a ceiling bends away under a straight line


def test_the_larger_sizes_are_never_looked_at():
    rows = table()
    spoiled = {**rows, "R": np.where(rows["N"] > LADDER[5] * 0.99, 5.0, rows["R"])}
    one, other = (leave_largest_out(t, "ceiling", COLUMNS, loss="least-squares", bootstrap=40) for t in (rows, spoiled))
    early = [(a, b) for a, b in zip(one.rows, other.rows, strict=True) if a.fitted <= 5]
    assert len(early) == 7 and all((a.predicted, a.low, a.high) == (b.predicted, b.low, b.high) for a, b in early)


def test_order_does_not_matter():
    rows = table()
    order = np.random.default_rng(0).permutation(len(rows["N"]))
    shuffled = {name: values[order] for name, values in rows.items()}
    one, other = (leave_largest_out(t, "ceiling", COLUMNS, loss="least-squares", bootstrap=0) for t in (rows, shuffled))
    assert [row.predicted for row in other.rows] == pytest.approx([row.predicted for row in one.rows], rel=1e-5)


def test_coverage_on_planted_ladders():
    """Next runs lie within their 90% interval about as often as that, under a law that is wrong they do not; and the right law
    beats 'as at the last size'."""
    kwargs = {"columns": COLUMNS, "loss": "least-squares", "bootstrap": 80, "least": 5}
    results = [leave_largest_out(table(seed), "ceiling", **kwargs) for seed in range(14)]
    assert 0.82 <= np.mean([result.next_coverage for result in results]) <= 0.97
    assert np.mean([r.next_error for r in results]) < 0.5 * np.mean([r.naive_error for r in results])
    straight = [leave_largest_out(table(seed), "log-linear", **kwargs) for seed in range(3)]
    assert np.mean([result.next_coverage for result in straight]) < 0.5


def test_a_law_of_two_sizes_is_ordered_by_their_product_or_a_column():
    N, D = (g.ravel() for g in np.meshgrid(np.geomspace(1e6, 1e9, 4), np.geomspace(1e8, 1e11, 4)))
    rows = {"N": N, "D": D, "L": 1.7 + 400 / N**0.34 + 1500 / D**0.37, "flops": 6 * N * D, "cost": 1 / N}
    columns = {"N": "N", "D": "D", "L": "L"}
    product = leave_largest_out(rows, "chinchilla", columns, bootstrap=0, fits=2)
    assert product.by == "N*D" and product.mean_error < 1e-4
    by_flops = leave_largest_out(rows, "chinchilla", columns, bootstrap=0, fits=2, by="flops")
    assert [row.predicted for row in by_flops.rows] == pytest.approx([row.predicted for row in product.rows])
    assert len({row.fitted for row in by_flops.rows}) == 2
    by_data = leave_largest_out(rows, "chinchilla", columns, bootstrap=0, by="D")
    assert {row.fitted for row in by_data.rows} == {2, 3} and {row.runs for row in by_data.rows} == {4}
    assert all(row.sizes["N"] == pytest.approx(np.sqrt(1e15)) for row in by_data.rows)


def test_json_and_the_number_of_fits():
    result = leave_largest_out(table(), "log-linear", COLUMNS, bootstrap=20, fits=2)
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert {row["fitted"] for row in document["rows"]} == {3, 7}
    assert {"mean_error", "next_error", "naive_error", "bias", "coverage", "interval", "by"} <= document.keys()
    assert document["rows"][0].keys() >= {"predicted", "observed", "error", "covered", "distance", "low", "high", "steps"}


def test_a_fit_that_cannot_be_made_is_told_and_the_others_stay():
    rows = table(seeds=1)
    rows["R"][:4] = 0.05
    result = leave_largest_out(rows, "log-linear", COLUMNS, bootstrap=0)
    assert result.failed.keys() == {3, 4} and "constant metric" in result.failed[3]
    assert {row.fitted for row in result.rows} == {5, 6, 7}


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        ({}, {"least": 8}, "8 distinct sizes; leave-largest-out needs 8 to fit and a larger one to predict"),
        ({}, {"interval": 90}, "interval 90 is not between 0 and 1"),
        ({}, {"fits": 0}, "fits 0 must be 1 or more"),
        ({}, {"by": "flop"}, "no column 'flop'"),
        ({}, {"columns": {"N": "N"}}, "needs columns N, R; no R"),
        ({"R": np.append(np.geomspace(0.1, 0.2, 23), 0.0)}, {"loss": "least-squares", "columns": COLUMNS}, ""),
        ({"R": np.repeat(np.geomspace(0.1, 0.2, 8) * [1, 1, 1, 1, 1, 1, 1, 0], 3)}, {"loss": "least-squares"}, "the metric is 0"),
        ({"R": np.repeat([0.1, 0.2], [21, 3])}, {}, "no fit to the smaller sizes could be made"),
    ],
)
def test_tables_and_requests_that_carry_none(change, kwargs, message):
    request = {"columns": COLUMNS, "bootstrap": 0} | kwargs
    if not message:
        assert leave_largest_out(table() | change, "log-linear", **request).rows
        return
    with pytest.raises(FitError) as error:
        leave_largest_out(table() | change, "log-linear", **request)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_olmo_ladder():
    """Bhagia et al. 2024: the small models' fit predicts the loss of 7B-4T by -1.98% and of 13B-5T by -3.83%."""
    path = SHARED / "olmo_ladder" / "ladder_final_points_movavg5.csv"
    if not path.is_file():
        pytest.skip("shared/data/fit/olmo_ladder is not here")
    rows = list(csv.DictReader(path.open()))
    names = {"N": "N", "D": "D", "L": "eval/c4_en-validation/CrossEntropyLoss"}
    points = {role: np.array([float(row[name]) for row in rows]) for role, name in names.items()}
    result = leave_largest_out(points, "chinchilla", {role: role for role in names}, delta=1e-3, bootstrap=0, by="N")
    seven, thirteen = (row for row in result.rows if row.fitted == 4)
    assert (seven.steps, thirteen.steps) == (1, 2)
    assert seven.error == pytest.approx(-0.0198, abs=5e-5)
    assert thirteen.error == pytest.approx(-0.038348, abs=2e-5) and thirteen.predicted == pytest.approx(2.34439, abs=1e-5)
    train = points["N"] < 2e9
    small = {role: values[train] for role, values in points.items()}
    fit = fit_law(small, "chinchilla", {role: role for role in names}, delta=1e-3)
    assert fit.n == 16 and np.mean(np.abs(fit.predict(small).value / small["L"] - 1)) == pytest.approx(0.0024731, abs=5e-6)
    assert thirteen.distance > 1  # further beyond the ladder, in N and in D, than the ladder is long in N


def test_matches_fit_law_on_the_last_cut():
    rows = table()
    result = leave_largest_out(rows, "ceiling", COLUMNS, loss="least-squares", bootstrap=50, seed=3)
    inside = rows["N"] < LADDER[-1] * 0.99
    fit = fit_law({name: v[inside] for name, v in rows.items()}, "ceiling", COLUMNS, loss="least-squares", bootstrap=50, seed=3)
    last = result.rows[-1]
    near = fit.predict({"N": LADDER[-1:]}, new_run=True)
    assert (last.fitted, last.predicted) == (7, pytest.approx(near.value[0], rel=1e-9))
    held = rows["R"][~inside]
    assert last.covered == pytest.approx(np.mean((near.low[0] <= held) & (held <= near.high[0])), abs=0.34)


def test_bounds_fixed_values_and_weights_are_those_of_each_fit():
    rows = table()
    rows["w"] = np.linspace(1, 3, len(rows["N"]))
    options = {"bounds": {"a": (0.1, 0.9)}, "fixed": {"R0": 0.1}, "weights": "w"}
    result = leave_largest_out(rows, "ceiling", COLUMNS, loss="least-squares", bootstrap=0, **options)
    assert min(row.fitted for row in result.rows) == 3  # two are free, and one more
    first = next(row for row in result.rows if row.fitted == 4 and row.steps == 1)
    small = {name: values[rows["N"] < LADDER[4] * 0.99] for name, values in rows.items()}
    by_hand = fit_law(small, "ceiling", COLUMNS, loss="least-squares", **options)
    assert first.predicted == pytest.approx(by_hand.predict({"N": LADDER[[4]]}).value[0], rel=1e-9)
    weighted = leave_largest_out(rows, "ceiling", COLUMNS, loss="least-squares", bootstrap=20, weights="replicates")
    assert weighted.next_error < 0.05
