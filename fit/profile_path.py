"""What a profile goes along: one parameter, or the law's mean at one row of sizes, held at a value while the rest is fitted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fit.errors import FitError
from fit.identify import standard_errors
from fit.laws import EXPONENT_BOUNDS, Law
from fit.problem import Problem
from fit.tables import Floats, read_table
from fit.tables import sizes as sizes_of

if TYPE_CHECKING:
    from fit.result import FitResult

_E_FOLDS, _ERRORS = 60.0, 1e9
"""How far the walk goes before an end is open: of a positive parameter's logarithm, and of others in standard errors."""


@dataclass(frozen=True)
class Path:
    """What is held, along a coordinate ``x`` in which its profile is nearly straight: its logarithm if it is positive."""

    name: str
    start: float
    """x at the fit."""
    step: float
    reach: float
    low: float
    high: float
    """x at its bounds."""
    held: Callable[[float], Problem]
    seat: Callable[[Floats, float], Floats]
    """Parameters (starts, params) moved to an x."""
    at: Callable[[Floats, float], float]
    """The x of parameters (params,) that were fitted with the last argument's x held."""
    value: Callable[[float], float]
    closed: tuple[float | None, float | None]
    """The values at which the interval ends where the profile reaches a bound; None: the end is open there."""
    ranged: bool
    """Whether an end that another parameter's search range makes is open."""
    own: NDArray[np.bool_]
    """(params,): the parameter that is held."""
    reading: Callable[[Floats], Floats]
    """What is held, of parameters (points, params) of the fit."""


def parameter(result: "FitResult", name: str) -> Path:
    problem, p, law = result.problem, result.optimum, result.problem.law
    if name not in law.params:
        raise FitError(f"law {result.law} has no parameter {name!r}; it has {', '.join(law.params)}")
    i, m = law.params.index(name), len(law.terms)
    if problem.held[i]:
        raise FitError(f"{name} is held at {result.params[name]:g}; a profile is of what was fitted")
    value, fixed = result.params[name], law.terms[i] if i < m else law.thetas[i - m]
    lower, upper = fixed.lower, fixed.upper
    by_log = i >= m and law.thetas[i - m].kind == "break"  # in the solver's parameters
    if by_log:
        lower, upper = (float(np.exp(bound[i])) for bound in problem.bounds)
    power = i < m and law.terms[i].log_shape is not None
    logs, unit = value > 0 and lower >= 0 and (power or i >= m), problem.scale if i < m else 1.0
    error = standard_errors(problem, p)[0][i] * (value if by_log else unit)
    if power or not 0 < error < np.inf:
        error = 0.04 * (value if logs else max(abs(value), float(np.ptp(problem.y[0])) * problem.scale))

    def plain(x: float) -> float:
        return float(np.exp(x)) if logs else float(x)

    def seat(candidates: Floats, x: float) -> Floats:
        out = candidates.copy()
        out[:, i] = np.log(plain(x)) if by_log else plain(x) / unit
        return out

    with np.errstate(divide="ignore"):
        start, low, high = (float(np.log(v)) if logs else float(v) for v in (value, lower, upper))
    return Path(
        name=name,
        start=start,
        step=0.5 * error / (value if logs else 1.0),
        reach=_E_FOLDS if logs else _ERRORS * error,
        low=low,
        high=high,
        held=lambda x: replace(problem, law=_held(law, i, plain(x))),
        seat=seat,
        at=lambda _p, x: x,
        value=plain,
        closed=(bound_of(law, i, lower), bound_of(law, i, upper)),
        ranged=True,
        own=np.arange(len(p)) == i,
        reading=lambda moved: problem.plain(moved)[:, i],
    )


def _held(law: Law, i: int, value: float) -> Law:
    m = len(law.terms)
    if i < m:
        term = replace(law.terms[i], lower=value, upper=value, centred=False)
        return replace(law, terms=(*law.terms[:i], term, *law.terms[i + 1 :]))
    theta = replace(law.thetas[i - m], lower=value, upper=value)
    return replace(law, thetas=(*law.thetas[: i - m], theta, *law.thetas[i - m + 1 :]))


def bound_of(law: Law, i: int, bound: float) -> float | None:
    """A bound that the parameter cannot pass, such as zero, or that the user gave; None for the end of a search range."""
    m = len(law.terms)
    if i >= m:
        kind = law.thetas[i - m].kind
        if kind in ("break", "free") or (kind == "exponent" and bound in EXPONENT_BOUNDS):
            return None
    return bound if np.isfinite(bound) else None


def prediction(result: "FitResult", sizes: Mapping[str, Any]) -> Path:
    """A mean is held by one more row, of that metric and a large weight: what is fitted then is the best fit of all that
    have its own mean there, whatever it is."""
    problem, p = result.problem, result.optimum
    here = _logs(result, sizes)
    # The row may lie beyond the sizes that a break is sought among.
    law = replace(
        problem.law,
        thetas=tuple(
            replace(t, lower=float(np.exp(problem.bounds[0][i])), upper=float(np.exp(problem.bounds[1][i])))
            if t.kind == "break"
            else t
            for i, t in enumerate(problem.law.thetas, len(problem.law.terms))
        ),
    )
    logs = {role: np.append(values, here[role]) for role, values in problem.logs.items()}
    weights = np.append(problem.weights, [[100.0 * problem.weights.sum()]], axis=1)
    alone = replace(problem, law=law, logs=here, y=np.ones((1, 1)), weights=np.ones((1, 1)), around=problem.refs)
    base = replace(problem, law=law, logs=logs, weights=weights, around=problem.refs)

    def at(found: Floats, _x: float) -> float:
        value = float(alone.fitted(found[None])[0, 0])
        if not problem.log:
            return value
        return float(np.log(value)) if value > 0 else -np.inf

    def held(x: float) -> Problem:
        return replace(base, y=np.append(problem.y, [[np.exp(x) if problem.log else x]], axis=1))

    noise = float(np.sqrt(np.mean(problem.residuals(p[None]) ** 2)))
    return Path(
        name=f"{problem.law.response} at {', '.join(f'{role}={value}' for role, value in sizes.items())}",
        start=at(p, 0.0),
        step=0.2 * noise,
        reach=_E_FOLDS if problem.log else _ERRORS * noise,
        low=-np.inf,
        high=np.inf,
        held=held,
        seat=lambda candidates, _x: candidates,
        at=at,
        value=lambda x: float(np.exp(x) if problem.log else x) * problem.scale,
        closed=(None, None),
        ranged=False,
        own=np.zeros(len(p), dtype=bool),
        reading=lambda moved: alone.fitted(moved)[:, 0],
    )


def _logs(result: "FitResult", sizes: Mapping[str, Any]) -> dict[str, Floats]:
    """Logarithms (1,) of one row's sizes, named as in the law or in the table; of a grouped fit also of its group's."""
    rows = read_table({name: np.atleast_1d(value) for name, value in sizes.items()})
    if rows.num_rows != 1:
        raise FitError("a profile is of one prediction at a time; give one value for each size")
    out = {}
    for role in result.sizes:
        name = result.columns[role]
        out[role] = np.log(sizes_of(rows, name if name in rows.column_names or role not in rows.column_names else role, role))
    if not result.problem.law.groups:
        return out
    if result.groups is None:
        raise FitError("this is one group of a fit; profile the prediction of the whole fit, with the group among the sizes")
    levels = result.groups.levels
    group = str(sizes.get(result.groups.column))
    if group not in levels:
        raise FitError(f"no group {group!r} in this fit; there are {', '.join(levels)} (column {result.groups.column!r})")
    for level in levels:
        out[f"[{level}]"] = np.array([float(level == group)])
        for role in result.sizes:
            own = f"{role}[{level}]"
            out[own] = out[role] if level == group else result.problem.refs[own]
    return out
