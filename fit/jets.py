"""Numbers that carry their first and second derivatives (forward mode), over a batch of parameter vectors.

A law is written once, in these operations; its gradient and Hessian follow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from fit.tables import Floats

K = TypeVar("K")


@dataclass(frozen=True)
class Jet:
    """``value`` (draws, rows) or what broadcasts to it; ``first[i]`` and ``second[i, j]`` with i <= j are its derivatives by the
    nonlinear parameters i and j, absent where zero."""

    value: Floats
    first: Mapping[int, Floats] = field(default_factory=dict)
    second: Mapping[tuple[int, int], Floats] = field(default_factory=dict)

    def __add__(self, other: "Jet") -> "Jet":
        return Jet(self.value + other.value, _sum(self.first, other.first), _sum(self.second, other.second))

    def __neg__(self) -> "Jet":
        return self.scaled(-1.0)

    def __sub__(self, other: "Jet") -> "Jet":
        return self + other.scaled(-1.0)

    def scaled(self, factor: "float | Floats") -> "Jet":
        """Times something that depends on no parameter."""
        factor = np.asarray(factor)
        return Jet(
            self.value * factor,
            {i: d * factor for i, d in self.first.items()},
            {ij: d * factor for ij, d in self.second.items()},
        )

    def __mul__(self, other: "Jet") -> "Jet":
        if not other.first:
            return self.scaled(other.value)
        if not self.first:
            return other.scaled(self.value)
        second = _sum(
            {ij: d * other.value for ij, d in self.second.items()}, {ij: d * self.value for ij, d in other.second.items()}
        )
        for i, di in self.first.items():
            for j, dj in other.first.items():
                key = (min(i, j), max(i, j))
                cross = di * dj * (2.0 if i == j else 1.0)
                second[key] = second[key] + cross if key in second else cross
        first = _sum({i: d * other.value for i, d in self.first.items()}, {i: d * self.value for i, d in other.first.items()})
        return Jet(self.value * other.value, first, second)

    def chain(self, value: Floats, slope: Floats, curve: Floats) -> "Jet":
        """A function of this one, by its value, first and second derivative here."""
        second = {ij: d * slope for ij, d in self.second.items()}
        indices = sorted(self.first)
        for a, i in enumerate(indices):
            for j in indices[a:]:
                bend = self.first[i] * self.first[j] * curve
                second[i, j] = second[i, j] + bend if (i, j) in second else bend
        return Jet(value, {i: d * slope for i, d in self.first.items()}, second)


def _sum(one: Mapping[K, Floats], other: Mapping[K, Floats]) -> dict[K, Floats]:
    out = dict(one)
    for key, d in other.items():
        out[key] = out[key] + d if key in out else d
    return out


def constant(value: "float | Floats") -> Jet:
    return Jet(np.asarray(value, dtype=np.float64))


def exp(x: Jet) -> Jet:
    with np.errstate(over="ignore"):
        value = np.exp(x.value)
    return x.chain(value, value, value)


def log(x: Jet) -> Jet:
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1.0 / x.value
        return x.chain(np.log(x.value), inverse, -(inverse**2))


def reciprocal(x: Jet) -> Jet:
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1.0 / x.value
        return x.chain(inverse, -(inverse**2), 2 * inverse**3)


def power(base: Jet, exponent: Jet) -> Jet:
    """``base ** exponent``; a constant exponent takes any base, one that varies a positive base only."""
    if exponent.first:
        return exp(exponent * log(base))
    e = exponent.value
    with np.errstate(divide="ignore", invalid="ignore"):
        return base.chain(base.value**e, e * base.value ** (e - 1), e * (e - 1) * base.value ** (e - 2))


def softplus(x: Jet) -> Jet:
    """log(1 + e^x)."""
    s = 0.5 * (1.0 + np.tanh(0.5 * x.value))
    return x.chain(np.logaddexp(0.0, x.value), s, s * (1.0 - s))


def minimum(one: Jet, other: Jet) -> Jet:
    """The smaller of two; where they are equal, the first one's derivatives."""
    keep = (one.value <= other.value).astype(np.float64)
    return one.scaled(keep) + other.scaled(1.0 - keep)
