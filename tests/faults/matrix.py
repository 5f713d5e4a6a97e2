"""Injects every fault of `tests.faults.cells` for real and writes the table of docs/faults.md.

    .venv/bin/python -m tests.faults.matrix [--only WORDS] [--workers 2] [--folder DIR]

One undisturbed study, and per cell a copy of it that is cut back to the stage under attack, disturbed, and completed by the same
command. Exit code 1 if a cell did not end as it has to; the table is written only when all cells ran. Needs root for small disks.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gr.files import read_json, write_json
from tests.conftest import ROOT
from tests.faults.cells import CELLS, Cell, Outcome, run_cell
from tests.faults.study import Study

DOC = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end of matrix -->\n"


def undisturbed(folder: Path, options: Sequence[str] = ()) -> Study:
    """The study that all others are compared with; one that is there already is completed. ``options``: of `grscale run`."""
    study = Study(folder)
    study.options = list(options)
    folder.mkdir(parents=True, exist_ok=True)
    assert study.start().wait(900) == 0, study.said()
    return study


def table(done: list[tuple[Cell, Outcome]]) -> str:
    lines = ["| fault | while | the run | the same command then | metrics | last process gone after |", "|---" * 6 + "|"]
    for cell, outcome in done:
        ends = {0: "completes by itself", None: "hangs"}.get(outcome.code, f"ends with {outcome.code}")
        if outcome.code is not None and outcome.code < 0:
            ends = "is dead"
        then = {None: "", 0: "completes, from the last checkpoint" if cell.resumed else "completes"}
        again = then.get(outcome.again, f"ends with {outcome.again}")
        equal = "equal" if not outcome.wrong else f"**{' '.join(outcome.wrong.split())[:200]}**"
        lines.append(f"| {cell.fault} | {cell.when} | {ends} | {again} | {equal} | {outcome.gone:.0f} s |")
    return "\n".join(lines) + "\n"


def settled(base: Study, number: int, folder: Path) -> Outcome:
    """What came of a cell, said on a line of its own; one that ended well in ``folder`` before is taken as it is."""
    cell, began, place = CELLS[number], time.monotonic(), folder / f"cell{number:02d}"
    if (known := place / "outcome.json").is_file() and not (outcome := Outcome(**read_json(known))).wrong:
        return outcome
    shutil.rmtree(place, ignore_errors=True)
    try:
        outcome = run_cell(base, cell, place)
    except Exception as error:  # of one cell: the others have to run all the same
        outcome = Outcome(None, 0.0, None, f"{type(error).__name__}: {error}")
    place.mkdir(exist_ok=True)
    write_json(known, vars(outcome))
    words = outcome.wrong or f"as it has to be; exit {outcome.code}, then {outcome.again}; gone after {outcome.gone:.1f} s"
    print(f"{number:2d} {cell.fault}, {cell.when} ({time.monotonic() - began:.0f} s): {words}", flush=True)
    return outcome


def main(only: str, workers: int, folder: Path) -> int:
    base = undisturbed(folder / "undisturbed")
    chosen = [i for i, cell in enumerate(CELLS) if only in f"{cell.fault}, {cell.when}"]
    with ThreadPoolExecutor(workers) as pool:
        outcomes = list(pool.map(lambda number: settled(base, number, folder), chosen))
    done = [(CELLS[i], outcome) for i, outcome in zip(chosen, outcomes, strict=True)]
    wrong = sum(bool(outcome.wrong) for outcome in outcomes)
    print(f"{len(done)} cells, {wrong} not as they have to be")
    if len(done) == len(CELLS):
        text = DOC.read_text()
        before, rest = text.split(BEGIN)
        DOC.write_text(before + BEGIN + table(done) + END + rest.split(END)[1])
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose words contain this")
    parser.add_argument("--workers", type=int, default=2, help="cells at a time")
    parser.add_argument("--folder", type=Path, help="keeps studies and logs; cells that ended well there are taken as they are")
    arguments = parser.parse_args()
    if arguments.folder:
        sys.exit(main(arguments.only, arguments.workers, arguments.folder.resolve()))
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        sys.exit(main(arguments.only, arguments.workers, Path(name)))
