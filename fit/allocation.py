"""`allocate`: how large a model, and on how much data, for a given compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fit.errors import FitError
from fit.result import FitResult, finite
from fit.tables import Floats
from fit.uncertainty import tail


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, None without a bootstrap; an end may be 0 or infinite where draws have no optimum inside."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Infinite ends are null."""
        return {name: None if end is None else finite(end) for name, end in vars(self).items()}


@dataclass(frozen=True)
class Optimum:
    """The best split of one ``compute`` (FLOPs): parameters ``N``, tokens ``D``, and the loss there.

    ``distance``: how far (N, D) lies beyond the fitted sizes, in units of their logarithmic range (0: within).
    """

    compute: float
    N: Estimate
    D: Estimate
    tokens_per_parameter: Estimate
    loss: Estimate
    distance: float


@dataclass(frozen=True)
class Allocation:
    """``exponents``: N grows as C^exponents["N"], D as C^exponents["D"]; they add to one. ``interior``: the share of draws that
    have an optimum at all (both terms alive); None without draws."""

    flops_per_token: float
    interval: float
    exponents: dict[str, Estimate]
    rows: tuple[Optimum, ...]
    interior: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; what is infinite is null."""

        def plain(value: Any) -> Any:
            return value.to_json() if isinstance(value, Estimate) else finite(value)

        return {
            "flops_per_token": self.flops_per_token,
            "interval": self.interval,
            "exponents": {role: exponent.to_json() for role, exponent in self.exponents.items()},
            "rows": [{name: plain(value) for name, value in vars(row).items()} for row in self.rows],
            "interior": self.interior,
            "warnings": list(self.warnings),
        }


def allocate(
    result: FitResult, compute: Sequence[float] | Floats, flops_per_token: float = 6.0, interval: float = 0.9
) -> Allocation:
    """The parameters N and tokens D of least loss under ``compute = flops_per_token * N * D``, for L = E + A/N^a + B/D^b.

    ``compute``: FLOPs. ``flops_per_token``: per parameter, 6 for a forward and backward pass (Kaplan et al. 2020, sec. 2.1). The
    optimum in closed form is eq. 4 of Hoffmann et al. 2022 (2203.15556), the intervals are percentiles of every draw's own.

    Raises FitError for another law, and where a term is zero, since then no split is best: more of the other always is.
    """
    budgets = np.asarray(compute, dtype=np.float64)
    if budgets.ndim != 1 or not budgets.size or not np.all((budgets > 0) & np.isfinite(budgets)):
        raise FitError("compute must be a list of FLOPs above zero, such as [1e21, 1e22]")
    if not (0 < flops_per_token < np.inf and 0 < interval < 1):
        raise FitError(f"flops_per_token {flops_per_token} must be above zero and interval {interval} between 0 and 1")
    _is_chinchilla(result)
    if dead := [name for name in ("A", "B") if result.params[name] <= 0]:
        raise FitError(f"{dead[0]} is 0: that term does nothing, so no split of the compute is best")
    p = np.array([list(result.params.values()), *result.draws])
    E, A, B, a, b = (p[:, list(result.params).index(name), None] for name in ("E", "A", "B", "a", "b"))
    product = budgets / flops_per_token
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = (np.log(a) + np.log(A) - np.log(b) - np.log(B)) / (a + b)  # log of Hoffmann's G
        log_N, log_D = ratio + b / (a + b) * np.log(product), a / (a + b) * np.log(product) - ratio
        loss = E + np.nan_to_num(A * np.exp(-a * log_N)) + np.nan_to_num(B * np.exp(-b * log_D))
    near = result.predict({"N": np.exp(log_N[0]), "D": np.exp(log_D[0])})

    def estimate(values: Floats) -> Estimate:
        return _estimate(result, values, interval)

    rows = [
        Optimum(
            compute=float(C),
            N=estimate(np.exp(log_N[:, i])),
            D=estimate(np.exp(log_D[:, i])),
            tokens_per_parameter=estimate(np.exp(log_D[:, i] - log_N[:, i])),
            loss=estimate(loss[:, i]),
            distance=float(near.distance[i]),
        )
        for i, C in enumerate(budgets)
    ]
    interior = float(np.mean(np.isfinite(ratio[1:]))) if len(result.draws) else None
    cornered = [f"no-optimum:{1 - interior:.1%}"] if interior is not None and interior < 1 else []
    share = (b / (a + b))[:, 0]
    return Allocation(
        flops_per_token=flops_per_token,
        interval=interval,
        exponents={"N": estimate(share), "D": estimate(1 - share)},
        rows=tuple(rows),
        interior=interior,
        warnings=(*doubts(result), *near.warnings, *cornered),
    )


def _estimate(result: FitResult, values: Floats, interval: float) -> Estimate:
    """Of (1 + draws,) values the first, with an interval of the others."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return Estimate(float(values[0]))
    share = tail(interval, result.bootstrap["dof"])
    low, high = np.quantile(drawn, [share, 1 - share], method="inverted_cdf")  # does not interpolate to an infinite draw
    return Estimate(float(values[0]), float(low), float(high))


def _is_chinchilla(result: FitResult) -> None:
    """FitError unless the law, by whatever name, is L = E + A/N^a + B/D^b."""
    if set(result.params) == {"E", "A", "B", "a", "b"} and set(result.sizes) == {"N", "D"}:
        E, A, B, a, b = (result.params[name] for name in ("E", "A", "B", "a", "b"))
        N, D = (np.geomspace(*result.sizes[role], 3)[[0, 1, 2, 2, 0]] for role in ("N", "D"))
        D = D[::-1] * [1, 2, 3, 4, 5]
        with np.errstate(over="ignore", invalid="ignore"):
            curve = E + A / N**a + B / D**b
        if np.allclose(result.predict({"N": N, "D": D}).value, curve, rtol=1e-8):
            return
    raise FitError(f"law {result.law}: the best split of compute is known for L = E + A/N^a + B/D^b (law chinchilla) only")


def doubts(result: FitResult) -> list[str]:
    """The fit's warnings that reach what is derived from it."""
    kinds = ("unidentified", "bound", "collinear", "dead", "log-linear", "not-optimal", "no-spare-sizes", "perfect")
    out = [warning for warning in result.warnings if warning.partition(":")[0] in kinds]
    return out if len(result.draws) else [*out, "no-draws"]
