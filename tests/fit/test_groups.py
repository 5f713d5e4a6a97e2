"""One law for several groups of rows: what is shared, what is each group's own, and what must not change the answer."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fit import FitError, fit_law, saturation_size
from fit.groups import group_law, group_logs, read_groups
from fit.laws import LAWS
from fit.problem import LOSSES, Problem, jacobian
from fit.solve import best_of, solve
from tests.fit.test_cli import call

LADDER = np.geomspace(1e6, 1e9, 8)
COLUMNS = {"N": "N", "R": "R"}
NAMES = ("beauty", "games", "toys")


def planted(
    a: tuple[float, ...] = (0.35, 0.35, 0.35), noise: float = 0.01, seed: int = 0, runs: int = 2, names: tuple[str, ...] = NAMES
) -> dict[str, np.ndarray]:
    """A ceiling per group: R0 of .1, .3, .2; nine tenths of it to gain over the ladder's first size, exponent ``a``."""
    rng, g = np.random.default_rng(seed), len(a)
    N, which = np.tile(np.repeat(LADDER, runs), g), np.repeat(np.arange(g), len(LADDER) * runs)
    R0 = np.array([0.1, 0.3, 0.2])[which]
    R = R0 * (1 - 0.6 * (N / LADDER[0]) ** -np.array(a)[which]) * (1 + noise * rng.normal(size=len(N)))
    return {"N": N, "R": R, "seed": np.tile(np.arange(runs), len(LADDER) * g), "dataset": np.array(names)[which]}


def of(table, name):
    rows = table["dataset"] == name
    return {key: values[rows] for key, values in table.items()}


def fit(table, shared=("a",), law="ceiling", columns=COLUMNS, **more):
    return fit_law(table, law, columns, groups="dataset", shared=shared, **{"loss": "least-squares", **more})


def same(left, right, rel=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=rel, abs=1e-12), name


def test_a_shared_exponent_is_recovered_and_each_group_keeps_its_ceiling():
    result = fit(planted(noise=0.0))
    assert list(result.params) == [*(f"R0[{g}]" for g in NAMES), *(f"A[{g}]" for g in NAMES), "a"]
    assert result.params["a"] == pytest.approx(0.35, rel=1e-6)
    assert [result.params[f"R0[{g}]"] for g in NAMES] == pytest.approx([0.1, 0.3, 0.2], rel=1e-6)
    assert result.params["A[games]"] == pytest.approx(0.3 * 0.6 * 1e6**0.35, rel=1e-5)
    assert result.reduced is None and result.saturation is None and "perfect" in result.warnings


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), loss=st.sampled_from(sorted(LOSSES)))
def test_nothing_shared_is_each_group_alone(seed, loss):
    table = planted((0.2, 0.35, 0.6), seed=seed)
    delta = 1e-3 if loss == "log-huber" else 2e-4 if loss == "huber" else None
    whole = fit(table, (), loss=loss, delta=delta)
    alone = {name: fit_law(of(table, name), "ceiling", COLUMNS, loss=loss, delta=delta) for name in NAMES}
    rel = 1e-5 if loss == "l1" else 1e-6
    for name in NAMES:
        same(whole.group(name).params, alone[name].params, rel)
        assert whole.group(name).objective == pytest.approx(alone[name].objective, rel=rel)
    assert whole.objective == pytest.approx(sum(one.objective for one in alone.values()), rel=rel)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(NAMES), loss=st.sampled_from(["log-huber", "least-squares"]))
def test_names_and_order_of_groups_do_not_matter(seed, order, loss):
    table = planted(seed=seed)
    renamed = {**table, "dataset": np.array([order[NAMES.index(name)] for name in table["dataset"]])}
    shuffled = np.random.default_rng(seed).permutation(len(table["N"]))
    one, other = fit(table, loss=loss), fit({key: values[shuffled] for key, values in renamed.items()}, loss=loss)
    assert other.params["a"] == pytest.approx(one.params["a"], rel=1e-6)
    for name, new in zip(NAMES, order, strict=True):
        same(one.group(name).params, other.group(new).params)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.floats(1e-4, 1e4), metric=st.floats(1e-2, 1e2), loss=st.sampled_from(sorted(LOSSES)))
def test_units_do_not_matter(seed, sizes, metric, loss):
    table = planted(seed=seed)
    one = fit(table, loss=loss)
    other = fit({**table, "N": table["N"] * sizes, "R": table["R"] * metric}, loss=loss)
    assert other.params["a"] == pytest.approx(one.params["a"], rel=1e-4)
    for name in NAMES:
        assert other.params[f"R0[{name}]"] == pytest.approx(one.params[f"R0[{name}]"] * metric, rel=1e-4)
    # in one group's own units, too: what is shared is an exponent
    rows = table["dataset"] == "games"
    third = fit({**table, "N": np.where(rows, table["N"] * sizes, table["N"])}, loss=loss)
    assert third.params["a"] == pytest.approx(one.params["a"], rel=1e-4)


@pytest.mark.parametrize("shared", [("a",), ("R0", "a"), ("R0", "A", "a")])
def test_twice_the_same_group_is_the_group(shared):
    one = of(planted(), "games")
    both = {key: np.concatenate([values, values]) for key, values in one.items()}
    both["dataset"] = np.repeat(["one", "other"], len(one["N"]))
    alone, whole = fit_law(one, "ceiling", COLUMNS, loss="least-squares"), fit(both, shared)
    same(whole.group("one").params, alone.params)
    same(whole.group("other").params, alone.params)
    assert whole.objective == pytest.approx(2 * alone.objective)


@pytest.mark.parametrize(
    ("name", "shared"), [("ceiling", ("A",)), ("ceiling", ("R0",)), ("hinge", ("N0", "c")), ("two-term", ("A", "b"))]
)
def test_derivatives(name, shared):
    law, rng = LAWS[name], np.random.default_rng(1)
    sizes = {role: np.exp(rng.uniform(np.log(1e6), np.log(1e9), 30)) for role in law.sizes}
    groups = read_groups(pa.table({"dataset": np.repeat(NAMES, 10)}), "dataset", law, shared)
    grouped, _ = group_law(law, sizes, groups, {}, {})
    logs = group_logs({role: np.log(values) for role, values in sizes.items()}, groups)
    problem = Problem(grouped, logs, rng.uniform(0.5, 1.5, (1, 30)), np.ones((1, 30)), "least-squares", np.inf)
    start = {"exponent": (0.2, 0.6), "break": (np.log(1e7), np.log(1e8))}
    theta = [rng.uniform(*start[t.kind]) for t in grouped.thetas]
    p = np.array([*rng.uniform(0.5, 1.0, len(grouped.terms)), *theta])
    J = jacobian(problem, p[None])[0]
    for i in range(len(p)):
        step = np.zeros(len(p))
        step[i] = 1e-6
        numeric = (problem.residuals((p + step)[None]) - problem.residuals((p - step)[None]))[0] / 2e-6
        assert J[i] == pytest.approx(numeric, rel=1e-5, abs=1e-7), grouped.params[i]
    plain = dict(zip(grouped.params, problem.plain(p[None])[0], strict=True))
    if name == "ceiling":  # raw parameters give the curve that the centred ones do
        own = {
            key: np.array([plain.get(key, plain.get(f"{key}[{g}]")) for g in np.repeat(NAMES, 10)]) for key in ("R0", "A", "a")
        }
        assert own["R0"] - own["A"] * sizes["N"] ** -own["a"] == pytest.approx(problem.fitted(p[None])[0], rel=1e-9)


@pytest.mark.parametrize("loss", ["least-squares", "log-huber"])
@pytest.mark.parametrize("shared", [("a",), ("R0",), ("A",), ("R0", "a"), ("A", "a"), ("R0", "A", "a")])
def test_no_random_start_finds_a_better_optimum(shared, loss):
    """Also where the groups differ in what they are said to share."""
    table = planted((0.2, 0.35, 0.6), noise=0.03, seed=5, runs=1)
    groups = read_groups(pa.table({"dataset": table["dataset"]}), "dataset", LAWS["ceiling"], shared)
    law, _ = group_law(LAWS["ceiling"], {"N": table["N"]}, groups, {}, {})
    logs, delta = group_logs({"N": np.log(table["N"])}, groups), 1e-3 if loss == "log-huber" else np.inf
    problem = Problem(law, logs, table["R"][None] / 0.2, np.ones((1, len(table["R"]))), loss, delta)
    rng, m = np.random.default_rng(0), len(law.terms)
    candidates = [
        [*(rng.uniform(0.3, 2.0) if t.name.startswith("R0") else rng.uniform(0.0, 0.3) for t in law.terms), *np.exp(exponents)]
        for exponents in rng.uniform(np.log(0.03), np.log(3.0), (400, len(law.params) - m))
    ]
    candidates = [c for c in np.array(candidates) if np.isfinite(problem.cost(problem.residuals(c[None])))[0]]
    candidates = candidates[:25]
    assert len(candidates) >= 15
    assert solve(problem).objective <= best_of(problem, np.array(candidates)).objective * (1 + 1e-6)


def test_sharing_what_is_equal_shortens_the_interval_and_aicc_prefers_it():
    table = planted(noise=0.01, runs=3, seed=2)
    together, apart = fit(table, bootstrap=300), fit(table, (), bootstrap=300)
    low, high = together.intervals["a"]
    assert low < 0.35 < high
    for name in NAMES:
        own_low, own_high = apart.intervals[f"a[{name}]"]
        assert high - low < own_high - own_low
    assert together.aicc < apart.aicc
    different = planted((0.15, 0.4, 0.8), noise=0.01, runs=3)
    assert fit(different).aicc > fit(different, ()).aicc + 10


def test_aicc_counts_the_parameters_that_are_free():
    table = planted(noise=0.01)
    n, result, held = len(table["N"]), fit(table), fit(table, fixed={"a": 0.35})
    for one, k in ((result, 8), (held, 7)):
        assert one.aicc == pytest.approx(n * np.log(one.objective / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    assert result.objective < held.objective < 1.2 * result.objective


def test_a_bootstrap_of_few_rows_never_loses_a_group():
    table = planted(runs=1)
    for cluster in ("rows", "sizes"):
        result = fit(table, bootstrap=60, cluster=cluster)
        assert np.isfinite(result.draws).all()
        assert result.draws[:, 0] == pytest.approx(result.params["R0[beauty]"], rel=0.5)
        assert len(np.unique(result.draws[:, -1])) > 50
    assert np.array_equal(fit(table, bootstrap=20, cluster="rows").draws, fit(table, bootstrap=20, cluster="rows").draws)


def test_bounds_and_fixed_values_of_all_groups_and_of_one():
    table = planted((0.2, 0.35, 0.6))
    result = fit(table, (), fixed={"R0[games]": 0.31}, bounds={"a": (0.3, 0.5), "a[toys]": (0.55, 0.56)})
    assert result.params["R0[games]"] == pytest.approx(0.31)
    assert 0.3 <= result.params["a[beauty]"] <= 0.5 and 0.55 <= result.params["a[toys]"] <= 0.56
    assert "bound:a[beauty]" in " ".join(result.warnings)
    alone = fit_law(of(table, "games"), "ceiling", COLUMNS, loss="least-squares", fixed={"R0": 0.31}, bounds={"a": (0.3, 0.5)})
    same(result.group("games").params, alone.params)
    assert fit(table, fixed={"a": 0.4}).params["a"] == 0.4


def test_a_formula_and_a_law_of_two_sizes():
    rng = np.random.default_rng(0)
    N, D = np.tile(LADDER, 6), np.concatenate([rng.permutation(np.tile(LADDER, 3)) for _ in range(2)])
    lab = np.repeat(["here", "there"], 24)
    L = np.where(lab == "here", 1.7, 2.0) + 400 / N**0.34 + np.where(lab == "here", 900.0, 1500.0) / D**0.37
    table = {"N": N, "D": D, "L": L, "dataset": lab}
    columns = {"N": "N", "D": "D", "L": "L"}
    result = fit(table, ("A", "a", "b"), "chinchilla", columns)
    expected = {"E[here]": 1.7, "E[there]": 2.0, "A": 400.0, "B[here]": 900.0, "B[there]": 1500.0, "a": 0.34, "b": 0.37}
    same(result.params, expected, 1e-4)
    written = fit(table, ("A", "a", "b"), "L = E + A/N**a + B/D**b", columns)
    assert {name: written.params[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_what_the_data_leave_open_is_said_of_its_group():
    """One group has no term to speak of; the others do."""
    table = planted(noise=0.002, runs=3)
    flat = table["dataset"] == "toys"
    table["R"][flat] = 0.2 * (1 + 0.002 * np.random.default_rng(3).normal(size=flat.sum()))
    result = fit(table, (), bootstrap=100)
    assert "a[toys]" in result.unidentified
    assert not {"a[beauty]", "a[games]", "R0[games]"} & set(result.unidentified)
    assert set(result.group("toys").unidentified) <= {"R0", "A", "a"} and "a" in result.group("toys").unidentified
    assert result.group("games").unidentified == ()
    assert set(result.shares) == {f"A[{name}]" for name in NAMES}
    assert result.shares["A[games]"] == pytest.approx(1.0, abs=0.1)


def test_a_size_that_stands_still_in_one_group():
    rng = np.random.default_rng(2)
    sizes = {
        role: np.concatenate([rng.permutation(np.geomspace(1e6, 1e9, 20)) for _ in range(2)]) for role in ("N_LORA", "N_LLM")
    }
    group = np.repeat(["free", "still"], 20)
    sizes["N_LLM"][20:] = 1e8
    R = 0.3 - 20.0 / (sizes["N_LORA"] + 0.3 * sizes["N_LLM"]) ** 0.4
    result = fit(
        {**sizes, "R": R, "dataset": group},
        (),
        "R0 - A/(N_LORA + g*N_LLM)**a",
        {"N_LORA": "N_LORA", "N_LLM": "N_LLM", "R": "R"},
    )
    assert "constant:N_LLM[still]" in result.warnings
    assert "g[still]" in result.unidentified and result.params["g[still]"] == 0.0
    assert result.params["g[free]"] == pytest.approx(0.3, rel=1e-3)
    assert "constant:N_LLM" in result.group("still").warnings
    assert not [w for w in result.group("free").warnings if w.startswith("constant")]


def test_predictions_and_the_law_of_one_group():
    table = planted(runs=3)
    result = fit(table, bootstrap=100)
    rows = {"N": np.array([1e9, 4e9, 1e7, 1e9]), "dataset": np.array(["toys", "beauty", "toys", "games"])}
    ahead = result.predict(rows)
    toys = result.group("toys")
    assert ahead.value[[0, 2]] == pytest.approx(toys.predict({"N": [1e9, 1e7]}).value)
    assert ahead.low[1] == pytest.approx(result.group("beauty").predict({"N": [4e9]}).low[0])
    assert ahead.warnings == ("extrapolates:4.0x",) and ahead.distance[1] > 0 == ahead.distance[0]
    assert np.all(result.predict(rows, new_run=True).high > ahead.high)
    assert result.params["A[toys]"] == toys.params["A"] and toys.n == 24 and toys.groups is None
    assert saturation_size(toys, of(table, "toys")).size > 0
    with pytest.raises(FitError, match=r"row 2: no group 'books' in this fit; there are beauty, games, toys"):
        result.predict({"N": [1e9, 1e9], "dataset": ["toys", "books"]})
    with pytest.raises(FitError, match="no column 'dataset'"):
        result.predict({"N": [1e9]})
    with pytest.raises(FitError, match="no group 'books'"):
        result.group("books")
    with pytest.raises(FitError, match=r"result.group\('beauty'\)"):
        result.curves({"N": np.log(LADDER)})


def test_groups_that_are_numbers():
    table = {**planted(), "dataset": np.repeat([2.0, 10.0, 1.0], 16)}
    result = fit(table)
    assert result.groups.levels == ("1", "2", "10")
    assert result.predict({"N": [1e9], "dataset": [10]}).value[0] == pytest.approx(0.3 * 0.95, rel=0.05)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({}, {"groups": "data"}, "no column 'data'; did you mean 'dataset'?"),
        ({}, {"groups": None}, "shared: a can be shared between groups only"),
        ({}, {"shared": ("b",)}, "law ceiling has no parameter 'b'; it has R0, A, a"),
        ({}, {"shared": ("a", "a")}, "has a parameter twice"),
        ({}, {"fixed": {"a[toys]": 0.3}}, "a is shared by all groups"),
        (
            {},
            {"fixed": {"A[books]": 0.3}},
            r"no parameter 'A\[books\]'; it has R0, A, a, and of each group .* such as R0\[beauty\]",
        ),
        ({"dataset": np.repeat("toys", 48)}, {}, "one group only"),
        ({"dataset": np.repeat(["a,b", "c[d]", "e"], 16)}, {}, r"a group cannot be named 'a,b'; rename it"),
        ({"dataset": np.repeat(["x", "", "e"], 16)}, {}, "row 17: empty"),
        (
            {"dataset": np.array(["one", *["two"] * 47])},
            {},
            "group 'one': 1 distinct size cannot carry the 2 parameters that are its own",
        ),
        ({"R": np.where(np.arange(48) < 16, 0.1, planted()["R"])}, {}, "group 'beauty': every value is 0.1; a constant metric"),
    ],
)
def test_mistakes_are_named_in_one_line(change, how, message):
    with pytest.raises(FitError, match=message) as caught:
        fit_law({**planted(), **change}, "ceiling", COLUMNS, **{"groups": "dataset", "shared": ("a",), **how})
    assert "\n" not in str(caught.value)


def test_all_groups_together_must_carry_the_law():
    table = planted(runs=1)
    few = {key: values[np.isin(table["N"], LADDER[[0, 7]])] for key, values in table.items()}
    with pytest.raises(FitError, match="law ceiling has 7 parameters; 6 distinct sizes cannot carry it"):
        fit(few)


def test_from_the_command_line(tmp_path, capsys):
    path, two = tmp_path / "points.csv", planted((0.35, 0.35), runs=3)
    pyarrow.csv.write_csv(pa.table(two), path)
    words = [path, "--law", "ceiling", "--columns", "N=N,R=R", "--loss", "least-squares", "--groups", "dataset"]
    assert call(*words, "--shared", "a", "--bootstrap", 40, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["groups"] == {"column": "dataset", "levels": ["beauty", "games"], "shared": ["a"]}
    assert set(document["params"]) == {"a", *(f"{p}[{g}]" for p in ("R0", "A") for g in NAMES[:2])}
    assert document["reduced"] is None and "saturation" not in document
    assert call(*words, "--shared", "a", "--bounds", "A[games]=0:100", "--fix", "a=0.35", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "groups by 'dataset': beauty, games; shared: a" in out and "R0[beauty]" in out
    assert (tmp_path / "out" / "dataset=games" / "report.html").is_file()
    assert json.loads((tmp_path / "out" / "fit.json").read_text())["groups"]["shared"] == ["a"]
    assert call(*words, "--shared", "R0,q") == 2
    assert "has no parameter 'q'" in capsys.readouterr().err
