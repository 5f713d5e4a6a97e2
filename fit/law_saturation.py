"""`saturation_size`: the size at which a fitted law's own gain per doubling falls under the smallest worthwhile one."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fit.errors import FitError
from fit.tables import Floats, TableLike, numbers, read_table, rungs, sizes

if TYPE_CHECKING:
    from fit.result import FitResult

LAW_FITS = 0.05
"""Level of the F test of lack of fit of the law: a size is read off no law that its own replicates contradict."""
REACH = 10
"""Doublings beyond the largest fitted size that are searched (1024x)."""
_STEPS = 16  # grid points per doubling; the crossing between two is interpolated


@dataclass(frozen=True)
class SaturationSize:
    """``size`` (parameters) is the law's own N from which on another doubling gains less than ``worthwhile`` of the law's value.

    ``low`` and ``high`` are the percentile interval of the draws' sizes at level ``interval``; an end is infinite where that
    many draws keep gaining throughout, ``size`` too. All three are None where the law does not earn them, and the interval
    is where the fit has no draws; ``warnings`` say why. ``p_lack_of_fit`` is None where the test could not be made.
    """

    law: str
    size: float | None
    low: float | None
    high: float | None
    worthwhile: float
    interval: float
    p_lack_of_fit: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite size is null (warning `beyond`)."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}
        for name in ("size", "low", "high"):
            values[name] = values[name] if values[name] is not None and np.isfinite(values[name]) else None
        return values


def saturation_size(result: "FitResult", table: TableLike, worthwhile: float = 0.01, interval: float = 0.9) -> SaturationSize:
    """The N at which a law of one size stops being worth another doubling: g(N) = |R(2N) - R(N)| < ``worthwhile`` |R(N)|.

    ``table``: the rows that were fitted, for the F test of lack of fit (Draper and Smith 1998, sec. 2.1: scatter of the sizes
    about the law over scatter of their replicates, in the residuals of the fit's loss). A law that it rejects at 5% gives no
    size (warning `law-misfit:`), nor does one that cannot be tested, for want of replicates or of sizes beyond the
    parameters (`law-untested:`).

    The size is where the gain falls under for good, sought from the smallest fitted size (which is returned, with the warning
    `from-start`, where the gain is never worthwhile) to 1024 times the largest (`beyond:`). The interval is of the draws, each
    with its own size. It says where *this law* flattens; `saturation` says whether the data did.

    Raises FitError for a law of other sizes than N.
    """
    if set(result.sizes) != {"N"}:
        raise FitError(f"saturation_size needs a law of one size N; law {result.law} has {', '.join(result.sizes)}")
    if not (0 < worthwhile < 1 and 0 < interval < 1):
        raise FitError(f"worthwhile {worthwhile} and interval {interval} must be shares, such as 0.01 and 0.9")
    p = _lack_of_fit(result, table)
    if p is None or p < LAW_FITS:
        warning = f"law-untested:{result.law}" if p is None else f"law-misfit:{p:.1g}"
        return SaturationSize(result.law, None, None, None, worthwhile, interval, p, (warning,))
    first, last = result.sizes["N"]
    doublings = np.arange((REACH + 1 + int(np.ceil(np.log2(last / first)))) * _STEPS + 1) / _STEPS
    grid = first * 2.0**doublings
    size = _crossing(result, grid, worthwhile, last)
    low = high = None
    if len(result.draws):
        low, high = _interval(result, [_crossing(d, grid, worthwhile, last) for d in _drawn(result)], interval)
    return SaturationSize(
        result.law, size, low, high, worthwhile, interval, p, tuple(_notes(size, first, last, has_draws=low is not None))
    )


def _lack_of_fit(result: "FitResult", table: TableLike) -> float | None:
    """p value of the F test, None where there is nothing to test with."""
    from scipy.special import fdtrc

    rows = read_table(table)
    response = "R" if "R" in result.columns else "L"
    N, y = sizes(rows, result.columns["N"], "N"), numbers(rows, result.columns[response], response)
    if len(y) != result.n:
        raise FitError(f"the table has {len(y)} rows and the law was fitted to {result.n}; give the rows of the fit")
    fitted = replace(result, draws=result.draws[:0]).predict(rows).value
    r: Floats = y - fitted if result.loss in ("least-squares", "huber") else np.log(y) - np.log(fitted)
    rung = rungs([N])
    n = np.bincount(rung)
    means = np.bincount(rung, r) / n
    pure, lack = float(np.sum((r - means[rung]) ** 2)), float(np.sum(n * means**2))
    spare, dof = len(n) - len(result.params), len(y) - len(n)
    if spare <= 0 or dof <= 0 or pure <= 1e-24 * float(np.sum(y**2)):
        return None
    return float(fdtrc(spare, dof, lack / spare / (pure / dof)))


def _drawn(result: "FitResult") -> list["FitResult"]:
    """One result per draw, which predicts that draw's curve: whatever the law is, only `predict` needs to know it."""
    none = result.draws[:0]
    return [replace(result, params=dict(zip(result.params, map(float, d), strict=True)), draws=none) for d in result.draws]


def _crossing(result: "FitResult", grid: Floats, worthwhile: float, last: float) -> float:
    """The size from which on the relative gain stays under ``worthwhile``; the first of ``grid`` or infinity at its ends."""
    value = result.predict({"N": grid, result.columns["N"]: grid}).value
    sign = 1.0 if "R" in result.columns else -1.0
    here, doubled = value[:-_STEPS], value[_STEPS:]
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = sign * (doubled - here) / np.abs(here) - worthwhile
    excess = np.where(np.isnan(excess), np.inf, excess)  # a law that is no number at a size has not flattened there
    worth = np.flatnonzero(excess >= 0)
    if not worth.size:
        return float(grid[0])
    i = int(worth[-1])
    if i + 1 == len(excess) or grid[i + 1] > last * 2.0**REACH:
        return float("inf")
    share = excess[i] / (excess[i] - excess[i + 1]) if np.isfinite(excess[i]) else 1.0
    return float(grid[i] * 2.0 ** (share / _STEPS))


def _interval(result: "FitResult", crossings: list[float], interval: float) -> tuple[float, float]:
    """Order statistics, not interpolated: between a size and infinity there is nothing."""
    from fit.uncertainty import tail

    share = tail(interval, result.bootstrap.get("dof"))
    low = float(np.quantile(crossings, share, method="lower"))
    return low, float(np.quantile(crossings, 1 - share, method="higher"))


def _notes(size: float, first: float, last: float, has_draws: bool) -> list[str]:
    out = []
    if size == first:
        out.append("from-start")
    elif not np.isfinite(size):
        out.append(f"beyond:{2**REACH}x")
    elif size > last:
        out.append(f"extrapolates:{size / last:.1f}x")
    if not has_draws:
        out.append("no-draws")
    return out
