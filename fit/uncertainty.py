"""Bootstrap resamples, and which parameters the data identify."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fit.laws import EXPONENT_BOUNDS, Law
from fit.solve import Problem, jacobian
from fit.tables import Floats

PARAM_LEVEL = 0.95
"""Level of the parameters' intervals."""

_SPREAD = 4.0
_MARGIN_LEVEL = 0.90


@dataclass(frozen=True)
class Design:
    """How rows repeat: ``rung`` (rows,) numbers equal sizes, ``replicate`` (rows,) the seeds (None: every row is its own)."""

    rung: NDArray[np.intp]
    replicate: NDArray[np.intp] | None = None

    def groups(self) -> list[list[NDArray[np.intp]]]:
        """For each rung, its replicates' row numbers."""
        replicate = np.arange(len(self.rung)) if self.replicate is None else self.replicate
        out = []
        for r in range(self.rung.max() + 1):
            rows = np.flatnonzero(self.rung == r)
            out.append([rows[replicate[rows] == s] for s in np.unique(replicate[rows])])
        return out

    @property
    def dof(self) -> int:
        """Degrees of freedom of the replicates' variance: replicates less rungs."""
        return sum(len(g) - 1 for g in self.groups())


def by_rows(problem: Problem, design: Design, draws: int, rng: np.random.Generator) -> Iterator[Problem]:
    """Rows drawn with replacement, as counts. A draw with fewer rungs than parameters has no fit and is drawn again."""
    n, needed = len(problem.y), len(problem.law.params)
    for _ in range(draws):
        while True:
            counts = np.bincount(rng.integers(n, size=n), minlength=n)
            if len(np.unique(design.rung[counts > 0])) >= needed:
                break
        yield _with(problem, problem.y, counts.astype(np.float64))


def by_seeds(problem: Problem, design: Design, draws: int, rng: np.random.Generator) -> Iterator[Problem]:
    """At each rung, deviations of replicates from their rung's mean, drawn from those of all rungs.

    A rung's own two or three deviations can take only a few values, and intervals from them were measured to hold the truth 80%
    of the time at a nominal 95% (2 seeds). Drawing n replicates from n shows (n-1)/n of their variance; the deviations are
    widened by sqrt(n/(n-1)) (Davison and Hinkley 1997, sec. 2.3).
    """
    y = np.log(problem.y) if problem.log else problem.y
    groups = design.groups()
    centre = np.empty_like(y)
    deviations = []
    for replicates in groups:
        means = np.array([y[rows].mean() for rows in replicates])
        centre[np.concatenate(replicates)] = means.mean()
        n = len(means)
        if n > 1:
            deviations.append((means - means.mean()) * np.sqrt(n / (n - 1)))
    pool = np.concatenate(deviations)
    for _ in range(draws):
        drawn = centre.copy()
        for replicates in groups:
            for rows, pick in zip(replicates, rng.choice(pool, size=len(replicates)), strict=True):
                drawn[rows] += pick
        yield _with(problem, np.exp(drawn) if problem.log else drawn, problem.weights)


def by_residuals(problem: Problem, p: Floats, draws: int, rng: np.random.Generator) -> Iterator[Problem]:
    """Residuals about the fitted law drawn with replacement, widened by sqrt(rows/(rows - parameters))."""
    r = -problem.residuals(p)
    y = np.log(problem.y) if problem.log else problem.y
    fitted, n = y - r, len(y)
    r = (r - r.mean()) * np.sqrt(n / max(n - len(p), 1))
    for _ in range(draws):
        drawn = fitted + rng.choice(r, size=n)
        yield _with(problem, np.exp(drawn) if problem.log else drawn, problem.weights)


def _with(problem: Problem, y: Floats, weights: Floats) -> Problem:
    return Problem(problem.law, problem.logs, y, weights, problem.loss, problem.delta)


def tail(level: float, dof: int | None) -> float:
    """Lower-tail share of a percentile interval; with ``dof``, of the expanded one that a t interval would need.

    Hesterberg 2015 (The American Statistician 69:371), sec. 4.3: a percentile interval from few replicates is too short as a
    normal interval is against Student's.
    """
    from scipy.special import ndtr, stdtrit

    share = (1 - level) / 2
    return share if not dof else float(ndtr(stdtrit(dof, share)))


def dead_exponents(law: Law, p: Floats) -> NDArray[np.bool_]:
    """(params,): exponents whose terms all have coefficient zero, so that they mean nothing."""
    out = np.zeros(len(law.params), dtype=bool)
    for i, name in enumerate(law.params):
        coefficients = [p[j] for j, t in enumerate(law.terms) if t.exponent == name]
        out[i] = bool(coefficients) and not any(coefficients)
    return out


def standard_errors(problem: Problem, p: Floats) -> tuple[Floats, float]:
    """Linearised standard errors (params,) at ``p``, in centred units, and the Jacobian's condition number.

    The condition number is of the Jacobian with unit columns, at centred logarithms of the sizes. Coefficients held at their
    bound are left out of both (error 0), and so are the exponents that then mean nothing (error infinite).
    """
    law = problem.law
    dead = dead_exponents(law, p)
    held = np.array([i < len(law.terms) and p[i] == problem.bounds[0][i] for i in range(len(p))])
    errors = np.where(dead, np.inf, 0.0)
    live = ~(dead | held)
    _, J, _, _ = jacobian(problem, p)
    J = J[:, live] * np.sqrt(problem.weights)[:, None]
    r = problem.residuals(p)
    # Huber and L1 are chosen for outliers, so their noise is read from the middle of the residuals.
    if problem.loss == "least-squares":
        variance = float(r @ r) / max(len(r) - len(p), 1)
    else:
        variance = (1.4826 * float(np.median(np.abs(r)))) ** 2
    norms = np.linalg.norm(J, axis=0)
    _, s, vt = np.linalg.svd(J / norms, full_matrices=False)
    errors[live] = np.sqrt(variance * np.sum((vt.T / np.maximum(s, 1e-12)) ** 2, axis=1)) / norms
    return errors, float(s[0] / max(s[-1], 1e-300))


def unidentified(law: Law, p: Floats, low: Floats, high: Floats, metric_range: float) -> list[str]:
    """Parameters that the data leave open, from their 90% margins in centred units.

    An exponent or a power term's coefficient is open where it is not known within a factor of 4 or reaches its bound; a constant
    (floor or ceiling) where its margin is wider than the whole range of the metric.
    """
    m, exponents, dead = len(law.terms), set(law.nonlinear), dead_exponents(law, p)
    least, most = EXPONENT_BOUNDS[0] * 1.01, EXPONENT_BOUNDS[1] * 0.99
    # An exponent at its lower bound makes the power a logarithm: its coefficient and the constant are then set by the bound,
    # and look certain only because the bound does not move between draws.
    disguised = {name for i, name in enumerate(law.params) if name in exponents and low[i] <= least and not dead[i]}
    out = []
    for i, name in enumerate(law.params):
        term = law.terms[i] if i < m else None
        if term is None:
            shaky = dead[i] or low[i] <= least or high[i] >= most or high[i] > _SPREAD * low[i]
        elif term.exponent:
            shaky = p[i] > 0 and (term.exponent in disguised or low[i] <= 0 or high[i] > _SPREAD * low[i])
        else:
            shaky = term.size is None and bool(exponents) and (bool(disguised) or high[i] - low[i] > metric_range)
        if shaky:
            out.append(name)
    return out


def margins(problem: Problem, p: Floats, draws: Floats, dof: int | None) -> tuple[Floats, Floats]:
    """90% margins of each parameter in centred units: of the draws where there are some, else linearised."""
    if len(draws):
        share = tail(_MARGIN_LEVEL, dof)
        return np.quantile(draws, share, axis=0), np.quantile(draws, 1 - share, axis=0)
    spread = 1.645 * standard_errors(problem, p)[0]
    return p - spread, p + spread


def extrapolation(sizes: Mapping[str, Floats], ranges: Mapping[str, tuple[float, float]]) -> float:
    """How many times beyond the fitted sizes the farthest prediction lies (1: within)."""
    return max(float(max(v.max() / ranges[name][1], ranges[name][0] / v.min(), 1.0)) for name, v in sizes.items())
