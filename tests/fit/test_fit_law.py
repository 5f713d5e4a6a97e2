"""Laws recovered from planted tables, and what must not change the answer."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.special import ndtri

from fit import FitError, explain, fit_law
from fit.laws import LAWS
from fit.problem import LOSSES, Problem, local
from fit.solve import solve, solve_tables
from fit.uncertainty import tail

LADDER = np.geomspace(3e5, 3e8, 10)
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "fit"


def close(left, right, rel=1e-4):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=rel), name


def planted() -> dict[str, tuple[dict[str, float], dict[str, np.ndarray], np.ndarray]]:
    """For each law: parameters, sizes and the metric without noise."""
    N, D = (g.ravel() for g in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
    both = {
        "power": ({"A": 40.0, "a": 0.2}, lambda p: p["A"] / N ** p["a"]),
        "power-floor": ({"E": 1.5, "A": 90.0, "a": 0.3}, lambda p: p["E"] + p["A"] / N ** p["a"]),
        "ceiling": ({"R0": 0.09, "A": 3.0, "a": 0.35}, lambda p: p["R0"] - p["A"] / N ** p["a"]),
        "log-linear": ({"c": -0.02, "g": 0.004}, lambda p: p["c"] + p["g"] * np.log2(N)),
        "hinge": ({"c": -0.02, "g": 0.004, "N0": 4e7}, lambda p: p["c"] + p["g"] * np.log2(np.minimum(N, p["N0"]))),
        "broken": (
            {"E": 1.2, "A": 60.0, "a": 0.25, "b": 0.3, "N0": 3e7},
            lambda p: p["E"] + p["A"] / (N ** p["a"] * (1 + (N / p["N0"]) ** 4) ** (p["b"] / 4)),
        ),
        "two-term": (
            {"R0": 0.3, "A": 3.0, "B": 20.0, "a": 0.3, "b": 0.35},
            lambda p: p["R0"] - p["A"] / N ** p["a"] - p["B"] / D ** p["b"],
        ),
        "chinchilla": (
            {"E": 1.7, "A": 400.0, "B": 1500.0, "a": 0.34, "b": 0.37},
            lambda p: p["E"] + p["A"] / N ** p["a"] + p["B"] / D ** p["b"],
        ),
    }
    roles = {"two-term": {"N_SI": N, "N_CF": D}, "chinchilla": {"N": N, "D": D}}
    return {name: (params, roles.get(name, {"N": N}), curve(params)) for name, (params, curve) in both.items()}


@pytest.mark.parametrize("name", sorted(planted()))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_each_law_is_recovered_by_each_loss(name, loss):
    params, sizes, metric = planted()[name]
    response = LAWS[name].response
    columns = {role: role for role in (*LAWS[name].sizes, response)}
    if name == "broken":  # five parameters, of which six sizes would be one to spare
        N = np.geomspace(1e6, 1e9, 12)
        sizes, metric = {"N": N}, 1.2 + 60.0 / (N**0.25 * (1 + (N / 3e7) ** 4) ** 0.075)
    result = fit_law({**sizes, response: metric}, name, columns, loss=loss)
    close(result.params, params, 1e-4 if name != "broken" else 2e-2)
    assert "perfect" in result.warnings or name == "broken"


def test_the_papers_couplings_are_recovered_where_the_design_varies_them():
    """A design that moves all sizes apart, as the paper's own does not."""
    rng = np.random.default_rng(0)
    sizes = {role: rng.permutation(np.geomspace(1e6, 1e9, 40)) for role in ("N_RS", "N_LLM", "N_QT")}
    S = sizes["N_RS"] + 0.3 * sizes["N_LLM"] + 0.05 * sizes["N_QT"]
    R = 0.3 - 20.0 / S**0.4 - 2.0 / sizes["N_RS"] ** 0.35
    result = fit_law({**sizes, "R": R}, "sid", {role: role for role in (*sizes, "R")}, loss="least-squares")
    close(result.params, {"R0": 0.3, "A": 20.0, "B": 2.0, "a": 0.4, "b": 0.35, "g1": 0.3, "g2": 0.05}, 1e-2)


@settings(max_examples=25, deadline=None)
@given(
    R0=st.floats(0.02, 0.5),
    share=st.floats(0.2, 0.9),
    a=st.floats(0.12, 0.9),
    seed=st.integers(0, 10_000),
)
def test_ceiling_is_recovered_within_its_noise(R0, share, a, seed):
    """Half a part in a thousand of noise: the curve is recovered to that, and the noiseless parameters fit no better."""
    A = share * R0 * LADDER[0] ** a
    truth = R0 - A / LADDER**a
    R = truth * (1 + 5e-4 * np.random.default_rng(seed).normal(size=10))
    result = fit_law({"N": LADDER, "R": R}, "ceiling", {"N": "N", "R": "R"}, loss="least-squares")
    assert result.objective <= np.sum((truth - R) ** 2) * (1 + 1e-9)
    assert result.predict({"N": LADDER}).value == pytest.approx(truth, rel=3e-3)
    assert result.gradient < 1e-6


noisy = st.builds(
    lambda seed, a: (0.1 - 0.06 * (LADDER / 3e5) ** -a) * (1 + 0.01 * np.random.default_rng(seed).normal(size=10)),
    st.integers(0, 10_000),
    st.floats(0.2, 0.6),
)


@settings(max_examples=12, deadline=None)
@given(R=noisy, sizes=st.floats(1e-6, 1e6), metric=st.floats(1e-3, 1e3), loss=st.sampled_from(sorted(LOSSES)))
def test_units_do_not_matter(R, sizes, metric, loss):
    columns = {"N": "N", "R": "R"}
    one = fit_law({"N": LADDER, "R": R}, "ceiling", columns, loss=loss)
    other = fit_law({"N": LADDER * sizes, "R": R * metric}, "ceiling", columns, loss=loss)
    a = one.params["a"]
    assert other.params["a"] == pytest.approx(a, rel=1e-3)
    assert other.params["R0"] == pytest.approx(one.params["R0"] * metric, rel=1e-3)
    here = {"N": LADDER * sizes}
    assert other.predict(here).value == pytest.approx(one.predict({"N": LADDER}).value * metric, rel=1e-4)
    assert [w for w in other.warnings if not w.startswith("percent")] == list(one.warnings)


@settings(max_examples=12, deadline=None)
@given(R=noisy, order=st.permutations(range(10)), loss=st.sampled_from(sorted(LOSSES)))
def test_order_and_duplication_do_not_matter(R, order, loss):
    columns, order = {"N": "N", "R": "R"}, list(order)
    one = fit_law({"N": LADDER, "R": R}, "ceiling", columns, loss=loss)
    shuffled = fit_law({"N": LADDER[order], "R": R[order]}, "ceiling", columns, loss=loss)
    doubled = fit_law({"N": np.tile(LADDER, 2), "R": np.tile(R, 2)}, "ceiling", columns, loss=loss)
    assert shuffled.objective == pytest.approx(one.objective, rel=1e-6)
    assert doubled.objective == pytest.approx(2 * one.objective, rel=1e-6)
    close(shuffled.params, one.params, 2e-3)
    close(doubled.params, one.params, 2e-3)


def test_gradient_and_hessian_are_those_of_the_cost():
    rng = np.random.default_rng(0)
    logs = {"N": rng.normal(size=12), "D": rng.normal(size=12)}
    for loss in ("log-huber", "huber", "least-squares"):
        problem = Problem(
            LAWS["chinchilla"],
            logs,
            rng.uniform(1, 3, (1, 12)),
            rng.uniform(1, 2, (1, 12)),
            loss,
            np.inf if loss == "least-squares" else 0.15,
        )
        p = np.array([0.9, 0.5, 0.4, 0.3, 0.6])
        here, step = local(problem, p[None]), 1e-5 * np.eye(5)
        numeric = (problem.cost(problem.residuals(p + step)) - problem.cost(problem.residuals(p - step))) / 2e-5
        assert here.g[0] == pytest.approx(numeric, rel=1e-5, abs=1e-8)
        curve = (local(problem, p + step).g - local(problem, p - step).g) / 2e-5
        assert here.hessian[0] == pytest.approx(curve, rel=1e-4, abs=1e-6)


def test_no_worse_than_scipys_multistart():
    rng = np.random.default_rng(4)
    N = np.tile(np.geomspace(1e6, 1e9, 6), 2)
    L = (1.5 + 90 / N**0.3) * np.exp(0.02 * rng.normal(size=12))
    ours = fit_law({"N": N, "L": L}, "power-floor", {"N": "N", "L": "L"}, delta=0.01).objective
    X = N / np.exp(np.log(N).mean())
    theirs = min(
        least_squares(
            lambda p: np.log(p[0] + p[1] * X ** -p[2]) - np.log(L),
            [E, L.mean() - E, a],
            loss="huber",
            f_scale=0.01,
            bounds=([0, 0, 0.01], [np.inf, np.inf, 5]),
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
        ).cost
        for E in (0.1, 1.0, 1.7)
        for a in (0.1, 0.5, 1.5)
    )
    assert ours <= theirs * (1 + 1e-7)


def _epoch():
    path = SHARED / "epoch_chinchilla" / "svg_extracted_data.csv"
    if not path.is_file():
        pytest.skip("shared/data/fit/epoch_chinchilla is not here")
    rows = list(csv.DictReader(path.open()))
    N, C, L = (np.array([float(r[name]) for r in rows]) for name in ("Model Size", "Training FLOP", "loss"))
    keep = np.sort(L)[-5] > L
    return {"N": N[keep], "D": (C / 6 / N)[keep], "L": L[keep]}


def test_epochs_chinchilla_replication():
    """Besiroglu et al. 2024: the optimum of their own objective, and their printed point estimate, which is the L1 fit."""
    columns = {"N": "N", "D": "D", "L": "L"}
    result = fit_law(_epoch(), "chinchilla", columns, loss="log-huber", delta=1e-3)
    assert result.n == 240
    assert result.objective <= 1.0182741e-3
    close(result.params, {"E": 1.81722, "A": 477.83, "B": 2143.4, "a": 0.34731, "b": 0.36717}, 1e-3)
    assert result.warnings == ()
    l1 = fit_law(_epoch(), "chinchilla", columns, loss="l1")
    assert l1.objective == pytest.approx(1.12949466, rel=1e-7)
    close(l1.params, {"E": 1.81686, "A": 482.01, "B": 2085.43, "a": 0.34781, "b": 0.36585}, 1e-4)


def test_epochs_intervals():
    """Their published 95% percentile intervals, within the Monte Carlo error of 400 draws."""
    result = fit_law(_epoch(), "chinchilla", {"N": "N", "D": "D", "L": "L"}, bootstrap=400, seed=1)
    published = {"E": (1.769, 1.871), "a": (0.317, 0.373), "b": (0.331, 0.415)}
    for name, (low, high) in published.items():
        width = high - low
        assert result.intervals[name] == pytest.approx((low, high), abs=0.15 * width), name
    assert result.draws.shape == (400, 5)


@pytest.mark.parametrize(
    ("experiment", "objective"),
    [
        ("ml_scalefit__massivetext__chinchilla", 13.09),
        ("llama_3__raw_loss", 2.276),
        ("marin_202603__comma__llama_2", 22.91),
        ("marin_202603__dclm__llama_2", 22.84),
        ("marin_202603__nemotron__llama_2", 22.61),
    ],
)
def test_isoflops_objectives(experiment, objective):
    """Open-Athena's compilation: mean Huber on linear loss, to the digits of its README."""
    path = SHARED / "isoflops" / "data_isoflops_transform_isoflops.csv"
    if not path.is_file():
        pytest.skip("shared/data/fit/isoflops is not here")
    rows = [r for r in csv.DictReader(path.open()) if r["experiment"] == experiment]
    table = {role: [float(r[name]) for r in rows] for role, name in (("N", "params"), ("D", "tokens"), ("L", "loss"))}
    result = fit_law(table, "chinchilla", {"N": "N", "D": "D", "L": "L"}, loss="huber", delta=1e-3)
    digit = 0.001 if objective < 10 else 0.01
    assert result.objective / result.n * 1e6 == pytest.approx(objective, abs=digit / 2)
    if "chinchilla" in experiment:
        assert result.n == 124 and result.params["a"] == pytest.approx(0.3692, abs=1e-3)


def test_bootstrap_by_seeds_rows_and_residuals():
    rng = np.random.default_rng(0)
    N, seed = np.repeat(LADDER[::2], 3), np.tile([0, 1, 2], 5)
    R = (0.1 - 0.06 * (N / 3e5) ** -0.3) * (1 + 0.01 * rng.normal(size=15))
    columns = {"N": "N", "R": "R"}
    kwargs = {"loss": "least-squares", "bootstrap": 60, "seed": 3}
    seeds = fit_law({"N": N, "R": R, "seed": seed}, "ceiling", columns, **kwargs)
    assert seeds.bootstrap == {"method": "seeds", "draws": 60, "seed": 3, "dof": 10}
    assert fit_law({"N": N, "R": R, "seed": seed}, "ceiling", columns, **kwargs).intervals == seeds.intervals
    assert fit_law({"N": N, "R": R, "run": seed}, "ceiling", columns, cluster="run", **kwargs).intervals == seeds.intervals
    rows = fit_law({"N": N, "R": R, "seed": seed}, "ceiling", columns, cluster="rows", **kwargs)
    assert rows.bootstrap["method"] == "rows" and rows.draws.shape == (60, 3)
    one = fit_law({"N": LADDER, "R": R[::3].repeat(2), "seed": np.zeros(10)}, "ceiling", columns, **kwargs)
    assert one.bootstrap["method"] == "residuals" and "seeds:1" in one.warnings


def test_the_seed_bootstrap_has_the_variance_of_the_replicates():
    """For the log-linear law the draws' slope has the textbook variance s^2/Sxx, s^2 pooled over the sizes; uncorrected it would
    be 2/3 of it. The metric hardly varies, so that it does not matter with which power of it the noise may grow."""
    rng = np.random.default_rng(5)
    N, seed = np.repeat(LADDER, 3), np.tile([0, 1, 2], 10)
    R = 1.0 + 0.004 * np.log2(N / 3e5) + 0.001 * rng.normal(size=30)
    draws = fit_law(
        {"N": N, "R": R, "seed": seed}, "log-linear", {"N": "N", "R": "R"}, loss="least-squares", bootstrap=1500
    ).draws
    x = np.log2(N) - np.log2(N).mean()
    pooled = np.mean([np.var(R[size == N], ddof=1) for size in LADDER])
    assert np.var(draws[:, 1]) == pytest.approx(pooled / np.sum(x**2), rel=0.12)


def test_few_replicates_widen_the_interval_as_students_t_does():
    """With 12 degrees of freedom a 90% interval reaches to 1.78229 standard errors, with none to estimate to 1.64485."""
    assert tail(0.9, None) == pytest.approx(0.05)
    assert ndtri(tail(0.9, 12)) == pytest.approx(-1.78229, abs=1e-5)


def test_predictions_have_intervals_and_say_how_far_they_reach():
    rng = np.random.default_rng(0)
    table = {"params": np.repeat(LADDER, 3), "seed": np.tile([0, 1, 2], 10)}
    table["recall"] = (0.1 - 0.06 * (table["params"] / 3e5) ** -0.3) * (1 + 0.01 * rng.normal(size=30))
    result = fit_law(table, "ceiling", {"N": "params", "R": "recall"}, loss="least-squares", bootstrap=100)
    inside = result.predict({"params": [1e6, 1e8]})
    assert inside.warnings == () and np.all(inside.low < inside.value) and np.all(inside.value < inside.high)
    outside = result.predict(pa.table({"N": [3e8, 9.6e8]}), interval=0.5)
    assert outside.warnings == ("extrapolates:3.2x",)
    wide = result.predict({"N": [9.6e8]}, interval=0.95)
    assert wide.high[0] - wide.low[0] > outside.high[1] - outside.low[1]
    document = result.to_json()
    assert {"law", "params", "objective", "n", "warnings", "saturation"} <= document.keys()
    assert document["params"]["a"].keys() == {"value", "low", "high", "identified"}
    assert {"verdict", "gain_per_doubling", "low", "high"} <= document["saturation"].keys()


def test_what_the_data_leave_open_is_said():
    rng = np.random.default_rng(1)
    straight = 0.02 + 0.004 * np.log2(LADDER / 3e5) * (1 + 0.01 * rng.normal(size=10))
    columns = {"N": "N", "R": "R"}
    disguised = fit_law({"N": LADDER, "R": straight}, "ceiling", columns, loss="least-squares", bootstrap=50)
    assert "unidentified:R0,A,a" in disguised.warnings  # however narrow the bound makes the intervals of R0 and A
    falling = fit_law({"N": LADDER, "R": straight[::-1]}, "ceiling", columns, loss="least-squares")
    assert "bound:A" in falling.warnings and "unidentified:a" in falling.warnings
    nofloor = fit_law({"N": LADDER, "L": 40 / LADDER**0.2 * (1 + 0.001 * rng.normal(size=10))}, "power", {"N": "N", "L": "L"})
    assert nofloor.warnings == ()
    exact = fit_law({"N": LADDER[:3], "R": straight[:3] * [1, 1.1, 1]}, "ceiling", columns, loss="least-squares")
    assert "no-spare-sizes:3" in exact.warnings
    for code in (*disguised.warnings, *falling.warnings, *exact.warnings):
        assert explain(code) != code


def test_a_floor_of_zero_hits_its_bound():
    L = 40 / LADDER**0.2 - 0.2
    result = fit_law({"N": LADDER, "L": L}, "power-floor", {"N": "N", "L": "L"}, loss="least-squares")
    assert result.params["E"] == 0 and "bound:E" in result.warnings


def test_a_batch_of_tables_is_solved_like_each_alone():
    rng = np.random.default_rng(2)
    logs = {"N": np.log(LADDER), "D": rng.permutation(np.log(LADDER))}
    for law, p in (("ceiling", [1.0, 0.3, 0.3]), ("chinchilla", [1.0, 0.3, 0.3, 0.3, 0.4])):
        fitted = Problem(LAWS[law], logs, np.ones((1, 10)), np.ones((1, 10)), "least-squares", np.inf).fitted(np.array([p]))
        y, ones = fitted * (1 + 0.01 * rng.normal(size=(5, 10))), np.ones((1, 10))
        for loss, delta in (("least-squares", np.inf), ("log-huber", 0.02)):
            batch = solve_tables(Problem(LAWS[law], logs, y, ones, loss, delta), np.array(p), tolerance=1e-9)
            for table, found in zip(y, batch, strict=True):
                alone = Problem(LAWS[law], logs, table[None], ones, loss, delta)
                assert alone.objective(found[None])[0] == pytest.approx(solve(alone).objective, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": [0.1, float("nan"), 0.2, 0.3]}, "row 2: nan is not a finite number"),
        ({"R": [0.1, float("inf"), 0.2, 0.3]}, "row 2: inf is not a finite number"),
        ({"R": ["0.1", "0.2", "n/a", "0.3"]}, "row 3: 'n/a' is not a number"),
        ({"R": ["0.1", "0.2", "", "0.3"]}, "row 3: empty"),
        ({"R": [True, False, True, True]}, "True is not a number"),
        ({"R": [0.1] * 4}, "constant metric"),
        ({"R": [0.0, 0.1, 0.2, 0.3]}, "no logarithm for loss log-huber"),
        ({"N": [1e6, -1e6, 1e7, 1e8]}, "row 2: -1e+06; sizes must be above zero"),
        ({"N": [1e6, 0, 1e7, 1e8]}, "row 2: 0; sizes must be above zero"),
        ({"N": [1e6] * 4}, "has 3 parameters; 1 distinct size cannot carry it"),
        ({"N": [1e6, 1e6, 1e7, 1e7]}, "has 3 parameters; 2 distinct sizes cannot carry it"),
    ],
)
def test_tables_that_cannot_be_fitted(change, message):
    table = {"N": [1e6, 3e6, 1e7, 1e8], "R": [0.1, 0.12, 0.13, 0.135]} | change
    with pytest.raises(FitError) as error:
        fit_law(table, "ceiling", {"N": "N", "R": "R"})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"law": "cieling"}, "unknown law 'cieling'; there are power"),
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"columns": {"N": "N", "L": "R"}}, "needs columns N, R; got L, N"),
        ({"columns": {"N": "n", "R": "R"}}, "no column 'n'"),
        ({"columns": {"N": "N", "R": "Rr"}}, "did you mean 'R'?"),
        ({"loss": "l1", "delta": 0.1}, "delta 0.1 does not fit loss l1"),
        ({"delta": -1.0}, "delta -1.0 does not fit"),
        ({"cluster": "run"}, "no column 'run'"),
        ({"bootstrap": -1}, "bootstrap -1 is negative"),
    ],
)
def test_requests_that_make_no_sense(kwargs, message):
    request = {"law": "ceiling", "columns": {"N": "N", "R": "R"}} | kwargs
    with pytest.raises(FitError) as error:
        fit_law({"N": [1e6, 3e6, 1e7, 1e8], "R": [0.1, 0.12, 0.13, 0.135]}, **request)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("law", ["power", "power-floor", "chinchilla"])
@pytest.mark.parametrize("loss", ["least-squares", "huber"])
def test_a_law_without_negative_values_refuses_them(law, loss):
    table = {"N": LADDER, "D": LADDER[::-1] ** 0.9, "L": -np.arange(1.0, 11.0)}
    columns = {"N": "N", "L": "L"} | ({"D": "D"} if law == "chinchilla" else {})
    with pytest.raises(FitError, match=r"column 'L', row 1: -1; law .* has no values below zero"):
        fit_law(table, law, columns, loss=loss)


def test_a_column_named_twice_is_refused(tmp_path):
    (tmp_path / "twice.csv").write_text("N,R,R\n1,2,3\n2,3,4\n4,4,5\n")
    with pytest.raises(FitError, match="column 'R' is there 2 times"):
        fit_law(tmp_path / "twice.csv", "log-linear", {"N": "N", "R": "R"})


def test_percentages_are_noticed():
    R = 100 * (0.1 - 0.06 * (LADDER / 3e5) ** -0.3)
    assert "percent:R" in fit_law({"N": LADDER, "R": R}, "ceiling", {"N": "N", "R": "R"}).warnings
