"""One group of a grouped fit as a result of its own, and predictions by it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fit.errors import FitError
from fit.groups import read_levels, split
from fit.tables import Floats

if TYPE_CHECKING:
    from fit.result import FitResult, Prediction


def of_group(result: "FitResult", level: str) -> "FitResult":
    """One group's law as a result of its own, with its rows, parameters, draws and warnings (see `FitResult.group`)."""
    groups = result.groups
    if groups is None:
        raise FitError("the fit has no groups; it was made without them")
    if level not in groups.levels:
        raise FitError(f"no group {level!r} in this fit; there are {', '.join(groups.levels)} (column {groups.column!r})")
    k = groups.levels.index(level)
    part, rows = result.definition.groups[k][1], groups.member == k
    (at, alone), names = split(result.problem)[k], list(result.params)
    own = {names[i]: name for i, name in zip(at, part.params, strict=True)}
    return replace(
        result,
        params={name: result.params[names[i]] for i, name in zip(at, part.params, strict=True)},
        objective=groups.objectives[k],
        n=int(rows.sum()),
        draws=result.draws[:, at],
        intervals={name: result.intervals[names[i]] for i, name in zip(at, part.params, strict=True)} if result.intervals else {},
        warnings=tuple(w for w in (_of_group(w, own, names, level) for w in result.warnings) if w),
        sizes=groups.sizes[k],
        residuals=result.residuals[rows],
        shares={own[name]: share for name, share in result.shares.items() if name in own},
        definition=part,
        # A profile within one group would leave out what the others say of the shared parameters.
        problem=alone if result.definition.separate else result.problem,
        optimum=result.optimum[at] if result.definition.separate else result.optimum,
        groups=None,
    )


def _of_group(warning: str, own: Mapping[str, str], params: list[str], level: str) -> str:
    """A warning as the group alone would have it; empty where it is of other groups only."""
    code, colon, what = warning.partition(":")
    listed = what.split(",")
    if colon and all(name in params for name in listed):
        kept = [own[name] for name in listed if name in own]
        return f"{code}:{','.join(kept)}" if kept else ""
    if code in ("constant", "collinear") and "[" in what:
        return f"{code}:{what.replace(f'[{level}]', '')}" if f"[{level}]" in what else ""
    return warning


def predict_groups(result: "FitResult", table: pa.Table, interval: float, new_run: bool) -> "Prediction":
    """Each row's prediction by the law of its group, which the groups' column of ``table`` names."""
    groups = result.groups
    assert groups is not None
    cells, levels = read_levels(table, groups.column)
    for level in levels:
        if level not in groups.levels:
            row = cells.index(level) + 1
            raise FitError(
                f"column {groups.column!r}, row {row}: no group {level!r} in this fit; there are {', '.join(groups.levels)}"
            )
    rows = [[i for i, cell in enumerate(cells) if cell == level] for level in levels]
    parts = [
        result.group(level).predict(table.take(pa.array(at)), interval, new_run) for level, at in zip(levels, rows, strict=True)
    ]
    place = np.argsort(np.concatenate(rows))

    def whole(pieces: list[Floats]) -> Floats:
        return np.asarray(np.concatenate(pieces)[place])

    farthest = sorted((w for part in parts for w in part.warnings), key=_times)[-1:]
    return replace(
        parts[0],
        value=whole([part.value for part in parts]),
        low=whole([part.low for part in parts if part.low is not None]) if parts[0].low is not None else None,
        high=whole([part.high for part in parts if part.high is not None]) if parts[0].high is not None else None,
        distance=whole([part.distance for part in parts]),
        warnings=tuple(farthest),
    )


def _times(warning: str) -> float:
    """Of `extrapolates:3.2x`, all that a prediction warns of."""
    return float(warning.removeprefix("extrapolates:").removesuffix("x"))
