"""Laws read from formulas."""

import numpy as np
import pytest

from fit import FitError, fit_law
from fit.formula import parse
from fit.laws import law_named

N, D = (g.ravel() for g in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 5)))


def kinds(text: str) -> tuple[set[str], dict[str, str]]:
    law = parse(text)
    return set(law.linear), {t.name: t.kind for t in law.thetas}


def test_linear_parameters_are_found():
    assert kinds("L = E + A/N**a") == ({"E", "A"}, {"a": "exponent"})
    sid = kinds("R0 - A/(N_RS + g1*N_LLM)**a - B/N_RS**b")
    assert sid == ({"R0", "A", "B"}, {"a": "exponent", "b": "exponent", "g1": "coupling"})
    assert kinds("c + g*log2(N)") == ({"c", "g"}, {})
    assert kinds("R = R0 - A*(N*D)**-a") == ({"R0", "A"}, {"a": "exponent"})
    assert kinds("E + A*exp(-k*N)") == ({"E", "A"}, {"k": "free"})
    assert kinds("L = E + A*B/N**a")[0] == {"E", "A"}  # of two that only occur multiplied, one is linear in the other


@pytest.mark.parametrize(
    ("named", "formula"),
    [
        ("power-floor", "E + A/N^a"),
        ("ceiling", "R0 - A/N**a"),
        ("chinchilla", "E + A/N**a + B/D**b"),
        ("log-linear", "R = c + g*log2(N)"),
    ],
)
def test_a_formula_fits_like_the_law_it_spells(named, formula):
    rng = np.random.default_rng(0)
    response = law_named(named).response
    clean = 1.7 + 400 / N**0.34 + (1500 / D**0.37 if named == "chinchilla" else 0.0)
    metric = (clean if response == "L" else 3.0 - clean) * np.exp(0.002 * rng.normal(size=len(N)))
    table, sizes = {"N": N, "D": D, response: metric}, law_named(named).sizes
    columns = {role: role for role in (*sizes, response)}
    one, other = (fit_law(table, law, columns, loss="least-squares", bootstrap=20) for law in (named, formula))
    assert other.objective == pytest.approx(one.objective, rel=1e-8)
    for name, value in one.params.items():
        assert other.params[name] == pytest.approx(value, rel=1e-4)
        assert other.intervals[name] == pytest.approx(one.intervals[name], rel=1e-3)


def test_a_law_that_no_name_covers():
    """A product of powers, with an offset to the data size."""
    L = 1.2 + 5e4 / (N**0.3 * D**0.2)
    result = fit_law({"N": N, "D": D, "L": L}, "L = E + A*N**-a*D**-b", {"N": "N", "D": "D", "L": "L"})
    assert result.params == pytest.approx({"E": 1.2, "A": 5e4, "a": 0.3, "b": 0.2}, rel=1e-3)


def test_a_parameter_that_is_no_exponent_needs_bounds():
    L = 1.0 + 2.0 * np.exp(-3e-9 * N)
    columns = {"N": "N", "L": "L"}
    with pytest.raises(FitError, match=r"k: nowhere to search for it; give its bounds, such as k=0:10"):
        fit_law({"N": N, "L": L}, "E + A*exp(-k*N)", columns)
    found = fit_law({"N": N, "L": L}, "E + A*exp(-k*N)", columns, loss="least-squares", bounds={"k": (0.0, 1e-7)})
    assert found.params == pytest.approx({"A": 2.0, "E": 1.0, "k": 3e-9}, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("L = A/N**a +", "cannot be read"),
        ("L = E + A/M**a", "no size in it"),
        ("L = E + 3/N", "3/N has no coefficient"),
        ("L = __import__('os').system('true') + A/N", "has no place in a formula"),
        ("L = E + A/N**a if N else 0", "has no place in a formula"),
        ("L = E + A/N**[a]", "has no place in a formula"),
        ("L = (lambda: A)()/N", "has no place in a formula"),
        ("L = E + A*N**((9**20)**20)**20", "is more than a law needs"),
        ("L = E + A*9**99999/N", "is more than a law needs"),
        ("L = E + A/(N*0)", "divides by zero"),
        ("2 = E + A/N", "is not the name of a metric"),
        ("L = " + "A+" * 300 + "N", "500 at most"),
    ],
)
def test_what_is_no_formula_is_named_in_one_line(text, message):
    with pytest.raises(FitError) as error:
        parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)
