"""`grscale fit`: a law fitted to a table, from the command line. Heavy imports wait for `run`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fit.errors import FitError

if TYPE_CHECKING:
    from fit.result import FitResult
    from fit.tables import Floats


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
    parser.add_argument("--bootstrap", type=int, default=0, metavar="DRAWS", help="draws for the intervals (default 0: none)")
    parser.add_argument(
        "--cluster", default="auto", metavar="COLUMN", help="replicates to draw (default: seed if there), or rows"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="also write fit.json, draws.csv and, for one size, a figure there"
    )


def run(args: argparse.Namespace) -> int:
    """0, or 2 with one line on stderr for a mistake of the user's."""
    from fit.fitting import fit_law
    from fit.tables import numbers, read_table, where

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
        )
        if args.out:
            write(result, {role: numbers(table, name, role) for role, name in result.columns.items()}, args.out)
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


def readable(result: "FitResult") -> str:
    """The result as lines of text: parameters with intervals, objective, verdict, warnings in words."""
    from fit.words import explain

    lines = [f"{result.law}: {result.definition.formula}   ({result.n} rows, {result.loss})", ""]
    width = max(len(name) for name in result.params)
    for name, value in result.params.items():
        line = f"  {name:<{width}}  {value:>12.6g}"
        if name in result.intervals:
            low, high = result.intervals[name]
            line += f"   95% {low:.6g} to {high:.6g}"
        lines.append(line)
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


def write(result: "FitResult", points: "dict[str, Floats]", out: Path) -> None:
    """Writes fit.json, draws.csv (if any) and, for a law of one size, fit.png and fit.svg, each file whole, into ``out``."""
    import io

    import numpy as np

    out.mkdir(parents=True, exist_ok=True)
    _whole(out / "fit.json", json.dumps(result.to_json(), indent=1, allow_nan=False).encode() + b"\n")
    if len(result.draws):
        text = io.StringIO()
        np.savetxt(text, result.draws, delimiter=",", header=",".join(result.params), comments="")
        _whole(out / "draws.csv", text.getvalue().encode())
    if len(result.sizes) == 1:
        for kind in ("png", "svg"):
            _whole(out / f"fit.{kind}", figure(result, points, kind))


def figure(result: "FitResult", points: "dict[str, Floats]", kind: str) -> bytes:
    """Points, law and 90% band over the fitted range, for a law of one size N."""
    import io

    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    response = next(role for role in points if role != "N")
    low, high = result.sizes["N"]
    N = np.geomspace(low, high, 200)
    curve = result.predict({"N": N, result.columns["N"]: N})
    with matplotlib.rc_context({"svg.hashsalt": "fit", "svg.fonttype": "path"}):
        canvas = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot(xscale="log", xlabel=result.columns["N"], ylabel=result.columns[response])
        if curve.low is not None and curve.high is not None:
            axes.fill_between(N, curve.low, curve.high, alpha=0.2, linewidth=0, label="90% interval of the mean")
        axes.plot(N, curve.value, label=result.law)
        axes.plot(points["N"], points[response], "k.", alpha=0.6)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def _whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    aside.replace(path)
