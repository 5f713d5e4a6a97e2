"""What the command line asks of a table beside the fit: other laws, sizes held out, profiles, predictions, several curves."""

import argparse
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from fit.cli import number
from fit.compare import Comparison, compare_laws
from fit.errors import FitError
from fit.fitting import fit_law
from fit.groups import read_levels
from fit.holdout import Holdout, leave_largest_out
from fit.law_saturation import SaturationSize, saturation_size
from fit.laws import law_named
from fit.profile import Profile
from fit.result import FitResult, Prediction
from fit.verdict import Saturation, holm

INTERVAL = 0.9
"""Level of the predictions' intervals."""


@dataclass(frozen=True)
class Predicted:
    """The law's mean at ``sizes`` (by their names in the law, or the table's), its interval, and that of one more run."""

    sizes: dict[str, Any]
    mean: Prediction
    run: Prediction
    profile: Profile | None

    def to_json(self) -> dict[str, Any]:
        ends = {
            name: None if side is None else float(side[0])
            for name, side in (
                ("low", self.mean.low),
                ("high", self.mean.high),
                ("run_low", self.run.low),
                ("run_high", self.run.high),
            )
        }
        distance = float(self.mean.distance[0])
        out: dict[str, Any] = {"sizes": self.sizes, "value": float(self.mean.value[0]), **ends, "interval": INTERVAL}
        out |= {"distance": distance if np.isfinite(distance) else None, "warnings": list(self.mean.warnings)}
        return out | ({"profile": self.profile.to_json()} if self.profile else {})


@dataclass(frozen=True)
class Answer:
    """One curve's fit, and what else was asked of it."""

    result: FitResult
    profiles: dict[str, Profile] = field(default_factory=dict)
    predictions: tuple[Predicted, ...] = ()
    comparison: Comparison | None = None
    holdout: Holdout | None = None
    size: SaturationSize | None = None

    def to_json(self) -> dict[str, Any]:
        """The fit's document; each answer is there if it was asked for."""
        out = self.result.to_json()
        if self.profiles:
            out["profile"] = {name: found.to_json() for name, found in self.profiles.items()}
        if self.predictions:
            out["predictions"] = [found.to_json() for found in self.predictions]
        for name, answer in (("compare", self.comparison), ("holdout", self.holdout), ("saturation_size", self.size)):
            if answer is not None:
                out[name] = answer.to_json()
        return out


@dataclass(frozen=True)
class Curves:
    """Each value of a column by itself; ``failed``: those that could not be fitted, and why. ``together``: their verdicts on
    saturation, Holm-corrected for their number, of the curves that have one."""

    column: str
    answers: dict[str, Answer]
    failed: dict[str, str]
    together: dict[str, Saturation]

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.column,
            "curves": {value: answer.to_json() for value, answer in self.answers.items()},
            "holm": {value: verdict.to_json() for value, verdict in self.together.items()},
            "failed": self.failed,
        }


def ask(table: pa.Table, args: argparse.Namespace, options: dict[str, Any]) -> Answer:
    """``options``: columns, loss, delta, bounds, fixed and weights, as `fit_law` takes them."""
    if args.groups:
        for option, asked in (
            ("--compare", args.compare),
            ("--holdout", args.holdout),
            ("--saturation-size", args.saturation_size),
        ):
            if asked:
                raise FitError(f"{option} is of one curve; leave out --groups, or take --by {args.groups}")
    compared = _laws(args.law, args.compare) if args.compare else []
    own = {**options, "columns": _own_columns(args.law, options["columns"]) if compared else options["columns"]}
    drawn = {"bootstrap": args.bootstrap, "seed": args.seed, "cluster": args.cluster}
    shared = [name.strip() for name in args.shared.split(",")] if args.shared else ()
    result = fit_law(table, args.law, **own, **drawn, groups=args.groups, shared=shared, worthwhile=args.worthwhile)
    free = [name for name, held in zip(result.params, result.problem.held, strict=True) if not held]
    return Answer(
        result,
        {name: result.profile(name) for name in free} if args.profile else {},
        tuple(_predicted(result, sizes, args.profile) for sizes in args.predict),
        compare_laws(table, compared, **options, seed=args.seed) if compared else None,
        leave_largest_out(table, args.law, **own, seed=args.seed, cluster=args.cluster) if args.holdout else None,
        saturation_size(result, table, args.worthwhile, INTERVAL) if args.saturation_size else None,
    )


def ask_each(table: pa.Table, args: argparse.Namespace, options: dict[str, Any]) -> Curves:
    """`ask` of the rows of each value of a column. FitError where none of them can be fitted."""
    if args.groups:
        raise FitError("--by fits each curve by itself and --groups all at once; give one of them")
    if args.out:
        raise FitError("--out is of one curve; choose one by --where, or leave out --by")
    cells, values = read_levels(table, args.by)
    answers, failed = {}, {}
    for value in values:
        rows = table.filter(pa.array([cell == value for cell in cells]))
        try:
            answers[value] = ask(rows, args, options)
        except FitError as error:
            failed[value] = str(error)
    if not answers:
        value, why = next(iter(failed.items()))
        raise FitError(f"no curve by {args.by!r} can be fitted; {value}: {why}")
    judged = {value: answer.result.saturation for value, answer in answers.items()}
    known = {value: verdict for value, verdict in judged.items() if verdict is not None}
    return Curves(args.by, answers, failed, dict(zip(known, holm(list(known.values())), strict=True)))


def _predicted(result: FitResult, texts: dict[str, str], profiled: bool) -> Predicted:
    names = {*result.sizes, *(result.columns[role] for role in result.sizes)}
    sizes = {name: number(text, "--predict") if name in names else text for name, text in texts.items()}
    row = {name: [value] for name, value in sizes.items()}
    runs = result.predict(row, INTERVAL, new_run=True)
    return Predicted(sizes, result.predict(row, INTERVAL), runs, result.profile(sizes, INTERVAL) if profiled else None)


def _laws(law: str, others: str) -> list[str]:
    """The law and those to compare it with; commas within a formula's parentheses are its own."""
    names = [law, *(name.strip() for name in re.split(r",(?![^(]*\))", others))]
    if "" in names:
        raise FitError(f"--compare: {others!r} is not of the form LAW,LAW")
    return list(dict.fromkeys(names))


def _own_columns(law: str, columns: dict[str, str]) -> dict[str, str]:
    """Of the columns of all compared laws, those of one; the metric may be named for another law, as R or as L."""
    which = law_named(law)
    own = {role: name for role, name in columns.items() if role in which.sizes}
    metrics = [columns[role] for role in (which.response, "R", "L") if role in columns]
    return own | ({which.response: metrics[0]} if metrics else {})
