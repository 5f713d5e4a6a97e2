"""Where a search starts: a grid over the nonlinear parameters, with the linear ones exact at each of its points.

Variable projection: Golub and Pereyra 1973 (SIAM J. Numer. Anal. 10:413).
"""

from dataclasses import replace
from itertools import product

import numpy as np

from fit.errors import FitError
from fit.laws import Nonlinear
from fit.problem import Problem
from fit.tables import Floats

ROWS = 2000
TICKS = {1: 40, 2: 20, 3: 12, 4: 8}
"""Grid points along each of so many nonlinear parameters; more of them get 6."""
_CHUNK = 1_000_000  # numbers in a grid's shapes, over tables, that are worked on at once


def starts(problem: Problem, count: int) -> Floats:
    """(up to ``count``, params): the best grid points of the problem's first table that are not each other's neighbours."""
    one = some_rows(problem.take(np.zeros(1, dtype=np.intp)))
    cells, theta = grid(one)
    c, costs = grid_costs(one, one.basis(theta))
    chosen = apart(cells, costs[0], count)
    return np.concatenate([c[0, chosen], theta[chosen]], axis=1)


def table_starts(problem: Problem) -> Floats:
    """(tables, params): each table's best grid point."""
    some, tables = some_rows(problem), max(len(problem.y), len(problem.weights))
    _, theta = grid(some)
    basis = some.basis(theta)
    out = np.empty((tables, len(problem.law.params)))
    size = max(1, _CHUNK // basis.size)
    for first in range(0, tables, size):
        chosen = np.arange(first, min(first + size, tables))
        c, costs = grid_costs(some.take(chosen), basis)
        best = np.argmin(costs, axis=1)
        out[chosen] = np.concatenate([c[np.arange(len(chosen)), best], theta[best]], axis=1)
    return out


def grid_costs(problem: Problem, basis: Floats) -> tuple[Floats, Floats]:
    """Of each table at each grid point, whose shapes are ``basis`` (points, rows, linear): the linear parameters (tables, points,
    linear), and what is left of the loss (tables, points), infinite where a log residual has no value."""
    c = _linear(problem, basis)
    each = replace(problem, y=problem.y[:, None], weights=problem.weights[:, None])
    residuals = each.of_fitted(_sums(basis, c))
    if problem.loss != "l1":
        return c, each.cost(residuals)
    costs = np.sum(each.weights * np.abs(residuals), axis=-1)
    return c, np.where(np.isnan(costs), np.inf, costs)


def apart(cells: np.ndarray, costs: Floats, count: int) -> list[int]:
    """Up to ``count`` of the points of least finite cost, no two of them neighbours on the grid."""
    chosen: list[int] = []
    for i in np.argsort(costs, kind="stable"):
        if len(chosen) == count or not np.isfinite(costs[i]):
            break
        if all(np.max(np.abs(cells[i] - cells[j]), initial=0) > 1 for j in chosen):
            chosen.append(int(i))
    return chosen


def some_rows(problem: Problem) -> Problem:
    """At most `ROWS` of them, evenly by size: enough to tell where to start, and a grid over all rows of a large table takes most
    of its fit's time."""
    count = problem.y.shape[1]
    if count <= ROWS:
        return problem
    order = np.lexsort((problem.y[0], *problem.logs.values()))
    kept = order[np.linspace(0, count - 1, ROWS).round().astype(np.intp)]
    logs = {role: values[kept] for role, values in problem.logs.items()}
    return replace(problem, logs=logs, y=problem.y[:, kept], weights=problem.weights[:, kept], around=problem.refs)


def grid(problem: Problem) -> tuple[np.ndarray, Floats]:
    """(points, nonlinear) cell numbers and values, one value where bounds hold a parameter."""
    thetas = problem.law.thetas
    m = len(problem.law.terms)
    free = sum(not held for held in problem.held[m:])
    return crossed([ticks(problem, t, i + m, TICKS.get(free, 6)) for i, t in enumerate(thetas)])


def crossed(axes: list[Floats]) -> tuple[np.ndarray, Floats]:
    """(points, axes) cell numbers and values of the grid with these ticks."""
    if not axes:
        return np.empty((1, 0), dtype=np.intp), np.empty((1, 0))
    cells = np.stack(np.meshgrid(*(np.arange(len(t)) for t in axes), indexing="ij"), axis=-1).reshape(-1, len(axes))
    return cells, np.stack([t[cells[:, i]] for i, t in enumerate(axes)], axis=1)


def ticks(problem: Problem, theta: Nonlinear, at: int, count: int) -> Floats:
    """Where to search for a nonlinear parameter, ``at`` among the law's: ``count`` values, or the one that it is held at."""
    low, high = problem.bounds[0][at], problem.bounds[1][at]
    if low == high:
        return np.array([low])
    if theta.kind == "exponent" and low > 0:
        return np.geomspace(low, high, count)
    if theta.kind == "break":
        return np.linspace(low, high, count + 2)[1:-1]
    if theta.kind == "coupling":
        # From 'counts for nothing' to 'is all that counts', in units of the two sizes' ratio.
        unit = float(np.exp(problem.refs[theta.main] - problem.refs[theta.size])[0])
        values = unit * np.concatenate([[0.0], np.geomspace(1e-2, 1e2, count - 1)])
        return np.unique(np.clip(values, low, high))
    if np.isinf(low) or np.isinf(high):
        raise FitError(f"{theta.name}: nowhere to search for it; give its bounds, such as {theta.name}=0:10")
    return np.linspace(low, high, count)


def _linear(problem: Problem, basis: Floats) -> Floats:
    """(tables, points, linear): the exact linear parameters at each grid point for squares, nearly so for Huber and L1."""
    m = basis.shape[-1]
    lower, upper = problem.bounds[0][:m], problem.bounds[1][:m]
    y, weights = problem.y[:, None], problem.weights[:, None]
    scale = y if problem.log else np.ones_like(y)  # relative residuals stand in for log residuals
    weights = np.broadcast_to(weights / scale**2, (max(len(y), len(weights)), *basis.shape[:2]))
    c = bounded_least_squares(basis, y, weights, lower, upper)
    if np.isinf(problem.delta) and problem.loss != "l1":
        return c
    for _ in range(8):
        r = np.abs(_sums(basis, c) - y) / scale
        delta = problem.delta if problem.loss != "l1" else 1e-2 * np.maximum(np.median(r, axis=(1, 2), keepdims=True), 1e-300)
        c = bounded_least_squares(basis, y, weights * np.minimum(1.0, delta / np.maximum(r, 1e-300)), lower, upper)
    return c


def _sums(basis: Floats, c: Floats) -> Floats:
    """(tables, points, rows): the terms' sums."""
    return np.asarray((basis @ c[..., None])[..., 0])


def bounded_least_squares(basis: Floats, y: Floats, weights: Floats, lower: Floats, upper: Floats) -> Floats:
    """Exact weighted least squares within bounds, for every grid point of every table at once.

    ``basis`` (points, rows, m), ``y`` (tables, 1, rows), ``weights`` (tables, points, rows), bounds (m,); returns (tables,
    points, m). With few parameters the bounded optimum is the best feasible one among the solutions that hold each subset of
    them at a bound.
    """
    weighted = (basis * weights[..., None]).swapaxes(-1, -2)
    gram = weighted @ basis
    right = (weighted @ y[..., None])[..., 0]
    root = np.sqrt(np.maximum(np.einsum("...mm->...m", gram), 1e-300))
    gram = gram / (root[..., :, None] * root[..., None, :]) + 1e-13 * np.eye(len(lower))  # the ridge keeps twin columns solvable
    right = right / root
    low, high = lower * root, upper * root  # in the scaled columns' unit
    best, gain = np.zeros(right.shape), np.full(right.shape[:-1], -np.inf)
    for states in product(*(_states(lo, hi) for lo, hi in zip(lower, upper, strict=True))):
        free = [j for j, state in enumerate(states) if state == "free"]
        c = np.zeros(right.shape)
        for j, state in enumerate(states):
            if state != "free":
                c[..., j] = (low if state == "lower" else high)[..., j]
        if free:
            rest = right[..., free] - (gram[..., free, :] @ c[..., None])[..., 0]
            c[..., free] = np.linalg.solve(gram[..., free, :][..., free], rest[..., None])[..., 0]
        value = np.sum(c * (2 * right - (gram @ c[..., None])[..., 0]), axis=-1)
        slack = 1e-12 * np.abs(c)
        better = np.all((c >= low - slack) & (c <= high + slack), axis=-1) & (value > gain)
        best[better], gain[better] = c[better], value[better]
    return np.asarray(np.clip(best / root, lower, upper))


def _states(lower: float, upper: float) -> list[str]:
    if lower == upper:
        return ["lower"]
    return ["free", *(["lower"] if np.isfinite(lower) else []), *(["upper"] if np.isfinite(upper) else [])]
