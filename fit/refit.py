"""Least squares of one law to many tables of the same sizes at once: what a parametric bootstrap asks for.

On a grid over the nonlinear parameters the linear ones are exact for every table in one pass (variable projection, Golub and
Pereyra 1973), since all tables share the grid's Gram matrices. Each table's best grid points are then polished.
"""

from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fit.problem import Problem
from fit.solve import polish
from fit.starts import grid
from fit.tables import Floats

STARTS = 4
_CHUNK = 2_000_000  # numbers in a grid's linear parameters that are worked on at once


def sums_of_squares(problem: Problem) -> Floats:
    """(tables,): each table's least sum of squared residuals, in the residuals' unit; infinite where nothing fits.

    ``problem`` is one of squares (``delta`` infinite) whose tables share their weights.
    """
    cells, theta = grid(problem)
    basis = problem.basis(theta)
    size = max(1, _CHUNK // (basis.shape[0] * basis.shape[2]))
    out = np.empty(len(problem.y))
    for first in range(0, len(out), size):
        part = problem.take(np.arange(first, min(first + size, len(out))))
        owner, p = _starts(part, basis, theta, cells)
        squares = _polished(part.take(owner) if len(part.y) > 1 else replace(part, y=part.y[owner]), p)
        least = np.full(len(part.y), np.inf)
        np.minimum.at(least, owner, squares)
        out[first : first + size] = least
    return out


def _polished(problem: Problem, p: Floats) -> Floats:
    squares = np.full(len(p), np.inf)
    usable = np.isfinite(problem.cost(problem.residuals(p)))
    if usable.any():
        part = problem.take(np.flatnonzero(usable))
        p, _ = polish(part, p[usable], 1e-6)
        squares[usable] = 2 * part.cost(part.residuals(p))
    return squares


def _starts(problem: Problem, basis: Floats, theta: Floats, cells: NDArray[np.intp]) -> tuple[NDArray[np.intp], Floats]:
    """The table (starts,) and the parameters (starts, params) of each table's best local optima on the grid, up to `STARTS`.

    Under a smaller law the larger one has many optima of nearly the same quality (a break at any size, a term that takes any one
    point), so the best grid points would mostly lie in one valley.
    """
    from scipy.ndimage import maximum_filter

    m, shape = basis.shape[2], cells.max(axis=0, initial=0) + 1
    # Relative residuals stand in for log residuals, by the tables' common mean: a start need be no better.
    weight = np.sqrt(problem.weights[0]) / (problem.y.mean(axis=0) if problem.log else 1.0)
    c, gain = _linear(basis * weight[:, None], problem.y * weight, problem.bounds[0][:m], problem.bounds[1][:m])
    # A plateau, where a term does nothing, is one optimum: a slope far below what matters leaves it one highest corner.
    hill = (gain + 1e-12 * np.abs(gain).max() * cells.sum(axis=1)[:, None]).reshape(*shape, -1)
    peaks = (hill == maximum_filter(hill, size=(*[3] * len(shape), 1), mode="nearest")).reshape(gain.shape)
    order = np.argsort(np.where(peaks, -gain, np.inf), axis=0, kind="stable")[:STARTS]
    owner = np.broadcast_to(np.arange(len(problem.y)), order.shape)
    chosen, owner = order[peaks[order, owner]], owner[peaks[order, owner]]
    return owner, np.concatenate([c[chosen, :, owner], theta[chosen]], axis=1)


def _linear(basis: Floats, y: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
    """Exact least squares within bounds at every grid point and table: c (points, linear, tables), and by how much it lowers the
    sum of squares (points, tables).

    The bounded optimum is the best feasible one among the solutions that hold each subset of the parameters at a bound.
    """
    gram = basis.transpose(0, 2, 1) @ basis
    root = np.sqrt(np.maximum(np.einsum("gmm->gm", gram), 1e-300))
    gram = gram / (root[:, :, None] * root[:, None, :]) + 1e-13 * np.eye(len(lower))  # the ridge keeps twin columns solvable
    right = (basis.transpose(0, 2, 1) @ y.T) / root[:, :, None]
    low, high = (lower * root)[:, :, None], (upper * root)[:, :, None]
    best, gain = np.zeros_like(right), np.full((len(basis), len(y)), -np.inf)
    for held in product(*(_holds(lo, hi) for lo, hi in zip(lower, upper, strict=True))):
        free = [j for j, at in enumerate(held) if at is None]
        c = np.zeros_like(right)
        for j, at in enumerate(held):
            if at is not None:
                c[:, j] = at * root[:, j, None]
        if free:
            rest = right[:, free] - gram[:, free] @ c
            c[:, free] = np.linalg.solve(gram[:, free][:, :, free], rest)
        value = np.sum(c * (2 * right - gram @ c), axis=1)
        slack = 1e-12 * np.abs(c)
        better = np.all((c >= low - slack) & (c <= high + slack), axis=1) & (value > gain)
        best, gain = np.where(better[:, None], c, best), np.where(better, value, gain)
    return best / root[:, :, None], gain


def _holds(lower: float, upper: float) -> list[float | None]:
    if lower == upper:
        return [lower]
    return [None, *(bound for bound in (lower, upper) if np.isfinite(bound))]
