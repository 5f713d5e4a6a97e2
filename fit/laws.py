"""The laws, as sums of terms that are linear in some parameters and nonlinear in others (the exponents).

`R` is a gain such as recall, `L` a loss. The solver asks a law only for its basis and the basis' derivatives with respect to the
nonlinear parameters, so a law may come from anywhere that can give those.
Sources: `power` and `power-floor`, Kaplan et al. 2020 (arXiv 2001.08361) and Henighan et al. 2020 (2010.14701); `chinchilla`,
Hoffmann et al. 2022 (2203.15556) eq. 2; `ceiling`, the single-term form of Liu et al. 2025 (2509.25522).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fit.errors import FitError
from fit.tables import Floats

EXPONENT_BOUNDS = (0.01, 5.0)
"""Below .01 a power law cannot be told from a logarithm, above 5 from a step; a fit that ends there says `bound:`."""


@dataclass(frozen=True)
class Term:
    """``sign * name * shape(size)``: shape is 1 without a size, size^-exponent with an exponent, else log2(size)."""

    name: str
    size: str | None = None
    exponent: str | None = None
    sign: int = 1
    lower: float = -np.inf


@dataclass(frozen=True)
class Law:
    name: str
    formula: str
    response: str
    terms: tuple[Term, ...]

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.size for t in self.terms if t.size))

    @property
    def linear(self) -> tuple[str, ...]:
        return tuple(t.name for t in self.terms)

    @property
    def nonlinear(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t.exponent for t in self.terms if t.exponent))

    @property
    def params(self) -> tuple[str, ...]:
        """Linear parameters, then nonlinear ones: the order of every parameter vector in this package."""
        return self.linear + self.nonlinear

    def basis(self, logs: Mapping[str, Floats], theta: Floats) -> Floats:
        """(..., rows, linear) for ``theta`` (..., nonlinear); ``logs`` are natural logarithms of sizes, (rows,) each."""
        rows = len(next(iter(logs.values())))
        columns = []
        for t in self.terms:
            if t.exponent and t.size:
                shape = np.exp(-theta[..., self.nonlinear.index(t.exponent), None] * logs[t.size])
            elif t.size:
                shape = logs[t.size] / np.log(2.0)
            else:
                shape = np.ones(rows)
            columns.append(np.broadcast_to(t.sign * shape, (*theta.shape[:-1], rows)))
        return np.stack(columns, axis=-1)

    def slopes(self, logs: Mapping[str, Floats], basis: Floats) -> tuple[Floats, Floats]:
        """First and second derivative of ``basis`` (rows, linear) by the nonlinear parameters.

        (rows, linear, nonlinear) each: a term has one exponent, so the mixed second derivatives are zero.
        """
        first = np.zeros((*basis.shape, len(self.nonlinear)))
        second = np.zeros_like(first)
        for j, t in enumerate(self.terms):
            if t.exponent and t.size:
                k = self.nonlinear.index(t.exponent)
                first[:, j, k] = -basis[:, j] * logs[t.size]
                second[:, j, k] = basis[:, j] * logs[t.size] ** 2
        return first, second

    def unscale(self, p: Floats, centres: Mapping[str, float], response_scale: float) -> Floats:
        """Parameters (..., params) of the table's own units from those fitted to sizes/exp(centre) and metric/scale."""
        out = np.array(p, dtype=np.float64)
        m = len(self.terms)
        out[..., :m] *= response_scale
        for j, t in enumerate(self.terms):
            if t.exponent and t.size:
                out[..., j] *= np.exp(p[..., m + self.nonlinear.index(t.exponent)] * centres[t.size])
            elif t.size:
                constant = next(i for i, other in enumerate(self.terms) if other.size is None)
                out[..., constant] -= out[..., j] * centres[t.size] / np.log(2.0)
        return out


LAWS = {
    law.name: law
    for law in (
        Law("power", "L = A/N^a", "L", (Term("A", "N", "a", lower=0.0),)),
        Law("power-floor", "L = E + A/N^a", "L", (Term("E", lower=0.0), Term("A", "N", "a", lower=0.0))),
        Law("ceiling", "R = R0 - A/N^a", "R", (Term("R0"), Term("A", "N", "a", sign=-1, lower=0.0))),
        Law("log-linear", "R = c + g log2 N", "R", (Term("c"), Term("g", "N"))),
        Law(
            "chinchilla",
            "L = E + A/N^a + B/D^b",
            "L",
            (Term("E", lower=0.0), Term("A", "N", "a", lower=0.0), Term("B", "D", "b", lower=0.0)),
        ),
    )
}


def law_named(name: str) -> Law:
    if name not in LAWS:
        raise FitError(f"unknown law {name!r}; there are {', '.join(LAWS)}")
    return LAWS[name]
