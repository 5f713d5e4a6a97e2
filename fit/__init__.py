"""Scaling laws on any table of (sizes, metric): laws with honest uncertainty, and a verdict on saturation.

    from fit import fit_law, saturation

Names are loaded on first use, so that a program that only wants the command line's options pays for no numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fit.errors import FitError

if TYPE_CHECKING:
    from fit.allocation import Allocation, allocate
    from fit.compare import Comparison, compare_laws
    from fit.crossing import Crossover, crossover
    from fit.experiment import NextExperiment, next_experiment
    from fit.fitting import fit_law
    from fit.holdout import Holdout, leave_largest_out
    from fit.law_saturation import SaturationSize, saturation_size
    from fit.profile import Profile
    from fit.result import FitResult, Prediction
    from fit.verdict import Saturation, holm, saturation
    from fit.words import explain

__all__ = [
    "Allocation",
    "Comparison",
    "Crossover",
    "FitError",
    "FitResult",
    "Holdout",
    "NextExperiment",
    "Prediction",
    "Profile",
    "Saturation",
    "SaturationSize",
    "allocate",
    "compare_laws",
    "crossover",
    "explain",
    "fit_law",
    "holm",
    "leave_largest_out",
    "next_experiment",
    "saturation",
    "saturation_size",
]

_HOME = {
    "Allocation": "fit.allocation",
    "allocate": "fit.allocation",
    "Comparison": "fit.compare",
    "compare_laws": "fit.compare",
    "Crossover": "fit.crossing",
    "crossover": "fit.crossing",
    "NextExperiment": "fit.experiment",
    "next_experiment": "fit.experiment",
    "Holdout": "fit.holdout",
    "leave_largest_out": "fit.holdout",
    "FitResult": "fit.result",
    "Prediction": "fit.result",
    "Profile": "fit.profile",
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
