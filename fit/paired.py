"""The paired bootstrap: is one system better than another on the same users?"""

from dataclasses import dataclass

import numpy as np

from fit.errors import FitError
from fit.tables import Floats


@dataclass(frozen=True)
class Difference:
    """``mean`` of the paired differences with its percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(one: Floats, other: Floats, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Difference:
    """The mean of ``one - other``, (users,) each in the same order, over users drawn with replacement.

    Efron and Tibshirani 1993, ch. 13. Users with the same difference are interchangeable, so each draw is of how many users
    have each value (multinomial), which is the same bootstrap at a cost that does not grow with the users.
    """
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise FitError(f"paired values of shapes {one.shape} and {other.shape}; both must be (users,), one user at least")
    values, counts = np.unique(one - other, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(one), counts / len(one), size=draws) @ values / len(one)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(np.mean(one - other)), float(low), float(high))
