"""What a fit found: parameters, intervals, warnings, and predictions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fit.errors import FitError
from fit.groups import Groups
from fit.jets import constant
from fit.laws import Law
from fit.problem import Problem
from fit.tables import Floats, TableLike, read_table, sizes
from fit.uncertainty import PARAM_LEVEL, Spread, ends, extrapolation
from fit.verdict import Saturation

if TYPE_CHECKING:
    from fit.profile import Profile


@dataclass(frozen=True)
class Prediction:
    """(rows,) each. ``low`` and ``high`` are None without bootstrap draws; ``distance`` is how far beyond the fitted sizes each
    prediction lies, in units of their logarithmic range (0: within)."""

    value: Floats
    low: Floats | None
    high: Floats | None
    distance: Floats
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class FitResult:
    """A fitted law.

    ``objective`` is summed over the ``n`` rows (least squares: the sum of squares). ``intervals`` are 95% percentile intervals of
    ``draws`` (bootstrap, parameters in the order of ``params``), expanded for few replicates; empty without a bootstrap.
    ``gradient`` is the scaled projected gradient at the result, ``starts`` how many of the search's starts reached it.
    """

    law: str
    params: dict[str, float]
    objective: float
    n: int
    loss: str
    delta: float | None
    draws: Floats
    intervals: dict[str, tuple[float, float]]
    warnings: tuple[str, ...]
    columns: dict[str, str]
    sizes: dict[str, tuple[float, float]]
    """Least and largest fitted size of each role."""
    residuals: Floats
    """(rows,): log(predicted) - log(observed), or predicted - observed, by the loss."""
    noise: tuple[float, int]
    """A run's standard deviation in the residuals' unit, and its degrees of freedom."""
    spread: Spread
    """How that noise grows with the metric; of the draws, and of a new run."""
    shares: dict[str, float]
    """Each varying term's range over the range of the fitted values; one under .001 is dead."""
    reduced: str | None
    """The simpler law that the data identify, where they do not identify this one."""
    condition: float
    gradient: float
    starts: tuple[int, int]
    definition: Law
    problem: Problem = field(repr=False, compare=False)
    optimum: Floats = field(repr=False, compare=False)
    """(params,): the result in the problem's own units, for `profile`."""
    bootstrap: dict[str, Any] = field(default_factory=dict)
    """How the draws were made: ``method`` (see `fit.uncertainty.METHODS`), ``draws``, ``seed``, ``dof``."""
    saturation: Saturation | None = None
    groups: Groups | None = None
    """Of a fit to several groups: their column, names and shared parameters. ``reduced`` and ``saturation`` are then None."""

    def group(self, level: str) -> "FitResult":
        """One group's law, parameters ``A`` for ``A[level]``, for whatever asks for a fit of one curve. FitError names the groups
        that there are. What is said of the search, and the noise, stays that of the whole fit."""
        from fit.group_result import of_group

        return of_group(self, level)

    def profile(self, what: str | Mapping[str, Any], level: float = 0.95) -> "Profile":
        """The profile likelihood interval of a parameter (``"a"``), or of the law's mean (``{"N": 1e9}``); see `fit.profile`."""
        from fit.profile import profile

        if self.problem.law.groups and self.groups is None:
            raise FitError("profile: the group shares parameters with others; profile the whole fit, with names such as A[group]")
        return profile(self, what, level)

    @property
    def correlation(self) -> Floats | None:
        """(params, params) of the draws; None without them. A parameter that never moved has zeros."""
        if len(self.draws) < 3:
            return None
        centred = self.draws - self.draws.mean(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = np.nan_to_num(centred / np.linalg.norm(centred, axis=0))
        return np.asarray(scaled.T @ scaled)

    def predict(self, table: TableLike, interval: float = 0.9, new_run: bool = False) -> Prediction:
        """The law's mean at the sizes of ``table``, with a percentile interval of the draws' curves.

        Sizes are read from the columns of the fit, or from columns named as in the law (N, D). With ``new_run`` the interval is
        of the metric that one more run would show, its noise included. Of a fit to groups, ``table`` needs their column.
        """
        if not 0 < interval < 1:
            raise FitError(f"interval {interval} is not between 0 and 1, such as 0.9")
        rows = read_table(table)
        if self.groups is not None:
            from fit.group_result import predict_groups

            return predict_groups(self, rows, interval, new_run)
        values = {}
        for role in self.definition.sizes:
            name = self.columns[role]
            values[role] = sizes(rows, name if name in rows.column_names or role not in rows.column_names else role, role)
        curves = self.curves({role: np.log(v) for role, v in values.items()})
        low = high = None
        if len(self.draws):
            spread = curves[1:]
            if new_run:
                seed = self.bootstrap["seed"]
                sd = self.spread.at_metric(curves[0], self.spread.pick(len(spread), seed))
                luck = sd * np.random.default_rng(seed).normal(size=spread.shape)
                spread = spread * np.exp(luck) if self.loss in ("log-huber", "l1") else spread + luck
            low, high = ends(spread, interval, self.bootstrap["dof"])
        beyond, distance = extrapolation(values, self.sizes)
        return Prediction(curves[0], low, high, distance, (f"extrapolates:{beyond:.1f}x",) if beyond > 1.0 + 1e-9 else ())

    def curves(self, logs: dict[str, Floats]) -> Floats:
        """(1 + draws, rows): the fit's and each draw's metric."""
        if self.groups is not None:
            raise FitError(f"the fit is of several groups; take the law of one, such as result.group({self.groups.levels[0]!r})")
        law, p = self.definition, np.array([list(self.params.values()), *self.draws])
        m = len(law.terms)
        theta = p[:, m:].copy()
        for i, t in enumerate(law.thetas):
            if t.kind == "break":
                theta[:, i] = np.log(theta[:, i])
        out = np.zeros((len(p), len(next(iter(logs.values())))))
        for j, term in enumerate(law.terms):
            if term.log_shape is None:
                out += p[:, j, None] * law.jets(logs, theta)[j].value
            else:  # by logarithms: a large coefficient and a small power may each be out of range where their product is not
                named = {t.name: constant(theta[:, i, None]) for i, t in enumerate(law.thetas)}
                with np.errstate(divide="ignore"):
                    c = p[:, j, None]
                    out += term.sign * np.sign(c) * np.exp(np.log(np.abs(c)) + term.log_shape(logs, named).value)
        return out

    @property
    def aicc(self) -> float | None:
        """Small-sample Akaike criterion under normal noise (Hurvich and Tsai 1989); None for a robust loss or too few rows."""
        k = self.definition.free + 1
        if self.loss != "least-squares" or self.n - k - 1 <= 0 or self.objective <= 0:
            return None
        return float(self.n * np.log(self.objective / self.n) + 2 * k + 2 * k * (k + 1) / (self.n - k - 1))

    @property
    def unidentified(self) -> tuple[str, ...]:
        """The parameters that the data leave open."""
        return tuple(n for w in self.warnings if w.startswith("unidentified:") for n in w.partition(":")[2].split(","))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; intervals are absent where nothing was bootstrapped, null where a draw ran off to
        infinity."""
        params = {
            name: {"value": finite(value), "identified": name not in self.unidentified}
            | ({"low": finite(self.intervals[name][0]), "high": finite(self.intervals[name][1])} if self.intervals else {})
            for name, value in self.params.items()
        }
        correlation = self.correlation
        out: dict[str, Any] = {
            "law": self.law,
            "formula": self.definition.formula,
            "params": params,
            "objective": self.objective,
            "n": self.n,
            "loss": self.loss,
            "delta": self.delta,
            "aicc": self.aicc,
            "warnings": list(self.warnings),
            "columns": self.columns,
            "sizes": {role: list(span) for role, span in self.sizes.items()},
            "shares": self.shares,
            "reduced": self.reduced,
            "noise": {"sd": self.noise[0], "dof": self.noise[1]},
            "condition": finite(self.condition),
            "gradient": self.gradient,
            "starts": list(self.starts),
        }
        if self.groups is not None:
            out["groups"] = self.groups.to_json()
        if self.bootstrap:
            out["bootstrap"] = {**self.bootstrap, "level": PARAM_LEVEL}
            out["correlation"] = correlation.tolist() if correlation is not None else None
        if self.saturation is not None:
            out["saturation"] = self.saturation.to_json()
        return out


def finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
