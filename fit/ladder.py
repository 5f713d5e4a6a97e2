"""A ladder of sizes with their runs, and the line through its largest sizes: what a verdict on saturation rests on."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fit.tables import Floats, rungs

LACK_OF_FIT = 0.01
"""Level of the F test of lack of fit of the line."""


@dataclass(frozen=True)
class Rungs:
    """Per size, smallest first: mean log2 N, mean gain, number of runs, and the runs' sum of squares about the mean."""

    x: Floats
    mean: Floats
    n: Floats
    squares: Floats

    def last(self, k: int) -> "Rungs":
        return Rungs(self.x[-k:], self.mean[-k:], self.n[-k:], self.squares[-k:])


@dataclass(frozen=True)
class Noise:
    """A run's variance with its degrees of freedom; ``lack``: the p value of a lack of fit where that sets the variance."""

    variance: float
    dof: int
    lack: float | None = None


@dataclass(frozen=True)
class Line:
    """Weighted least squares of the gain on log2 N over the last ``k`` rungs, with a run's variance.

    ``top`` is what the user asked ``k`` to be, None where the default rule chose it.
    """

    ladder: Rungs
    top: int | None
    k: int
    slope: float
    noise: Noise

    @cached_property
    def best(self) -> Rungs:
        return self.ladder.last(self.k)

    @cached_property
    def error(self) -> float:
        """Standard error of the slope; infinite without a noise estimate."""
        return float(np.sqrt(self.noise.variance / spread(self.best.x, self.best.n))) if self.noise.dof else np.inf

    def half(self, alpha: float) -> float:
        """Distance from the slope to its one-sided bound at 1 - ``alpha``."""
        return quantile(self.noise.dof, alpha) * self.error if self.noise.dof else np.inf

    def p_under(self, bound: float) -> float:
        """p value of "the gain per doubling is at least ``bound``": small where the data say it is less."""
        return p_value(self.slope - bound, self.error, self.noise.dof)

    def p_over(self, bound: float) -> float:
        """p value of "the gain per doubling is at most ``bound``"."""
        return p_value(bound - self.slope, self.error, self.noise.dof)

    def p_growth(self) -> float:
        """p value of "the largest sizes' mean is no better than the smallest size": one-sided t, variance of all replicates.

        The line's own noise stands in where replicates show no variance and where they do not explain its scatter. 1 where
        no size is left to compare with.
        """
        ladder, best = self.ladder, self.best
        if self.k == len(ladder.x):
            return 1.0
        variance, dof = self.noise.variance, self.noise.dof
        if ladder.squares.sum() > 0 and self.noise.lack is None:
            dof = int(ladder.n.sum()) - len(ladder.n)
            variance = float(ladder.squares.sum()) / dof
        rise = middle(best.mean, best.n) - float(ladder.mean[0])
        return p_value(-rise, float(np.sqrt(variance * (1 / best.n.sum() + 1 / ladder.n[0]))) if dof else np.inf, dof)


def quantile(dof: int, alpha: float) -> float:
    """Student's upper ``alpha`` point."""
    from scipy.special import stdtrit

    return float(stdtrit(dof, 1 - alpha))


def p_value(excess: float, error: float, dof: int) -> float:
    """P(T <= excess / error): small where an estimate lies surely below its bound; 1 without a noise estimate."""
    from scipy.special import stdtr

    if not np.isfinite(error):
        return 1.0
    if error == 0:
        return 0.0 if excess < 0 else 1.0
    return float(stdtr(dof, excess / error))


def spread(x: Floats, n: Floats) -> float:
    """Weighted sum of squares of ``x`` about its weighted mean: a run's variance over it is the slope's."""
    return float(n @ (x - middle(x, n)) ** 2)


def middle(values: Floats, n: Floats) -> float:
    """Mean with weights ``n``."""
    return float(n @ values / n.sum())


def make_ladder(N: Floats, gain: Floats) -> Rungs:
    """``N`` and ``gain`` (rows,): rows of one size are its runs."""
    rung = rungs([N])
    n = np.bincount(rung).astype(np.float64)
    mean = np.bincount(rung, gain) / n
    order, firsts = np.argsort(rung, kind="stable"), np.concatenate([[0], np.cumsum(n)[:-1].astype(np.intp)])
    sorted_gain = gain[order]
    differ = np.maximum.reduceat(sorted_gain, firsts) > np.minimum.reduceat(sorted_gain, firsts)
    squares = np.bincount(rung, (gain - mean[rung]) ** 2)
    return Rungs(
        np.bincount(rung, np.log2(N)) / n,
        mean,
        n,
        np.where(differ, squares, 0.0),  # runs that are equal have no variance, not that of rounding
    )


def top_count(x: Floats) -> int:
    """How many of the largest sizes, log2 ``x``, are judged: 4 (3 of 4 or fewer), more where it takes more to span 4x."""
    least = min(len(x), 4, max(3, len(x) - 1))
    wide = (k for k in range(least, len(x) + 1) if x[-1] - x[-k] >= 2.0 - 1e-6)
    return next(wide, least)


def fit_line(ladder: Rungs, top: int | None, alpha: float) -> Line:
    """The line through the ``top`` largest rungs (None: the default rule's)."""
    k = top or top_count(ladder.x)
    best = ladder.last(k)
    centred = best.x - middle(best.x, best.n)
    slope = float((best.n * centred) @ best.mean / (best.n @ centred**2))
    off_line = float(best.n @ (best.mean - middle(best.mean, best.n) - slope * centred) ** 2)
    return Line(ladder, top, k, slope, _noise(best, off_line, alpha))


def _noise(best: Rungs, off_line: float, alpha: float) -> Noise:
    """The replicates' variance, or the scatter of the rungs' means about the line where it is larger than that explains.

    ``off_line``: the means' weighted sum of squares about the line, with K-2 degrees of freedom. Replicates may share what
    differs between sizes (a backbone trained once), and curvature is not noise at all: in both cases the replicates' variance
    would make the slope look surer than the ladder shows it. F test of lack of fit: Draper and Smith 1998, sec. 2.1.
    """
    from scipy.special import fdtrc

    dof, spare = int(best.n.sum()) - len(best.n), len(best.n) - 2
    within = float(best.squares.sum())
    if within == 0:  # one seed, or seeds that do not differ: only the scatter about the line is left to tell the noise
        return Noise(off_line / spare if spare else np.inf, spare)
    replicates = Noise(within / dof, dof)
    if not spare:
        return replicates
    lack = float(fdtrc(spare, dof, off_line / spare / replicates.variance))
    if lack >= LACK_OF_FIT:
        return replicates
    about_line = Noise(off_line / spare, spare, lack)
    return max(replicates, about_line, key=lambda noise: quantile(noise.dof, alpha) * noise.variance**0.5)
