"""`compare_laws`: which law do the data prefer, and is a floor, a break or a second term there at all?

Criteria: AICc (Hurvich and Tsai 1989, Biometrika 76:297), BIC (Schwarz 1978), Akaike weights (Burnham and Anderson 2002,
sec. 2.9). Likelihood ratios by the parametric bootstrap (Davison and Hinkley 1997, sec. 4.2.3; McLachlan 1987, Applied Statistics
36:318), never by chi-square: a floor of zero lies at the edge of what is allowed, and a break or an exponent that the smaller law
has not is unidentified under it (Davies 1987, Biometrika 74:33), so that Wilks' theorem says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from fit.errors import FitError
from fit.fitting import FitResult, fit_law
from fit.laws import law_named
from fit.problem import LOSSES, Problem
from fit.refit import sums_of_squares
from fit.replicates import row_weights
from fit.solve import solve
from fit.tables import Floats, TableLike, numbers, read_table, rungs, sizes
from fit.uncertainty import Design

NESTED: dict[tuple[str, str], tuple[str, dict[str, tuple[str, ...]]]] = {
    ("power", "power-floor"): ("floor", {"N": ("N",)}),
    ("log-linear", "hinge"): ("break", {"N": ("N",)}),
    ("power-floor", "broken"): ("break", {"N": ("N",)}),
    ("ceiling", "two-term"): ("second term", {"N": ("N_SI", "N_CF")}),
    ("power-floor", "chinchilla"): ("second term", {"N": ("N", "D")}),
}
"""(smaller, larger) laws: what the larger one adds, and which of its sizes may be the smaller one's."""

_WEIGHTS = "weights of the comparison"
_ENOUGH = 5
"""Degrees of freedom from which the replicates' own variance is trusted over that about the law."""
_LIMITS = {
    frozenset(("ceiling", "log-linear")): "ceiling comes near log-linear only as a goes to 0 and R0 and A to infinity; "
    "no value of its parameters is log-linear",
    frozenset(("power-floor", "log-linear")): "power-floor comes near a falling log-linear only as a goes to 0; no value of its "
    "parameters is log-linear",
}


@dataclass(frozen=True)
class LawScore:
    """One law's likelihood, at its maximum on the comparison's scale. ``k`` counts the free parameters and the noise.

    ``log_likelihood`` is that of the metric as it is in the table, on either scale. ``sd``: residual standard deviation (root of
    squares over rows), relative on the log scale. ``aicc``, ``bic``, ``difference`` (AICc less the best law's) and ``weight`` are
    None where rows are too few for them or the law runs through every point.
    """

    law: str
    k: int
    sd: float
    log_likelihood: float | None
    aicc: float | None
    bic: float | None
    difference: float | None
    weight: float | None
    fit: FitResult

    def to_json(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "fit"}
        return values | {"params": self.fit.params, "warnings": list(self.fit.warnings)}


@dataclass(frozen=True)
class LikelihoodRatio:
    """``statistic``: 2 log likelihood ratio, rows * log(RSS small / RSS large). ``p``: (1 + draws that exceed it) / (1 + draws)
    where the smaller law is true with normal noise of ``sd``, from ``dof`` degrees of freedom of ``noise`` (replicates or
    residuals)."""

    adds: str
    small: str
    large: str
    statistic: float
    p: float
    draws: int
    sd: float
    dof: int
    noise: str


@dataclass(frozen=True)
class Comparison:
    """``scale``: linear or log, of every law's normal likelihood. ``not_nested``: pairs of laws without a test, and why."""

    scale: str
    loss: str
    n: int
    laws: tuple[LawScore, ...]
    tests: tuple[LikelihoodRatio, ...]
    not_nested: tuple[tuple[str, str, str], ...]
    seed: int

    @property
    def best(self) -> str | None:
        """The law of least AICc; None where no law has one."""
        scored = [score for score in self.laws if score.aicc is not None]
        return min(scored, key=lambda score: score.aicc or 0.0).law if scored else None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return {
            "scale": self.scale,
            "loss": self.loss,
            "n": self.n,
            "best": self.best,
            "laws": [score.to_json() for score in self.laws],
            "tests": [dict(vars(test)) for test in self.tests],
            "not_nested": [{"laws": [one, other], "why": why} for one, other, why in self.not_nested],
            "seed": self.seed,
        }


def compare_laws(
    table: TableLike,
    laws: Sequence[str],
    columns: Mapping[str, str],
    loss: str = "least-squares",
    delta: float | None = None,
    bootstrap: int = 399,
    seed: int = 0,
    scale: str | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    fixed: Mapping[str, float] | None = None,
    weights: str | None = None,
) -> Comparison:
    """Compares laws of one metric on one table.

    ``columns``: every law's sizes, and the metric as R (a gain) or L (a loss); a law of the other kind is given the same column.
    ``loss`` and ``delta``: of the fits in the result. The criteria and tests are of normal noise whatever the loss, each law at
    its own maximum, all on one ``scale``: `linear` or `log` (noise in proportion to the metric), by default that of the loss's
    residuals. ``bootstrap``: draws for each test; 0 leaves the tests out.

    ``bounds``, ``fixed``: of parameters, in each of the laws that has them. ``weights``: of the rows, as in `fit_law`; taken for
    reciprocals of the noise's variance, but for one factor.

    A test is made for each pair in `NESTED` among ``laws``. Raises FitError where a law cannot be fitted (see `fit_law`), and for
    two laws of different metrics.
    """
    which, metric = _laws(laws, columns)
    if loss not in LOSSES:
        raise FitError(f"unknown loss {loss!r}; there are {', '.join(LOSSES)}")
    scale = LOSSES[loss] if scale is None else scale
    if scale not in ("linear", "log"):
        raise FitError(f"unknown scale {scale!r}; there are linear and log")
    if bootstrap < 0:
        raise FitError(f"bootstrap {bootstrap} is negative; 0 for none, or a number of draws such as 399")
    rows = read_table(table)
    y = numbers(rows, metric, "the metric")
    if scale == "log" and y.min() <= 0:
        raise FitError(
            f"column {metric!r}, row {int(np.argmax(y <= 0)) + 1}: {y[y <= 0][0]:g} has no logarithm; use scale linear"
        )
    w = np.ones(len(y))
    if weights:
        # Of all laws' sizes together: weights by the sizes of one law would not be those of another.
        every = [
            sizes(rows, columns[role], role) for role in sorted({role for roles in which.values() for role in roles} - {"R", "L"})
        ]
        w = row_weights(rows, weights, y, Design(rungs(every)), scale == "log")
        rows = rows.append_column(_WEIGHTS, pa.array(w.tolist()))
    fits = {
        law: fit_law(rows, law, roles, loss, delta, bounds=low_high, fixed=values, weights=_WEIGHTS if weights else None)
        for law, (roles, low_high, values) in _own(which, bounds or {}, fixed or {}).items()
    }
    maxima = {law: _maximum(fits[law], rows, roles, y, scale, w) for law, roles in which.items()}
    tests: list[LikelihoodRatio] = []
    unnested: list[tuple[str, str, str]] = []
    for one, other in combinations(which, 2):
        pair = _nested(one, other, which)
        if isinstance(pair, str):
            unnested.append((one, other, pair))
        elif bootstrap:
            tests.append(_test(*pair, maxima, bootstrap, np.random.default_rng([seed, len(tests)])))
    return Comparison(scale, loss, len(y), _scores(fits, maxima), tuple(tests), tuple(unnested), seed)


def _laws(laws: Sequence[str], columns: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], str]:
    """Each law's own columns, and the metric's."""
    if isinstance(laws, str) or len(set(laws)) != len(laws) or len(laws) < 2:
        raise FitError(f"laws {laws!r}: a comparison needs two or more different laws")
    defined = {name: law_named(name) for name in laws}
    roles = {role for law in defined.values() for role in law.sizes}
    metrics = sorted(set(columns) - roles)
    if len(metrics) != 1:
        got = ", ".join(metrics) or "none"
        raise FitError(f"columns must name one metric (as R or L) beside the sizes {', '.join(sorted(roles))}; got {got}")
    for name, law in defined.items():
        missing = [role for role in law.sizes if role not in columns]
        if missing:
            raise FitError(f"law {name} ({law.formula}) needs a column for {missing[0]}; got {', '.join(sorted(columns))}")
    metric = columns[metrics[0]]
    return {name: {role: columns[role] for role in law.sizes} | {law.response: metric} for name, law in defined.items()}, metric


def _own(
    which: Mapping[str, dict[str, str]], bounds: Mapping[str, tuple[float, float]], fixed: Mapping[str, float]
) -> dict[str, tuple[dict[str, str], dict[str, tuple[float, float]], dict[str, float]]]:
    """Each law's columns, and the bounds and fixed values of the parameters that it has."""
    params = {law: law_named(law).params for law in which}
    for name in (*bounds, *fixed):
        if not any(name in own for own in params.values()):
            raise FitError(f"none of the laws {', '.join(which)} has a parameter {name!r}")
    return {
        law: (roles, {n: v for n, v in bounds.items() if n in params[law]}, {n: v for n, v in fixed.items() if n in params[law]})
        for law, roles in which.items()
    }


@dataclass(frozen=True)
class _Maximum:
    """A law at its maximum likelihood: ``p`` (params,) of ``problem``, whose metric is ``y / problem.scale``."""

    problem: Problem
    p: Floats
    squares: float
    log_likelihood: float | None

    @property
    def n(self) -> int:
        return int(self.problem.y.shape[1])


_EXACT = 1e-14
"""Mean square of residuals, of a metric of about one, that is rounding and no noise."""


def _maximum(fit: FitResult, rows: pa.Table, roles: Mapping[str, str], y: Floats, scale: str, w: Floats) -> _Maximum:
    law = fit.definition
    logs = {role: np.log(sizes(rows, roles[role], role)) for role in law.sizes}
    unit = float(np.median(np.abs(y))) or float(np.max(np.abs(y)))
    loss = "log-huber" if scale == "log" else "least-squares"
    w = w / np.exp(np.log(w).mean())  # so that they leave the likelihood's determinant as it is
    problem = Problem(law, logs, y[None] / unit, w[None], loss, np.inf, unit)
    p = solve(problem).p
    squares, n = float(np.sum(w * problem.residuals(p[None])[0] ** 2)), len(y)
    if squares <= _EXACT * n:
        return _Maximum(problem, p, squares, None)
    # The density of the metric itself: of its logarithm divided by the metric, or of the scaled one divided by the unit.
    jacobian = float(np.sum(np.log(y))) if scale == "log" else n * np.log(unit)
    return _Maximum(problem, p, squares, float(-0.5 * n * (np.log(2 * np.pi * squares / n) + 1) - jacobian))


def _scores(fits: Mapping[str, FitResult], maxima: Mapping[str, _Maximum]) -> tuple[LawScore, ...]:
    criteria = {}
    for law, at in maxima.items():
        k, n = int(np.sum(~at.problem.held)) + 1, at.n
        aicc = bic = None
        if at.log_likelihood is not None:
            bic = -2 * at.log_likelihood + k * float(np.log(n))
            if n - k - 1 > 0:
                aicc = -2 * at.log_likelihood + 2 * k + 2 * k * (k + 1) / (n - k - 1)
        criteria[law] = (k, aicc, bic)
    least = min((aicc for _, aicc, _ in criteria.values() if aicc is not None), default=0.0)
    total = sum(float(np.exp(-0.5 * (aicc - least))) for _, aicc, _ in criteria.values() if aicc is not None)
    out = []
    for law, at in maxima.items():
        k, aicc, bic = criteria[law]
        difference = None if aicc is None else aicc - least
        weight = None if difference is None else float(np.exp(-0.5 * difference)) / total
        sd = float(np.sqrt(at.squares / at.n)) * (1.0 if at.problem.log else at.problem.scale)
        out.append(LawScore(law, k, sd, at.log_likelihood, aicc, bic, difference, weight, fits[law]))
    return tuple(out)


def _nested(one: str, other: str, which: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | str:
    """(smaller, larger), or why the two are not nested."""
    for small, large in ((one, other), (other, one)):
        if (small, large) not in NESTED:
            continue
        adds, roles = NESTED[small, large]
        if all(which[small][role] in [which[large][into] for into in allowed] for role, allowed in roles.items()):
            return small, large
        allowed = " or ".join(role for into in roles.values() for role in into)
        return f"{small} is nested in {large} ({adds}) only where its N is the column of {allowed}"
    return _LIMITS.get(frozenset((one, other)), "neither is tested as a special case of the other; their AICc can be compared")


def _test(small: str, large: str, maxima: Mapping[str, _Maximum], draws: int, rng: np.random.Generator) -> LikelihoodRatio:
    at, n = maxima[small], maxima[small].n
    sd, dof, source = _noise(at)
    mean = at.problem.fitted(at.p[None])
    luck = sd / np.sqrt(at.problem.weights) * rng.normal(size=(draws, n))
    drawn = mean * np.exp(luck) if at.problem.log else mean + luck
    # The table itself goes through the same search as the draws, so that what a search misses, it misses in both.
    y = np.concatenate([at.problem.y, drawn])
    squares = {law: sums_of_squares(replace(maxima[law].problem, y=y)) for law in (small, large)}
    for law in (small, large):
        squares[law][0] = min(squares[law][0], maxima[law].squares)
    floor = _EXACT * n
    ratio = n * np.log(np.maximum(squares[small], floor) / np.maximum(np.minimum(squares[large], squares[small]), floor))
    p = (1 + int(np.sum(~(ratio[1:] < ratio[0])))) / (1 + draws)  # a draw that nothing fits speaks for the smaller law
    sd *= 1.0 if at.problem.log else at.problem.scale
    return LikelihoodRatio(NESTED[small, large][0], small, large, float(ratio[0]), p, draws, sd, dof, source)


def _noise(at: _Maximum) -> tuple[float, int, str]:
    """A run's standard deviation on the scale, its degrees of freedom, and whether it comes from replicates or residuals."""
    design, root = Design(rungs([np.exp(values) for values in at.problem.logs.values()])), np.sqrt(at.problem.weights[0])
    if design.dof < _ENOUGH:
        dof = max(at.n - int(np.sum(~at.problem.held)), 1)
        return float(np.sqrt(at.squares / dof)), dof, "residuals"
    y = np.log(at.problem.y[0]) if at.problem.log else at.problem.y[0]
    pure = 0.0
    for group in design.groups:
        rows = np.concatenate(group)
        middle = np.average(y[rows], weights=root[rows] ** 2)
        pure += float(np.sum((root[rows] * (y[rows] - middle)) ** 2))
    return float(np.sqrt(pure / design.dof)), design.dof, "replicates"
