"""Bootstrap resamples of a table, as batches of problems, and how far their intervals reach."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fit.identify import standard_errors
from fit.problem import Problem, jacobian
from fit.tables import Floats

PARAM_LEVEL = 0.95
"""Level of the parameters' intervals."""
_MARGIN_LEVEL = 0.90
POWERS = np.linspace(-1.0, 2.0, 7)
"""Of the metric, that a run's standard deviation may be in proportion to. What noise does lies from 0 to 1; the prior reaches as
far to either side, or it would draw a power at its edge inwards."""
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


@dataclass(frozen=True)
class Spread:
    """What the data tell of a run's noise: a standard deviation of ``sd * (metric / at) ** power``, in the residuals' unit.

    Noise may be of one size, grow as a count's or in proportion to the metric, and with few runs the data do not tell. On a
    ladder of gains in proportional noise, intervals at the largest size were a sixth too short where the noise was taken for
    constant, and 6% where the likeliest power was taken for the true one. So every draw has a power of its own, ``powers`` (k,)
    in ``shares`` (k,), each with its ``sd`` (k,). The shares are the powers' posterior where all of `POWERS` are alike
    beforehand: the restricted likelihood, of what is left when means or the law have been fitted (Patterson and Thompson 1971;
    Harville 1974 for its Bayesian reading; Davidian and Carroll 1987 for powers of the mean), integrated over the size of the
    noise. ``dof``: what the deviations leave to tell that size, see `tail`.
    """

    powers: Floats
    shares: Floats
    sd: Floats
    at: float
    dof: int

    def pick(self, draws: int, seed: int) -> NDArray[np.intp]:
        """(draws,): which power each draw has; the same for the same seed."""
        return np.random.default_rng([seed, 1]).choice(len(self.powers), size=draws, p=self.shares)

    def at_metric(self, metric: Floats, chosen: NDArray[np.intp]) -> Floats:
        """(draws, rows): standard deviations where the metric is ``metric`` (rows,)."""
        ratio = np.maximum(np.abs(metric) / self.at, 1e-3)
        return np.asarray(self.sd[chosen][:, None] * ratio ** self.powers[chosen][:, None])


def resample(problem: Problem, p: Floats, design: Design, method: str, draws: int, seed: int) -> Problem:
    """``draws`` tables drawn from the problem's one by a method of `METHODS`; ``p`` (params,) is the fit.

    `rows` and `sizes` draw the table's own rows. The others draw metrics about the fitted law, whose fit is the fit itself for
    every loss: about the sizes' means, a fit by Huber or L1 would be drawn about that to the means, which is another one. What
    is drawn is, for `seeds`, deviations of replicates from their size's mean, for `residuals` those of the rows from the law
    (Davison and Hinkley 1997, sec. 6.2.3), each over the standard deviation at its size, from all sizes: a size's own two or
    three deviations can take only a few values, and intervals from them were measured to hold the truth 80% of the time at a
    nominal 95%. `parametric` draws normal ones. Each draw has its own `Spread`.
    """
    rng = np.random.default_rng(seed)
    if method in ("rows", "sizes"):
        return replace(problem, weights=problem.weights * _counts(design, method, len(problem.law.params), draws, rng))
    fitted = problem.fitted(p[None])[0]
    spread, pool = _spread(problem, p, design, method)
    chosen = spread.pick(draws, seed)
    if method == "seeds":
        owner = np.empty(len(fitted), dtype=np.intp)
        for i, rows in enumerate(rows for group in design.groups for rows in group):
            owner[rows] = i
    else:
        owner = np.arange(len(fitted))
    if method == "parametric":
        luck = rng.normal(size=(draws, len(owner)))
    else:
        luck = _smooth_picks(pool, chosen, int(owner.max()) + 1, rng)[:, owner]
    noise = luck * spread.at_metric(fitted, chosen)
    return replace(problem, y=fitted * np.exp(noise) if problem.log else fitted + noise)


def _smooth_picks(pool: Floats, chosen: NDArray[np.intp], count: int, rng: np.random.Generator) -> Floats:
    """(draws, count) deviations from each draw's row of ``pool`` (powers, deviations), smoothed by a normal kernel of the width
    that suits normal ones, at the same variance (Silverman and Young 1987).

    Six residuals or eighteen replicates have no tails: the curves drawn from them as they are end too early, and fits by
    L1 take few values (Hall, DiCiccio and Romano 1989 on quantiles).
    """
    deviations, size = pool.shape[1], (len(chosen), count)
    width = 1.06 * deviations**-0.2
    picked = pool[chosen[:, None], rng.integers(deviations, size=size)]
    return np.asarray((picked + width * rng.normal(size=size)) / np.sqrt(1 + width**2))


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


def run_spread(problem: Problem, p: Floats, design: Design, method: str) -> Spread:
    """The noise of a run at the fit ``p`` (params,): from replicates where there are some and ``method`` is not `residuals`, else
    from the residuals about the law."""
    return _spread(problem, p, design, method)[0]


def _spread(problem: Problem, p: Floats, design: Design, method: str) -> tuple[Spread, Floats]:
    """The noise of a run, and (powers, deviations) what was seen of it over its standard deviation, of mean square one."""
    fitted = problem.fitted(p[None])[0]
    metric, powers = np.abs(fitted), POWERS - 1.0 if problem.log else POWERS
    seen = _residuals(problem, p) if method == "residuals" or not design.dof else _replicates(problem, design)
    # No power of a metric that passes zero; none from replicates that see too little of its range to be drawn out over the rest.
    if fitted.min() <= 0 or np.ptp(np.log(metric[seen.row])) < 0.5 * np.ptp(np.log(metric)) or not np.any(seen.deviations):
        powers = np.zeros(1)
    at = float(np.exp(np.log(metric).mean())) if len(powers) > 1 else 1.0
    sd, likelihood, pool = np.empty(len(powers)), np.empty(len(powers)), np.empty((len(powers), len(seen.row)))
    for k, power in enumerate(powers):
        unit = (metric[seen.row] / at) ** power if power else np.ones(len(seen.row))
        squares, volume = seen.fit(unit)
        sd[k] = np.sqrt(squares / seen.dof)
        likelihood[k] = -seen.dof / 2 * np.log(max(squares, 1e-300)) - volume
        pool[k] = seen.deviations / unit
        pool[k] -= pool[k].mean()
        pool[k] /= np.sqrt(np.mean(pool[k] ** 2)) or 1.0
    share = np.exp(likelihood - likelihood.max())
    return Spread(powers, share / share.sum(), sd, at, seen.dof), pool


@dataclass(frozen=True)
class _Seen:
    """Deviations (k,) of rows ``row`` (k,) from what was fitted to them; ``fit`` gives, for standard deviations in proportion to
    ``unit`` (k,), their weighted sum of squares and the restricted likelihood's log determinant, halved."""

    deviations: Floats
    row: NDArray[np.intp]
    dof: int
    fit: Callable[[Floats], tuple[float, float]]


def _replicates(problem: Problem, design: Design) -> _Seen:
    """Of replicates about their size's mean: normal, so that what is left of n of them has n - 1 degrees of freedom."""
    y = np.log(problem.y[0]) if problem.log else problem.y[0]
    deviations, widened, row, counted = [], [], [], []
    for group in design.groups:
        means, n = np.array([y[rows].mean() for rows in group]), len(group)
        if n > 1:
            deviations.append(means - means.mean())
            widened.append(deviations[-1] * np.sqrt(n / (n - 1)))
            row += [rows[0] for rows in group]
            counted += [(n - 1) / n] * n
    seen, left = np.concatenate(deviations), np.array(counted)
    return _Seen(
        np.concatenate(widened),
        np.array(row, dtype=np.intp),
        design.dof,
        lambda unit: (float(np.sum((seen / unit) ** 2)), float(np.sum(left * np.log(unit)))),
    )


def _residuals(problem: Problem, p: Floats) -> _Seen:
    """Of rows about the law, which is linear near the fit: what is left has rows - parameters degrees of freedom."""
    r, free = -problem.residuals(p[None])[0], ~problem.held
    J = jacobian(problem, p[None])[0, free].T

    def fit(unit: Floats) -> tuple[float, float]:
        columns = J / unit[:, None]
        norms = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
        u, s, _ = np.linalg.svd(columns / norms, full_matrices=False)
        kept = s > 1e-10 * s[0]
        left = r / unit - u[:, kept] @ (u[:, kept].T @ (r / unit))
        return float(left @ left), float(np.sum(np.log(unit)) + np.sum(np.log(norms)) + np.sum(np.log(s[kept])))

    return _Seen(r, np.arange(len(r)), max(len(r) - int(free.sum()), 1), fit)


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


def ends(draws: Floats, level: float, dof: int | None) -> tuple[Floats, Floats]:
    """Lower and upper ends, (columns,) each, of the percentile intervals of ``draws`` (draws, columns).

    Of B draws the k-th is the k/(B + 1) quantile (Davison and Hinkley 1997, sec. 5.2.3): numpy's own choice lies inwards of that,
    by a percent of coverage with 200 draws.
    """
    share = tail(level, dof)
    low, high = np.quantile(draws, [share, 1 - share], axis=0, method="weibull")
    return low, high


def margins(problem: Problem, p: Floats, draws: Floats, dof: int | None) -> tuple[Floats, Floats]:
    """90% margins of each parameter in centred units: of the draws where there are some, else linearised."""
    if len(draws):
        return ends(draws, _MARGIN_LEVEL, dof)
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
