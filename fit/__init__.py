"""Scaling laws on any table of (sizes, metric): laws with honest uncertainty, and a verdict on saturation.

    from fit import fit_law, saturation

Names are loaded on first use, so that a program that only wants the command line's options pays for no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fit.errors import FitError

if TYPE_CHECKING:
    from fit.fitting import fit_law
    from fit.law_saturation import SaturationSize, saturation_size
    from fit.result import FitResult, Prediction
    from fit.verdict import Saturation, holm, saturation
    from fit.words import explain

__all__ = [
    "FitError",
    "FitResult",
    "Prediction",
    "Saturation",
    "SaturationSize",
    "explain",
    "fit_law",
    "holm",
    "saturation",
    "saturation_size",
]

_HOME = {
    "FitResult": "fit.result",
    "Prediction": "fit.result",
    "fit_law": "fit.fitting",
    "Saturation": "fit.verdict",
    "saturation": "fit.verdict",
    "holm": "fit.verdict",
    "SaturationSize": "fit.law_saturation",
    "saturation_size": "fit.law_saturation",
    "explain": "fit.words",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fit' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
