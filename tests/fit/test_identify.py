"""What the data leave open: the paper's own laws at its own sizes, couplings, bounds."""

import csv
from pathlib import Path

import numpy as np
import pytest

from fit import FitError, explain, fit_law

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "fit" / "recsys"
SID_SIZES = np.array([0.336, 0.778, 1.9, 3.3, 6.7, 13, 21, 43, 88, 192]) * 1e6
QWEN = np.array([0.6, 1.7, 4.0, 8.0, 14.0]) * 1e9
SID = {"Beauty": (0.04529, 16.8, 0.01, 0.6, 2.23)}
LLM = {"Beauty": (0.3, 990.0, 0.34, 0.0908, 0.021, 19.8, 0.0139), "Sports": (0.3, 987.0, 0.335, 0.0182, 0.0169, 20.2, 0.00947)}


def printed(name: str) -> list[dict[str, str]]:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return list(csv.DictReader(path.open()))


def sid_table(params: tuple[float, ...], seed: int, seeds: int = 3) -> dict[str, np.ndarray]:
    R0, A, B, a, b = params
    N = np.repeat(SID_SIZES, seeds)
    R = R0 - A / N**a - B / N**b + 0.0005 * np.random.default_rng(seed).normal(size=len(N))
    return {
        "N_RS": N,
        "N_LLM": np.full(len(N), 78e6),
        "N_QT": np.full(len(N), 2e5),
        "R": R,
        "seed": np.tile(np.arange(seeds), 10),
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_papers_sid_law_at_its_own_sizes(seed):
    """Its CF term is under 1e-10 of its SI term, and its encoder and quantizer do not vary: B, b and both couplings are open, the
    exponent is not, and what is left is a ceiling that the ladder has reached."""
    table = sid_table(SID["Beauty"], seed)
    result = fit_law(table, "sid", {role: role for role in ("N_RS", "N_LLM", "N_QT", "R")}, loss="least-squares", bootstrap=200)
    assert {"B", "b", "g1", "g2"} <= set(result.unidentified) and "a" not in result.unidentified
    low, high = result.intervals["a"]
    assert low < 0.6 < high
    assert result.reduced == "ceiling in N_RS"
    assert result.saturation is not None and result.saturation.verdict == "saturated"
    assert {"dead:B", "constant:N_LLM", "constant:N_QT"} <= set(result.warnings)
    assert not {"B", "b"} & {name for name, p in result.to_json()["params"].items() if p["identified"]}


def test_the_printed_sid_coefficients_are_those_of_this_file():
    rows = {row["dataset"]: row for row in printed("sid_paper_table1_fitted_params.csv")}
    found = tuple(float(rows["Beauty"][name]) for name in ("R0", "A", "B", "a", "b"))
    assert (found[0] / 10, *found[1:]) == pytest.approx(SID["Beauty"])  # printed ten times too large
    llm = {row["dataset"]: row for row in printed("sid_paper_table7_llm_as_rs_fitted_params.csv")}
    for name, params in LLM.items():
        assert tuple(float(llm[name][key]) for key in ("R0", "A", "B", "gamma", "beta", "a", "b")) == pytest.approx(params)


@pytest.mark.parametrize("dataset", sorted(LLM))
def test_the_papers_llm_law_is_one_dead_term_and_one_logarithm(dataset):
    R0, A, B, g, h, a, b = LLM[dataset]
    M = np.repeat(QWEN, 3)
    lora = 0.01 * M
    R = R0 - A / (lora + g * M) ** a - B / (lora + h * M) ** b
    R += 0.0002 * np.random.default_rng(1).normal(size=len(M))
    table = {"N_LORA": lora, "N_LLM": M, "R": R, "seed": np.tile(np.arange(3), 5)}
    result = fit_law(table, "llm", {role: role for role in ("N_LORA", "N_LLM", "R")}, loss="least-squares", bootstrap=200)
    assert {"dead:B", "log-linear:A", "collinear:N_LORA~N_LLM"} <= set(result.warnings)
    assert {"R0", "A", "B", "a", "b", "g", "h"} == set(result.unidentified)
    assert result.reduced == "log-linear in N_LORA"


def test_sizes_that_move_together_are_one_size():
    """Data in a fixed proportion to the model: the law's two terms are one."""
    rng = np.random.default_rng(0)
    N = np.geomspace(1e6, 1e9, 12)
    L = (1.7 + 400 / N**0.3 + 900 / (20 * N) ** 0.3) * np.exp(0.001 * rng.normal(size=12))
    result = fit_law({"N": N, "D": 20 * N, "L": L}, "chinchilla", {"N": "N", "D": "D", "L": "L"}, loss="least-squares")
    assert {"collinear:N~D", "dead:B"} <= set(result.warnings) and {"B", "b"} <= set(result.unidentified)
    assert result.reduced == "power-floor in N" and result.params["a"] == pytest.approx(0.3, rel=0.1)


def test_bounds_and_fixed_values_are_in_the_tables_units():
    rng = np.random.default_rng(0)
    N = np.geomspace(1e6, 1e9, 12)
    L = (1.7 + 400 / N**0.3) * np.exp(0.001 * rng.normal(size=12))
    table, columns = {"N": N, "L": L}, {"N": "N", "L": "L"}
    free = fit_law(table, "power-floor", columns)
    fixed = fit_law(table, "power-floor", columns, fixed={"E": 1.7})
    assert fixed.params["E"] == 1.7 and fixed.params["a"] == pytest.approx(0.3, rel=0.01)
    assert fixed.objective >= free.objective
    assert fit_law(table, "power-floor", columns, fixed={"A": 400.0}).params["A"] == 400.0
    held = fit_law(table, "power-floor", columns, bounds={"a": (0.4, 1.0), "E": (0.0, 1.75)})
    assert held.params["a"] == 0.4 and held.params["E"] == 1.75 and held.warnings[0] == "bound:E,a"
    thousand = fit_law({"N": N, "L": 1000 * L}, "power-floor", columns, fixed={"E": 1700.0})
    assert thousand.params["a"] == pytest.approx(fixed.params["a"], rel=1e-6)
    for wrong, message in (
        ({"fixed": {"R0": 1.0}}, "no parameter 'R0'; it has E, A, a"),
        ({"bounds": {"a": (2.0, 1.0)}}, "are not from low to high"),
    ):
        with pytest.raises(FitError, match=message):
            fit_law(table, "power-floor", columns, **wrong)


def test_weights_count_rows():
    N = np.geomspace(1e6, 1e9, 8)
    L = (1.7 + 400 / N**0.3) * np.exp(0.01 * np.random.default_rng(0).normal(size=8))
    twice = {"N": np.append(N, N[:3]), "L": np.append(L, L[:3])}
    weighted = {"N": N, "L": L, "w": np.where(np.arange(8) < 3, 2.0, 1.0)}
    one = fit_law(twice, "power-floor", {"N": "N", "L": "L"}, loss="least-squares")
    other = fit_law(weighted, "power-floor", {"N": "N", "L": "L"}, loss="least-squares", weights="w")
    assert other.params == pytest.approx(one.params, rel=1e-6)


@pytest.mark.parametrize("cluster", ["rows", "sizes", "residuals", "parametric"])
def test_every_way_of_drawing_agrees_on_well_behaved_data(cluster):
    """Of a line with normal noise all bootstraps estimate the same standard error."""
    rng = np.random.default_rng(7)
    N = np.repeat(np.geomspace(1e6, 1e9, 30), 2)
    R = 0.02 + 0.004 * np.log2(N) + 0.002 * rng.normal(size=60)
    result = fit_law({"N": N, "R": R}, "log-linear", {"N": "N", "R": "R"}, loss="least-squares", bootstrap=600, cluster=cluster)
    x = np.log2(N) - np.log2(N).mean()
    assert np.std(result.draws[:, 1]) == pytest.approx(0.002 / np.sqrt(np.sum(x**2)), rel=0.3)
    assert result.bootstrap["method"] == cluster
    correlation = result.correlation
    assert correlation is not None and correlation[0, 1] == pytest.approx(-1.0, abs=0.02)  # far from N = 1, where c is


def test_a_new_run_scatters_more_than_the_mean():
    rng = np.random.default_rng(3)
    N, seed = np.repeat(np.geomspace(1e6, 1e9, 8), 3), np.tile([0, 1, 2], 8)
    R = 0.02 + 0.004 * np.log2(N) + 0.002 * rng.normal(size=24)
    table, columns = {"N": N, "R": R, "seed": seed}, {"N": "N", "R": "R"}
    result = fit_law(table, "log-linear", columns, loss="least-squares", bootstrap=1000)
    mean, run = (result.predict({"N": [3e7]}, new_run=new) for new in (False, True))
    assert result.noise == (pytest.approx(0.002, rel=0.3), 16)
    assert run.high[0] - run.low[0] == pytest.approx(2 * 1.746 * result.noise[0], rel=0.15)
    assert mean.high[0] - mean.low[0] < 0.5 * (run.high[0] - run.low[0])
    assert result.predict({"N": [3e7, 1e12]}).distance == pytest.approx([0.0, 1.0])


def test_every_code_has_its_words():
    for code in ("dead:B", "log-linear:A", "constant:N_LLM", "collinear:N~D", "start:unmoved", "unidentified:B,b"):
        assert explain(code) != code


def test_a_large_table_is_fitted_from_a_part_of_its_rows_and_by_all_of_them():
    rng = np.random.default_rng(0)
    N, D = np.exp(rng.uniform(17, 23, 5000)), np.exp(rng.uniform(20, 26, 5000))
    truth = 1.8 + 480 / N**0.35 + 2100 / D**0.37
    L = truth * np.exp(0.01 * rng.normal(size=5000))
    result = fit_law({"N": N, "D": D, "L": L}, "chinchilla", {"N": "N", "D": "D", "L": "L"}, loss="least-squares", bootstrap=20)
    assert result.objective <= np.sum((truth - L) ** 2) and result.gradient < 1e-6 and result.starts == (6, 6)
    assert result.params["a"] == pytest.approx(0.35, abs=0.02) and result.intervals["a"][0] < 0.35 < result.intervals["a"][1]


@pytest.mark.parametrize("method", ["rows", "sizes"])
def test_draws_count_rows_and_keep_enough_sizes(method):
    from fit.uncertainty import Design, _counts

    rung = np.repeat([2, 0, 1, 3], 2)
    counts = _counts(Design(rung), method, 3, 500, np.random.default_rng(0))
    assert counts.shape == (500, 8) and np.all(counts.sum(axis=1) == 8)
    assert min(len(set(rung[row > 0])) for row in counts) == 3
    if method == "sizes":
        assert all(np.ptp(counts[:, rung == r], axis=1).max() == 0 for r in range(4))


def test_replicates_are_grouped_by_size_and_label():
    from fit.uncertainty import Design

    design = Design(np.array([1, 0, 1, 0, 1]), np.array([0, 5, 1, 5, 0]))
    assert [[sorted(rows) for rows in group] for group in design.groups] == [[[1, 3]], [[0, 4], [2]]]
    assert design.dof == 1


def test_a_law_that_is_identified_has_no_simpler_one():
    """Also where it is no power at all, or a formula of more than powers."""
    N = np.repeat(np.geomspace(1e5, 1e8, 8), 3)
    noise = 1e-4 * np.random.default_rng(0).normal(size=len(N))
    line = {"N": N, "R": 0.002 * np.log2(N) + noise}
    bent = {"N": N, "R": 0.002 * np.log2(np.minimum(N, 4e6)) + noise}
    both = {"N": N, "R": 0.06 - 0.9 * N**-0.4 + 0.002 * np.log2(N) + noise}
    columns = {"N": "N", "R": "R"}
    for table, law in ((line, "log-linear"), (bent, "hinge"), (both, "R0 - A/N**a + g*log2(N)")):
        result = fit_law(table, law, columns, loss="least-squares")
        assert result.reduced is None, (law, result.reduced)
    without = fit_law(line, "R0 - A/N**a + g*log2(N)", columns, loss="least-squares", fixed={"A": 0.0, "a": 0.4})
    assert without.reduced == "the law without A"
