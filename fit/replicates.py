"""`weights="replicates"`: each size weighted by the reciprocal of its replicates' variance, moderated.

Two or three runs tell next to nothing of their own variance, and the raw reciprocals are far worse than no weights: a size whose
runs happen to agree would rule the fit. So the sizes' variances borrow from each other, as those of genes do in limma (Smyth
2004, Stat. Appl. Genet. Mol. Biol. 3:3; with a trend in the mean): a size's variance is scattered about ``s0^2 metric^(2 power)``
as a scaled inverse chi-square of ``d0`` degrees of freedom. With so few sizes one estimate of s0, power and d0 is itself noise;
all three are averaged over their posterior instead.
"""

from typing import TYPE_CHECKING

import numpy as np

from fit.errors import FitError
from fit.tables import Floats, weights
from fit.uncertainty import Design

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "replicates"
_POWERS = np.linspace(-0.5, 1.5, 9)
"""Of the metric, that its standard deviation may be in proportion to; see `fit.uncertainty.POWERS`."""
_PRIOR_DOF = np.array([1.0, 2.0, 4.0, 8.0, 16.0, np.inf])
"""d0: from sizes that have hardly anything in common to sizes that all have the trend's variance."""
_PRIOR_SHARES = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.5])


def row_weights(rows: "pa.Table", name: str | None, y: Floats, design: Design, log: bool) -> Floats:
    """(rows,) weights: all one, a column's, or of the replicates' scatter where ``name`` is `replicates`."""
    if name is None:
        return np.ones(len(y))
    if name != NAME:
        return weights(rows, name)
    if NAME in rows.column_names:
        raise FitError(
            f"weights={NAME!r} means weights from the runs' scatter, but the table has a column of that name; rename it"
        )
    return replicate_weights(y, design, log)


def replicate_weights(y: Floats, design: Design, log: bool) -> Floats:
    """(rows,) weights of mean one from the scatter of each size's replicates, of ``log`` y where residuals are logarithmic.

    A size with one run has the trend's weight. FitError where every size has one, and where all replicates agree exactly.
    """
    if log and y.min() <= 0:
        return np.ones(len(y))  # whoever fits such a metric refuses it, and knows its column
    values, seen, mean, squares = np.log(y) if log else y, [], [], []
    for group in design.groups:
        means = np.array([values[rows].mean() for rows in group])
        seen.append(len(means) - 1)
        mean.append(abs(float(y[np.concatenate(group)].mean())))
        squares.append(float(np.sum((means - means.mean()) ** 2)))
    dof, metric, total = np.array(seen, dtype=np.float64), np.array(mean), np.array(squares)
    if not dof.any():
        raise FitError(f"weights={NAME!r} needs two or more runs of a size; every size has one row only")
    if not total.any():
        raise FitError(f"weights={NAME!r}: the runs of every size agree exactly, so that they tell no variance")
    precision, out = _precisions(metric, total, dof, log), np.empty(len(y))
    for group, value in zip(design.groups, precision, strict=True):
        out[np.concatenate(group)] = value
    return np.asarray(out / out.mean())


def _precisions(metric: Floats, squares: Floats, dof: Floats, log: bool) -> Floats:
    """(sizes,) posterior means of 1/variance, but for a factor; ``squares`` (sizes,) sums of ``dof`` (sizes,) each."""
    from scipy.special import gammaln

    pooled = float(squares.sum() / dof.sum())
    powers = _POWERS - 1.0 if log else _POWERS
    if np.ptp(metric) == 0 or metric.min() == 0:
        powers = np.zeros(1)
    at = float(np.exp(np.log(metric[dof > 0]).mean())) if len(powers) > 1 else 1.0
    scales = pooled * np.exp(np.linspace(-4.0, 4.0, 81))
    # (powers, prior dof, scales, sizes): the trend's variance at each size, and the likelihood of the squares under it.
    trend = scales[None, None, :, None] * ((metric / at) ** (2 * powers[:, None]))[:, None, None, :]
    d0 = _PRIOR_DOF[None, :, None, None]
    with np.errstate(invalid="ignore"):
        scattered = (
            gammaln((d0 + dof) / 2)
            - gammaln(d0 / 2)
            - dof / 2 * np.log(d0 * trend)
            - (d0 + dof) / 2 * np.log1p(squares / (d0 * trend))
        )
        own = (d0 + dof) / (d0 * trend + squares)
    at_trend = np.isinf(d0)
    likelihood = np.where(at_trend, -dof / 2 * np.log(2 * trend) - squares / (2 * trend), scattered).sum(axis=-1)
    share = np.exp(likelihood - likelihood.max()) * _PRIOR_SHARES[None, :, None]
    return np.asarray(np.einsum("pds,pdsr->r", share / share.sum(), np.where(at_trend, 1 / trend, own)))
