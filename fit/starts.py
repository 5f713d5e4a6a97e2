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


def starts(problem: Problem, count: int) -> Floats:
    """(up to ``count``, params): the best grid points of the problem's first table that are not each other's neighbours."""
    one = _some_rows(problem.take(np.zeros(1, dtype=np.intp)))
    cells, theta = grid(one)
    basis = one.basis(theta)
    c = _linear(one, basis)
    fitted = np.einsum("grm,gm->gr", basis, c)
    residuals = one.of_fitted(fitted)
    if one.loss == "l1":
        costs = np.sum(one.weights * np.abs(residuals), axis=-1)
        costs = np.where(np.isnan(costs), np.inf, costs)
    else:
        costs = one.cost(residuals)
    chosen: list[int] = []
    for i in np.argsort(costs, kind="stable"):
        if len(chosen) == count or not np.isfinite(costs[i]):
            break
        if all(np.max(np.abs(cells[i] - cells[j]), initial=0) > 1 for j in chosen):
            chosen.append(int(i))
    return np.concatenate([c[chosen], theta[chosen]], axis=1)


def _some_rows(problem: Problem) -> Problem:
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
    ticks = [_ticks(problem, t, i + m, TICKS.get(free, 6)) for i, t in enumerate(thetas)]
    cells = (
        np.stack(np.meshgrid(*(np.arange(len(t)) for t in ticks), indexing="ij"), axis=-1).reshape(-1, len(ticks))
        if ticks
        else (np.empty((1, 0), dtype=np.intp))
    )
    theta = np.stack([t[cells[:, i]] for i, t in enumerate(ticks)], axis=1) if ticks else np.empty((1, 0))
    return cells, theta


def _ticks(problem: Problem, theta: Nonlinear, at: int, count: int) -> Floats:
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
        ticks = unit * np.concatenate([[0.0], np.geomspace(1e-2, 1e2, count - 1)])
        return np.unique(np.clip(ticks, low, high))
    if np.isinf(low) or np.isinf(high):
        raise FitError(f"{theta.name}: nowhere to search for it; give its bounds, such as {theta.name}=0:10")
    return np.linspace(low, high, count)


def _linear(problem: Problem, basis: Floats) -> Floats:
    """(points, linear): the exact linear parameters at each grid point for squares, nearly so for Huber and L1."""
    m = basis.shape[-1]
    lower, upper = problem.bounds[0][:m], problem.bounds[1][:m]
    y, scale = problem.y[0], problem.y[0] if problem.log else np.ones_like(problem.y[0])
    weights = np.broadcast_to(problem.weights[0] / scale**2, basis.shape[:2])  # relative residuals stand in for log residuals
    c = bounded_least_squares(basis, y, weights, lower, upper)
    if np.isinf(problem.delta) and problem.loss != "l1":
        return c
    for _ in range(8):
        r = np.abs(np.einsum("grm,gm->gr", basis, c) - y) / scale
        delta = problem.delta if problem.loss != "l1" else 1e-2 * max(float(np.median(r)), 1e-300)
        c = bounded_least_squares(basis, y, weights * np.minimum(1.0, delta / np.maximum(r, 1e-300)), lower, upper)
    return c


def bounded_least_squares(basis: Floats, y: Floats, weights: Floats, lower: Floats, upper: Floats) -> Floats:
    """Exact weighted least squares within bounds, for every grid point at once.

    ``basis`` (points, rows, m), ``y`` (rows,), ``weights`` (points, rows), bounds (m,); returns (points, m). With few parameters
    the bounded optimum is the best feasible one among the solutions that hold each subset of them at a bound.
    """
    weighted = basis * weights[..., None]
    gram = weighted.transpose(0, 2, 1) @ basis
    right = np.einsum("grm,r->gm", weighted, y)
    root = np.sqrt(np.maximum(np.einsum("gmm->gm", gram), 1e-300))
    gram = gram / (root[:, :, None] * root[:, None, :]) + 1e-13 * np.eye(len(lower))  # the ridge keeps twin columns solvable
    right = right / root
    low, high = lower * root, upper * root  # in the scaled columns' unit
    best, gain = np.zeros(right.shape), np.full(len(basis), -np.inf)
    for states in product(*(_states(lo, hi) for lo, hi in zip(lower, upper, strict=True))):
        free = [j for j, state in enumerate(states) if state == "free"]
        c = np.zeros(right.shape)
        for j, state in enumerate(states):
            if state != "free":
                c[:, j] = (low if state == "lower" else high)[:, j]
        if free:
            rest = right[:, free] - np.einsum("gjk,gk->gj", gram[:, free], c)
            c[:, free] = np.linalg.solve(gram[:, free][:, :, free], rest[..., None])[..., 0]
        value = 2 * np.sum(c * right, axis=1) - np.einsum("gm,gmk,gk->g", c, gram, c)
        slack = 1e-12 * np.abs(c)
        better = np.all((c >= low - slack) & (c <= high + slack), axis=1) & (value > gain)
        best[better], gain[better] = c[better], value[better]
    return np.asarray(np.clip(best / root, lower, upper))


def _states(lower: float, upper: float) -> list[str]:
    if lower == upper:
        return ["lower"]
    return ["free", *(["lower"] if np.isfinite(lower) else []), *(["upper"] if np.isfinite(upper) else [])]
