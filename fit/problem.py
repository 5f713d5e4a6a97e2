"""One weighted fit, or a batch of fits of one law to tables that differ in metric and weights: what a solver asks of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fit.jets import Jet
from fit.laws import Law
from fit.tables import Floats

LOSSES = {"log-huber": "log", "huber": "linear", "l1": "log", "least-squares": "linear"}
"""Each loss and the residuals it is taken of: log(predicted) - log(observed), or predicted - observed."""


@dataclass(frozen=True)
class Problem:
    """``logs``: natural logarithms of the sizes, (rows,) each. ``y`` and ``weights``: (tables, rows), or (1, rows) where all
    tables share them; ``y`` over ``scale``, so that its values are about one.

    ``delta`` is where Huber turns from square to absolute, in the residual's unit (infinite: least squares).
    Parameter vectors ``p`` are (tables, params): coefficients of centred shapes over ``scale``, breaks as logarithms.
    """

    law: Law
    logs: Mapping[str, Floats]
    y: Floats
    weights: Floats
    loss: str
    delta: float
    scale: float = 1.0
    around: Mapping[str, Floats] | None = None
    """Logarithms of the sizes that shapes are centred at, where they are not these rows' own."""

    @property
    def log(self) -> bool:
        return LOSSES[self.loss] == "log"

    @cached_property
    def refs(self) -> dict[str, Floats]:
        """Logarithms of the sizes that shapes are centred at, (1,) each: their geometric means."""
        return dict(self.around) if self.around else {role: np.atleast_1d(values.mean()) for role, values in self.logs.items()}

    @cached_property
    def bounds(self) -> tuple[Floats, Floats]:
        """(params,) each."""
        lower = [t.lower if t.centred else t.lower / self.scale for t in self.law.terms]
        upper = [t.upper if t.centred else t.upper / self.scale for t in self.law.terms]
        for theta in self.law.thetas:
            low, high = theta.lower, theta.upper
            if theta.kind == "break":
                with np.errstate(divide="ignore"):
                    low, high = np.log(low), np.log(high)
                if low < high:
                    low, high = max(low, self.logs[theta.size].min()), min(high, self.logs[theta.size].max())
            lower.append(low)
            upper.append(high)
        return np.array(lower), np.array(upper)

    @cached_property
    def blocks(self) -> dict[str, NDArray[np.intp]]:
        """Row numbers of each of the law's groups, by the name of its indicator; all rows as "" of a law without groups."""
        groups = {f"[{level}]": np.flatnonzero(self.logs[f"[{level}]"]) for level, _ in self.law.groups}
        return groups or {"": np.arange(self.y.shape[-1])}

    def plain(self, p: Floats) -> Floats:
        """Parameters (draws, params) in the table's own units, from the solver's."""
        m = len(self.law.terms)
        out = self.law.uncentre(p, self.refs)
        out[:, :m] *= self.scale
        for i, theta in enumerate(self.law.thetas):
            if theta.kind == "break":
                out[:, m + i] = np.exp(p[:, m + i])
        return out

    @cached_property
    def held(self) -> NDArray[np.bool_]:
        """(params,): those whose bounds are one value."""
        return np.equal(*self.bounds)

    def take(self, tables: NDArray[np.intp]) -> "Problem":
        """The problem of some of the tables."""
        return replace(
            self,
            y=self.y[tables] if len(self.y) > 1 else self.y,
            weights=self.weights[tables] if len(self.weights) > 1 else self.weights,
        )

    def basis(self, theta: Floats) -> Floats:
        """(draws, rows, linear) centred shapes."""
        jets = self.law.centred(self.logs, self.refs, theta)
        shape = (len(theta), self.y.shape[1])
        return np.stack([np.broadcast_to(jet.value, shape) for jet in jets], axis=-1)

    def fitted(self, p: Floats) -> Floats:
        """(tables, rows)."""
        m = len(self.law.terms)
        jets = self.law.centred(self.logs, self.refs, p[:, m:])
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(sum(p[:, j, None] * jet.value for j, jet in enumerate(jets)))

    def residuals(self, p: Floats) -> Floats:
        """(tables, rows); not finite where a log residual has no value."""
        return self.of_fitted(self.fitted(p))

    def of_fitted(self, fitted: Floats) -> Floats:
        if not self.log:
            return fitted - self.y
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(np.where(fitted > 0, fitted, np.nan)) - np.log(self.y)

    def cost(self, residuals: Floats) -> Floats:
        """Sum over the last axis of Huber (r^2/2 within delta, delta |r| - delta^2/2 beyond); infinite for no value."""
        size = np.abs(residuals)
        if np.isinf(self.delta):
            terms = 0.5 * size**2
        else:
            terms = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        total = np.sum(self.weights * terms, axis=-1)
        return np.where(np.isnan(total), np.inf, total)

    def objective(self, p: Floats) -> Floats:
        """(tables,): the loss as users know it, summed over rows: Huber, sum of |r|, or sum of r^2."""
        r = self.residuals(p)
        if self.loss == "l1":
            total = np.sum(self.weights * np.abs(r), axis=-1)
            return np.where(np.isnan(total), np.inf, total)
        return self.cost(r) * (2.0 if self.loss == "least-squares" else 1.0)


@dataclass(frozen=True)
class Local:
    """A problem about one parameter vector per table: ``fitted`` (tables, rows), ``J`` (tables, params, rows) the derivative of
    the residuals."""

    fitted: Floats
    J: Floats
    g: Floats
    """(tables, params): gradient of the cost."""
    hessian: Floats
    majorant: Floats
    """(tables, params, params): the reweighted Gauss-Newton Hessian, never indefinite."""
    cosines: Floats
    """(tables, params): the gradient as cosines between residuals and columns, all 0 at an optimum, scale-free."""


def local(problem: Problem, p: Floats) -> Local:
    """First and second order about ``p`` (tables, params)."""
    fitted, J, jets = _jacobian(problem, p)
    r = problem.of_fitted(fitted)
    if np.isinf(problem.delta):
        psi, inside, reweight = r, np.ones_like(r), np.ones_like(r)
    else:
        size = np.abs(r)
        inside = (size <= problem.delta).astype(np.float64)
        psi = np.clip(r, -problem.delta, problem.delta)
        reweight = problem.delta / np.maximum(size, problem.delta)
    w = problem.weights
    force = w * psi
    g = np.einsum("tkr,tr->tk", J, force)
    squares = w * inside - (force if problem.log else 0.0)
    hessian = (J * squares[:, None]) @ J.transpose(0, 2, 1) + _bend(p, jets, force / fitted if problem.log else force)
    majorant = (J * (w * reweight)[:, None]) @ J.transpose(0, 2, 1)
    norms = np.sqrt(np.maximum(np.einsum("tkr,tr->tk", J**2, w * np.ones_like(r)) * np.sum(w * psi**2, 1)[:, None], 1e-300))
    return Local(fitted, J, g, hessian, majorant, g / norms)


def jacobian(problem: Problem, p: Floats) -> Floats:
    """(tables, params, rows): derivative of the residuals by the parameters."""
    return _jacobian(problem, p)[1]


def _jacobian(problem: Problem, p: Floats) -> tuple[Floats, Floats, list[Jet]]:
    m = len(problem.law.terms)
    jets = problem.law.centred(problem.logs, problem.refs, p[:, m:])
    J = np.zeros((len(p), p.shape[1], problem.y.shape[1]))
    for j, jet in enumerate(jets):
        J[:, j] = jet.value
        for i, slope in jet.first.items():
            J[:, m + i] += p[:, j, None] * slope
    fitted = np.einsum("tj,tjr->tr", p[:, :m], J[:, :m])
    if problem.log:
        J /= fitted[:, None]
    return fitted, J, jets


def _bend(p: Floats, jets: list[Jet], force: Floats) -> Floats:
    """(tables, params, params): the fitted values' second derivatives, summed with ``force`` (tables, rows)."""
    m = len(jets)
    out = np.zeros((len(p), p.shape[1], p.shape[1]))
    for j, jet in enumerate(jets):
        for i, slope in jet.first.items():
            out[:, j, m + i] += np.sum(force * slope, axis=1)
            out[:, m + i, j] = out[:, j, m + i]
        for (i, k), curve in jet.second.items():
            bent = p[:, j] * np.sum(force * curve, axis=1)
            out[:, m + i, m + k] += bent
            if i != k:
                out[:, m + k, m + i] += bent
    return out
