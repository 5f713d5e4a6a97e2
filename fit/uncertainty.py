"""Bootstrap resamples of a table, as batches of problems, and how far their intervals reach."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fit.identify import standard_errors
from fit.problem import Problem
from fit.tables import Floats

PARAM_LEVEL = 0.95
"""Level of the parameters' intervals."""
_MARGIN_LEVEL = 0.90
METHODS = ("seeds", "rows", "sizes", "residuals", "parametric")


@dataclass(frozen=True)
class Design:
    """How rows repeat: ``rung`` (rows,) numbers equal sizes, ``replicate`` (rows,) the seeds (None: every row is its own)."""

    rung: NDArray[np.intp]
    replicate: NDArray[np.intp] | None = None

    @cached_property
    def groups(self) -> list[list[NDArray[np.intp]]]:
        """For each rung, its replicates' row numbers."""
        replicate = np.arange(len(self.rung)) if self.replicate is None else self.replicate
        order = np.lexsort((replicate, self.rung))
        out: list[list[NDArray[np.intp]]] = [[] for _ in range(self.rung.max() + 1)]
        changes = np.flatnonzero((np.diff(self.rung[order]) != 0) | (np.diff(replicate[order]) != 0)) + 1
        for rows in np.split(order, changes):
            out[self.rung[rows[0]]].append(rows)
        return out

    @property
    def dof(self) -> int:
        """Degrees of freedom of the replicates' variance: replicates less rungs."""
        return sum(len(g) - 1 for g in self.groups)


def resample(problem: Problem, p: Floats, design: Design, method: str, draws: int, seed: int) -> Problem:
    """``draws`` tables drawn from the problem's one by a method of `METHODS`; ``p`` (params,) is the fit."""
    rng = np.random.default_rng(seed)
    if method in ("rows", "sizes"):
        return replace(problem, weights=problem.weights * _counts(design, method, len(problem.law.params), draws, rng))
    if method == "seeds":
        base, noise = _by_seeds(problem, design, draws, rng)
    else:
        base, noise = _about_the_law(problem, p, design, method, draws, rng)
    return replace(problem, y=np.exp(base + noise) if problem.log else base + noise)


def _counts(design: Design, method: str, needed: int, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, rows): how often each row was drawn, by itself or with all of its size. A draw with fewer sizes than parameters
    has no fit and is drawn again."""
    units = np.arange(len(design.rung)) if method == "rows" else design.rung
    n, rungs = int(units.max()) + 1, int(design.rung.max()) + 1
    order = np.argsort(design.rung, kind="stable")
    first = np.searchsorted(design.rung[order], np.arange(rungs))
    out = np.empty((draws, len(units)))
    todo = np.arange(draws)
    while len(todo):
        picks = rng.integers(n, size=(len(todo), n))
        counts = np.zeros((len(todo), n))
        np.add.at(counts, (np.arange(len(todo))[:, None], picks), 1.0)
        out[todo] = counts[:, units]
        drawn = np.add.reduceat(out[todo][:, order], first, axis=1)  # rows of each rung
        todo = todo[np.sum(drawn > 0, axis=1) < min(needed, rungs)]
    return out


def _by_seeds(problem: Problem, design: Design, draws: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """At each rung, deviations of replicates from their rung's mean, drawn from those of all rungs.

    A rung's own two or three deviations can take only a few values, and intervals from them were measured to hold the truth 80%
    of the time at a nominal 95% (2 seeds). Drawing n replicates from n shows (n-1)/n of their variance; the deviations are
    widened by sqrt(n/(n-1)) (Davison and Hinkley 1997, sec. 2.3). Where noise grows with the metric they are pooled, and drawn,
    in units of a power of it.
    """
    y = np.log(problem.y[0]) if problem.log else problem.y[0]
    centre, pool, owner, replicates = np.empty_like(y), [], np.empty(len(y), dtype=np.intp), 0
    power = _noise_power(y, design)
    for group in design.groups:
        means = np.array([y[rows].mean() for rows in group])
        centre[np.concatenate(group)] = means.mean()
        n = len(means)
        if n > 1:
            pool.append((means - means.mean()) * np.sqrt(n / (n - 1)) / abs(means.mean()) ** power)
        for rows in group:
            owner[rows], replicates = replicates, replicates + 1
    return centre, rng.choice(np.concatenate(pool), size=(draws, replicates))[:, owner] * np.abs(centre) ** power


def _noise_power(y: Floats, design: Design) -> float:
    """Of the powers of the metric's mean that its standard deviation may grow with (0 not at all, .5 as a count's, 1 in
    proportion), the likeliest under normal noise, by the replicates' likelihood given their means."""
    groups = [y[np.concatenate(group)] for group in design.groups if len(group) > 1]
    squares = np.array([np.sum((g - g.mean()) ** 2) for g in groups])
    dof, means = np.array([len(g) - 1.0 for g in groups]), np.array([abs(g.mean()) for g in groups])
    if not squares.sum() or not means.all():
        return 0.0

    def likelihood(power: float) -> float:
        return float(-dof.sum() / 2 * np.log(np.sum(squares / means ** (2 * power))) - power * np.sum(dof * np.log(means)))

    return max((0.0, 0.5, 1.0), key=likelihood)


def _about_the_law(
    problem: Problem, p: Floats, design: Design, method: str, draws: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Residuals about the fitted law drawn with replacement, widened by sqrt(rows/(rows - parameters)), or normal noise of their
    size (parametric)."""
    y = np.log(problem.y[0]) if problem.log else problem.y[0]
    r = -problem.residuals(p[None])[0]
    if method == "parametric":
        return y - r, noise(problem, p, design)[0] * rng.normal(size=(draws, len(y)))
    widened = (r - r.mean()) * np.sqrt(len(r) / max(len(r) - len(p), 1))
    return y - r, rng.choice(widened, size=(draws, len(y)))


def noise(problem: Problem, p: Floats, design: Design) -> tuple[float, int]:
    """A run's standard deviation in the residuals' unit, with its degrees of freedom: of replicates where there are some, else of
    the residuals about the law."""
    y = np.log(problem.y[0]) if problem.log else problem.y[0]
    if dof := sum(len(rows) - 1 for rows in _rungs(design)):
        return float(np.sqrt(sum(float(np.sum((y[rows] - y[rows].mean()) ** 2)) for rows in _rungs(design)) / dof)), dof
    dof = max(len(y) - len(p), 1)
    return float(np.sqrt(np.sum(problem.residuals(p[None]) ** 2) / dof)), dof


def _rungs(design: Design) -> list[NDArray[np.intp]]:
    return [np.concatenate(group) for group in design.groups]


def tail(level: float, dof: int | None) -> float:
    """Lower-tail share of a percentile interval; with ``dof``, of the expanded one that a t interval would need.

    Hesterberg 2015 (The American Statistician 69:371), sec. 4.3: a percentile interval from few replicates is too short as a
    normal interval is against Student's.
    """
    from scipy.special import ndtr, stdtrit

    share = (1 - level) / 2
    return share if not dof else float(ndtr(stdtrit(dof, share)))


def margins(problem: Problem, p: Floats, draws: Floats, dof: int | None) -> tuple[Floats, Floats]:
    """90% margins of each parameter in centred units: of the draws where there are some, else linearised."""
    if len(draws):
        share = tail(_MARGIN_LEVEL, dof)
        return np.quantile(draws, share, axis=0), np.quantile(draws, 1 - share, axis=0)
    spread = 1.645 * standard_errors(problem, p)[0]
    return p - spread, p + spread


def extrapolation(sizes: Mapping[str, Floats], ranges: Mapping[str, tuple[float, float]]) -> tuple[float, Floats]:
    """How many times beyond the fitted sizes the farthest prediction lies (1: within), and how far each one does, (rows,), in
    units of the fitted logarithmic range (0: within; infinite beyond a size that did not vary)."""
    times, far = 1.0, np.zeros(len(next(iter(sizes.values()))))
    for name, values in sizes.items():
        low, high = ranges[name]
        over = np.maximum(np.maximum(values / high, low / values), 1.0)
        times = max(times, float(over.max()))
        with np.errstate(divide="ignore", invalid="ignore"):
            far = np.fmax(far, np.where(over > 1 + 1e-9, np.log(over) / np.log(high / low), 0.0))
    return times, far
