"""`grscale fit`: a law fitted to a table, from the command line. Heavy imports wait for `run`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fit.errors import FitError

if TYPE_CHECKING:
    from fit.result import FitResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fit a scaling law to a table of (sizes, metric)."
    parser.add_argument("table", metavar="TABLE", help="a .csv, .parquet or .jsonl file, or a folder of .parquet")
    parser.add_argument(
        "--law",
        required=True,
        help="power, power-floor, ceiling, log-linear, hinge, broken, two-term, sid, llm, chinchilla, or a formula: 'E + A/N**a'",
    )
    parser.add_argument(
        "--columns",
        required=True,
        metavar="N=COLUMN,...",
        help="the law's sizes and metric by the table's names: N=params,L=loss",
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE", help="keep only these rows (may be repeated)"
    )
    parser.add_argument("--loss", default="log-huber", help="log-huber (default), huber, l1 or least-squares")
    parser.add_argument("--delta", type=float, help="where Huber turns from square to absolute (default 1e-3)")
    parser.add_argument(
        "--bounds", action="append", default=[], metavar="PARAMETER=LOW:HIGH", help="search only there (may be repeated)"
    )
    parser.add_argument("--fix", action="append", default=[], metavar="PARAMETER=VALUE", help="hold it there (may be repeated)")
    parser.add_argument("--weights", metavar="COLUMN", help="weights of the rows")
    parser.add_argument("--bootstrap", type=int, default=0, metavar="DRAWS", help="draws for the intervals (default 0: none)")
    parser.add_argument(
        "--cluster",
        default="auto",
        metavar="COLUMN",
        help="what is drawn: a column of replicates (default: seed, if there), rows, sizes, residuals or parametric",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.html, its figures (PNG, SVG), fit.json and draws.csv there"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on stderr for a mistake of the user's."""
    from fit.fitting import fit_law
    from fit.tables import read_table, where

    try:
        table = where(read_table(args.table), _pairs(args.where, "--where"))
        result = fit_law(
            table,
            args.law,
            _pairs(args.columns.split(","), "--columns"),
            loss=args.loss,
            delta=args.delta,
            bootstrap=args.bootstrap,
            seed=args.seed,
            cluster=args.cluster,
            bounds={name: _bounds(text) for name, text in _pairs(args.bounds, "--bounds").items()},
            fixed={name: _number(text, "--fix") for name, text in _pairs(args.fix, "--fix").items()},
            weights=args.weights,
        )
        if args.out:
            from fit.page import write

            source = " ".join([args.table, *args.where])
            constrained = bool(args.bounds or args.fix or args.weights)
            write(result, table, args.out, source, args.cluster, constrained)
    except (FitError, OSError) as error:
        print(f"grscale fit: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result.to_json(), allow_nan=False))
    else:
        print(readable(result))
        if args.out:
            print(f"\nwritten to {args.out}")
    return 0


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise FitError(f"{option}: {text!r} is not of the form NAME=VALUE")
        if name in pairs:
            raise FitError(f"{option}: {name} is given twice")
        pairs[name] = value
    return pairs


def _bounds(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon:
        raise FitError(f"--bounds: {text!r} is not of the form LOW:HIGH, such as 0.1:2")
    return _number(low, "--bounds"), _number(high, "--bounds")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise FitError(f"{option}: {text!r} is not a number") from None


def readable(result: "FitResult") -> str:
    """The result as lines of text: parameters with intervals, objective, verdict, warnings in words."""
    from fit.words import explain

    lines = [f"{result.law}: {result.definition.formula}   ({result.n} rows, {result.loss})", ""]
    width = max(len(name) for name in result.params)
    for name, value in result.params.items():
        # Where the data leave a parameter open, a number to copy would mislead.
        point = "not identified" if name in result.unidentified else f"{value:.6g}"
        line = f"  {name:<{width}}  {point:>14}"
        low, high = result.intervals.get(name, (value, value))
        if low < high:  # a parameter that is held is the same in every draw
            line += f"   95% {low:.6g} to {high:.6g}"
        lines.append(line)
    if result.reduced is not None:
        lines.append(f"what these data do identify: {result.reduced}")
    lines += ["", f"objective {result.objective:.10g} (sum over rows)"]
    if result.aicc is not None:
        lines.append(f"AICc {result.aicc:.2f}")
    if result.saturation is not None:
        lines.append(f"{result.saturation.verdict}: {result.saturation.reason}")
    warnings = [*result.warnings, *(result.saturation.warnings if result.saturation else ())]
    lines += [f"warning {code}: {explain(code)}" for code in dict.fromkeys(warnings)]
    if not result.intervals:
        lines.append("no intervals: --bootstrap 1000 gives them")
    return "\n".join(lines)
