"""`grscale fit`: a law fitted to a table, from the command line. Heavy imports wait for `run`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fit.errors import FitError

if TYPE_CHECKING:
    import pyarrow as pa


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
    parser.add_argument("--groups", metavar="COLUMN", help="one fit for all groups of rows that this column makes")
    parser.add_argument(
        "--shared", metavar="PARAMETER,...", help="with --groups: one number for all groups; all others are each group's own"
    )
    parser.add_argument(
        "--weights", metavar="COLUMN", help="weights of the rows; replicates: from the scatter of each size's runs"
    )
    parser.add_argument("--bootstrap", type=int, default=0, metavar="DRAWS", help="draws for the intervals (default 0: none)")
    parser.add_argument(
        "--cluster",
        default="auto",
        metavar="COLUMN",
        help="what is drawn: a column of replicates (default: seed, if there), rows, sizes, residuals or parametric",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--profile", action="store_true", help="profile likelihood intervals too")
    parser.add_argument(
        "--predict", action="append", default=[], metavar="N=SIZE,...", help="the law's mean there (may be repeated)"
    )
    parser.add_argument("--compare", metavar="LAW,...", help="compare these laws with --law: AICc, BIC, bootstrap tests")
    parser.add_argument(
        "--holdout", action="store_true", help="how well would fits to the smaller sizes have predicted the larger?"
    )
    parser.add_argument(
        "--worthwhile",
        type=float,
        default=0.01,
        metavar="GAIN",
        help="least relative gain per doubling that counts (default .01)",
    )
    parser.add_argument(
        "--saturation-size", action="store_true", help="the size from which on the law itself gains less than that"
    )
    parser.add_argument(
        "--by", metavar="COLUMN", help="each value of this column is a curve of its own; verdicts judged together"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write report.html, its figures (PNG, SVG), fit.json and draws.csv there"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on stderr for a mistake of the user's."""
    from fit.tables import read_table, where

    try:
        table = where(read_table(args.table), _pairs(args.where, "--where"))
        options = {
            "columns": _pairs(args.columns.split(","), "--columns"),
            "loss": args.loss,
            "delta": args.delta,
            "bounds": {name: _bounds(text) for name, text in _pairs(args.bounds, "--bounds").items()},
            "fixed": {name: number(text, "--fix") for name, text in _pairs(args.fix, "--fix").items()},
            "weights": args.weights,
        }
        args.predict = [_pairs(text.split(","), "--predict") for text in args.predict]
        document, words = _curves(table, args, options) if args.by else _curve(table, args, options)
    except (FitError, OSError) as error:
        print(f"grscale fit: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document, allow_nan=False) if args.json else words)
    return 0


def _curve(table: "pa.Table", args: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The document and the text of one fit, which is also written to ``--out``."""
    from fit.cli_answer import ask
    from fit.cli_words import readable

    answer = ask(table, args, options)
    document, words = answer.to_json(), readable(answer)
    if args.out:
        from fit.page import write, write_groups

        source = " ".join([args.table, *args.where])
        constrained = bool(args.bounds or args.fix or args.weights)
        if answer.result.groups is not None:
            write_groups(answer.result, table, args.out, source, args.cluster)
        else:
            write(answer.result, table, args.out, source, args.cluster, constrained)
        words += f"\n\nwritten to {args.out}"
    return document, words


def _curves(table: "pa.Table", args: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from fit.cli_answer import ask_each
    from fit.cli_words import readable_curves

    curves = ask_each(table, args, options)
    return curves.to_json(), readable_curves(curves)


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
    return number(low, "--bounds"), number(high, "--bounds")


def number(text: str, option: str) -> float:
    """A number from the command line; FitError names the option that it was given to."""
    try:
        return float(text)
    except ValueError:
        raise FitError(f"{option}: {text!r} is not a number") from None
