"""Least squares, Huber and L1 fits of a law: a grid over the nonlinear parameters, then Newton steps on all parameters at once.

Newton steps run on a whole batch: the starts of one fit, or the draws of a bootstrap. Whether a point is an optimum is judged
by its own scaled projected gradient, never by how the iteration ended.
"""

from dataclasses import dataclass, replace

import numpy as np

from fit.errors import FitError
from fit.problem import LOSSES, Problem, local
from fit.starts import starts, table_starts
from fit.tables import Floats

STARTS = 6
AT_OPTIMUM = {"log-huber": 1e-5, "huber": 1e-5, "least-squares": 1e-5, "l1": 1e-3}
"""Scaled projected gradients up to this are an optimum's; L1's is that of its smoothed form, steep within 1e-7 of its kinks."""
_L1_SMOOTHING = 1e-7  # of the median residual: Huber with so small a delta is L1 to 7 digits
_CHUNK = 4_000_000  # numbers in the Jacobians that are worked on at once


@dataclass(frozen=True)
class Solution:
    """``p``: (params,); ``gradient``: scaled projected gradient, 0 at an optimum, at most 1; ``agreeing`` of ``starts``."""

    p: Floats
    objective: float
    gradient: float
    starts: int = 1
    agreeing: int = 1
    moved: bool = True
    """False where the result is the start that the search was given."""


def solve(problem: Problem) -> Solution:
    """The best optimum found for the problem's first table."""
    if problem.law.groups:
        from fit.group_search import group_starts, solve_each  # imported here: it solves its groups by this module

        if problem.law.separate:
            return solve_each(problem)
        candidates = group_starts(problem, STARTS)
    else:
        candidates = starts(problem, STARTS)
    if not len(candidates):
        raise FitError(f"law {problem.law.name}: no start gives positive predictions; use a loss on linear residuals (huber)")
    return best_of(problem, candidates)


def best_of(problem: Problem, candidates: Floats) -> Solution:
    """The best of the optima reached from ``candidates`` (starts, params)."""
    p, gradient = polish(problem, candidates)
    objective = problem.objective(p)
    i = int(np.argmin(objective))
    agreeing = int(np.sum(objective <= objective[i] * (1 + 1e-6) + 1e-20))
    moved = bool(np.any(p[i] != candidates[i])) or not problem.law.thetas
    return Solution(p[i], float(objective[i]), float(gradient[i]), len(candidates), agreeing, moved)


def solve_tables(problem: Problem, warm: Floats, tolerance: float = 1e-6) -> Floats:
    """(tables, params): the optimum of each table of a batch, from the better of ``warm`` (params,) and, for a law of one
    nonlinear parameter, the table's best grid point.

    To a millionth, far below what draws differ by.
    """
    if problem.law.separate:
        from fit.group_search import solve_each_tables

        return solve_each_tables(problem, warm, tolerance)
    tables = max(len(problem.y), len(problem.weights))
    size = max(1, _CHUNK // (problem.y.shape[1] * len(problem.law.params)))
    out = np.empty((tables, len(warm)))
    for first in range(0, tables, size):
        chosen = np.arange(first, min(first + size, tables))
        part = problem.take(chosen)
        p = np.tile(warm, (len(chosen), 1))
        if len(problem.law.thetas) <= 1 and not problem.law.groups:
            p = _better_starts(part, p)
        out[chosen] = polish(part, p, tolerance)[0]
    return out


def _better_starts(problem: Problem, p: Floats) -> Floats:
    found = table_starts(problem)
    return np.where((problem.objective(found) < problem.objective(p))[:, None], found, p)


def polish(problem: Problem, p: Floats, tolerance: float = 1e-10) -> tuple[Floats, Floats]:
    """Descends from each row of ``p`` (tables or starts, params) to the optimum of its valley; with scaled projected gradients.

    Where delta is small against the residuals the loss is nearly L1, whose kinks stop Newton steps far from the optimum; so delta
    is brought down from the residuals' own size.
    """
    gradient = np.zeros(len(p))
    with np.errstate(invalid="ignore"):
        spread = float(np.nanmedian(np.abs(problem.residuals(p))))
    for delta in _deltas(problem, spread):
        last = delta == problem.delta or problem.loss == "l1"
        p, gradient = newton(replace(problem, delta=delta), p, tolerance if last else max(tolerance, 1e-6))
    return p, gradient


def _deltas(problem: Problem, spread: float) -> list[float]:
    last = max(_L1_SMOOTHING * spread, 1e-12) if problem.loss == "l1" else problem.delta
    steps = int(np.ceil(np.log(spread / last) / np.log(6.0))) if last < spread < np.inf else 0
    return [*(spread / 6.0**k for k in range(steps)), last]


def newton(problem: Problem, p: Floats, tolerance: float, iterations: int = 300) -> tuple[Floats, Floats]:
    """Damped Newton steps within the bounds, each row of ``p`` by itself; returns points and scaled projected gradients.

    The damping blends the exact Hessian (fast near the optimum) into the reweighted Gauss-Newton one (safe far from it, and
    positive where few rows lie within delta), then into steepest descent.
    """
    lower, upper = problem.bounds
    p = np.clip(p, lower, upper)
    cost = problem.cost(problem.residuals(p))
    damping, gradient = np.full(len(p), 1e-2), np.zeros(len(p))
    floor = 1e-26 * np.broadcast_to(np.sum(problem.weights, axis=1), len(p))
    state: dict[str, Floats] = {}
    stale = np.ones(len(p), dtype=bool)
    active = np.arange(len(p))
    for _ in range(iterations):
        _refresh(problem, p, active[stale[active]], state)
        stale[:] = False
        g, free = state["g"][active], ~problem.held & ~_blocked(p[active], state["g"][active], lower, upper)
        gradient[active] = np.max(np.where(free, np.abs(state["cosines"][active]), 0.0), axis=1, initial=0.0)
        exact = cost[active] <= floor[active]  # residuals are rounding: their direction says nothing
        gradient[active[exact]] = np.minimum(gradient[active[exact]], tolerance)
        going = (gradient[active] >= tolerance) & ~exact
        active, g, free = active[going], g[going], free[going]
        if not len(active):
            break
        step, solved = _steps(g, state["hessian"][active], state["majorant"][active], free, damping[active])
        trial = np.clip(p[active] + step, lower, upper)
        trial_cost = (
            problem.take(active).cost(problem.take(active).residuals(trial))
            if _batched(problem)
            else problem.cost(problem.residuals(trial))
        )
        moved = trial - p[active]
        promised = -(np.sum(g * moved, 1) + 0.5 * np.einsum("ti,tij,tj->t", moved, state["hessian"][active], moved))
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = np.where(promised > 0, (cost[active] - trial_cost) / promised, np.where(trial_cost < cost[active], 1.0, -1.0))
        kept[~solved] = -1.0
        rise, fall = kept < 0.25, kept > 0.75
        now = damping[active]
        damping[active] = np.where(rise, np.maximum(4 * now, 1e-6), np.where(fall, np.where(now > 1e-8, now / 8, 0.0), now))
        taken = solved & (trial_cost < cost[active]) & (kept > 1e-3)
        tiny = solved & (promised >= 0) & (promised <= max(1e-16, tolerance**2) * cost[active])
        p[active[taken]], cost[active[taken]], stale[active[taken]] = trial[taken], trial_cost[taken], True
        active = active[taken | (~tiny & (damping[active] < 1e12))]
    return p, gradient


def _batched(problem: Problem) -> bool:
    return len(problem.y) > 1 or len(problem.weights) > 1


def _refresh(problem: Problem, p: Floats, rows: np.ndarray, state: dict[str, Floats]) -> None:
    """Brings the derivatives of the rows that moved up to date."""
    if not len(rows):
        return
    here = local(problem.take(rows) if _batched(problem) else problem, p[rows])
    for name in ("g", "hessian", "majorant", "cosines"):
        values = getattr(here, name)
        if name not in state:
            state[name] = np.zeros((len(p), *values.shape[1:]))
        state[name][rows] = values


def _blocked(p: Floats, g: Floats, lower: Floats, upper: Floats) -> np.ndarray:
    return ((p <= lower) & (g > 0)) | ((p >= upper) & (g < 0))


def _steps(g: Floats, hessian: Floats, majorant: Floats, free: np.ndarray, damping: Floats) -> tuple[Floats, np.ndarray]:
    """Each row's step, and whether it is one: downhill, and of a matrix that has an inverse."""
    # Far from an optimum steps shrink along the reweighted Gauss-Newton direction, which follows the valley. A little of its
    # diagonal holds back the directions that it does not see; all of it is the last resort where a bound cuts the valley off.
    diagonal = np.einsum("tii->ti", majorant)
    identity = np.eye(g.shape[1])
    spread = diagonal[:, :, None] * identity
    blend = np.where((damping < 1e6)[:, None, None], majorant + 0.03 * spread, spread)
    matrix = hessian + damping[:, None, None] * blend
    root = np.sqrt(np.maximum(diagonal, 1e-300))
    matrix = matrix / (root[:, :, None] * root[:, None, :]) + 1e-14 * identity
    both = free[:, :, None] & free[:, None, :]
    matrix = np.where(both, matrix, identity)
    usable = np.isfinite(matrix).all((1, 2)) & np.isfinite(g).all(1)
    matrix[~usable] = identity
    # Downhill is not enough: on an indefinite matrix a Newton step may go to a saddle.
    usable &= np.linalg.eigvalsh(matrix)[:, 0] > 0
    matrix[~usable] = identity
    right = np.where(free & usable[:, None], -g / root, 0.0)
    return np.linalg.solve(matrix, right[..., None])[..., 0] / root, usable


__all__ = ["AT_OPTIMUM", "LOSSES", "Problem", "Solution", "polish", "solve", "solve_tables"]
