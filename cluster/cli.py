"""The `grscale` command. Every part is imported when its command runs, so that --help answers at once."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gr.errors import UserError

if TYPE_CHECKING:
    from cluster.study import Loaded


def _load(args: argparse.Namespace) -> "Loaded":
    from cluster.study import BUILTIN, load_study

    return load_study(args.study or BUILTIN, args.set)


def run(args: argparse.Namespace) -> int:
    loaded = _load(args)
    if not isinstance(args.out, str):
        return _run_in(loaded, args.out or Path("runs") / loaded.study.study, args.ray)
    from cluster.remote import Mirror

    if args.ray:
        raise UserError("--ray: the machines of a cluster share a path, not a URL; give --out a folder that all of them see")
    with Mirror(args.out).kept() as out:
        return _run_in(loaded, out, None)


def _run_in(loaded: "Loaded", out: Path, ray: str | None) -> int:
    from cluster.run import GO_ON, run_study
    from jobs.runtime import no_room

    try:
        return run_study(loaded, out, ray)
    except Exception as error:  # of a full disk: whichever library met it, Ray's among them
        if not (why := no_room(out, error)):
            raise
        print(f"grscale: {out}: {why}; make room, and {GO_ON}", file=sys.stderr)
        return 1


def _here(folder: Path | str) -> Path:
    """A study's folder on this machine; of a URL the copy, brought up to date."""
    if isinstance(folder, Path):
        return folder
    from cluster.remote import Mirror

    mirror = Mirror(folder)
    mirror.pull()
    return mirror.folder


def _place(text: str) -> Path | str:
    """A URL as it was typed, anything else as a path."""
    return text if "://" in text else Path(text)


def plan(args: argparse.Namespace) -> int:
    from cluster.plan import make_plan
    from cluster.store import Store
    from cluster.tuning import Records

    store = Store(args.out) if args.out else None
    made = make_plan(_load(args), Records(store.folder) if store else None, priced=True)
    from rich.console import Console

    from cluster import price

    document = price.price(made, store)
    if args.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(price.table(made, document, len(os.sched_getaffinity(0))))
    return 0


def status(args: argparse.Namespace) -> int:
    from rich.console import Console

    from cluster.graph import width_name
    from cluster.progress import Watch
    from cluster.run import failures, slots
    from cluster.store import open_store
    from cluster.submit import queue

    store, made = open_store(_here(args.folder))
    watch = Watch(made, store)
    watch.look()
    found = [failure for failure in failures(store, made) if failure.ran]
    if args.json:
        document = {
            "study": made.study.study,
            "running": store.locked(),
            "points": {point.run_id: watch.point_state(point) for point in made.points},
            "pending": list(made.pending),
            "trials": {trial.run_id: watch.tried(trial) for trial in made.trials},
            "widths": {width_name(p.run_id, made.beams(id)): watch.width_state(id) for p in made.points for id in p.widths},
            "seconds_left": round(watch.seconds_left(slots())),
            "failures": [vars(failure) for failure in found],
            "slurm": queue(store.folder),
        }
        print(json.dumps(document, indent=1))
        return 0
    Console(width=None if sys.stdout.isatty() else 160).print(watch.table(slots()))
    for failure in found:
        print(f"failed: {failure.point}: {failure.reason}\n        log: {failure.log}")
    jobs = queue(store.folder)
    for job in jobs:
        print(f"slurm: job {job['job']} {job['state']} {job['time']} {job['where']}")
    undone = watch.totals()["done"] < len(made.points) + len(made.pending) or watch.widths_left()
    if undone and not jobs and not store.locked():
        print("nothing runs here; the same `grscale run` goes on where it stopped")
    return 0


def logs(args: argparse.Namespace) -> int:
    from cluster.graph import nearest_point
    from cluster.store import open_store

    store, made = open_store(_here(args.folder))
    point = nearest_point(made, args.point)
    stages = [*made.upstream(point), *(made.nodes[id] for id in point.widths)]
    logged = [node for node in stages if (store.work(node) / "log.txt").is_file()]
    if not logged:
        raise UserError(f"{point.run_id}: none of its stages has started, so there is no log")
    failed = [node for node in logged if store.state(node) == "failed"]
    last = max(failed or logged, key=lambda node: ((node.id in point.nodes), (store.work(node) / "log.txt").stat().st_mtime))
    file = store.work(last) / "log.txt"
    print(f"# {file}", file=sys.stderr)
    sys.stdout.write(file.read_text(errors="replace"))
    return 0


def report(args: argparse.Namespace) -> int:
    from cluster.measure import refresh_rows
    from cluster.report import verdict_lines, write_report
    from cluster.store import open_store

    store, made = open_store(_here(args.folder))
    refresh_rows(store, made)  # of points that a job array measured
    if not any((store.folder / "metrics").glob("*.parquet")):
        raise UserError(f"{store.folder}: no point has been measured yet")
    for line in verdict_lines(write_report(store.folder)):
        print(line)
    print(f"report: {store.folder / 'report' / 'index.html'}")
    return 0


def data(args: argparse.Namespace) -> int:
    from gr.data import importer

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what is half-written is removed
    manifest = importer.run(args)
    counts = ", ".join(f"{value:,} {name}" for name, value in manifest["counts"].items())
    repairs = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in manifest["repairs"].items() if value)
    print(f"{args.out}: {counts}" + (f"; repaired: {repairs}" if repairs else ""))
    return 0


def fit(args: argparse.Namespace) -> int:
    from fit import cli
    from fit.errors import FitError

    try:
        return cli.run(args)
    except FitError as error:
        raise UserError(str(error)) from None


def submit(args: argparse.Namespace) -> int:
    from cluster import submit

    return submit.run(args)


def doctor(args: argparse.Namespace) -> int:  # noqa: ARG001 -- every command takes its arguments
    from cluster.doctor import doctor as examine

    return examine()


class _Parser(argparse.ArgumentParser):
    """A wrong command line is a mistake like any other: one line, and no page of usage."""

    def error(self, message: str) -> NoReturn:
        where = self.prog.removeprefix("grscale").strip()
        raise UserError(f"{where + ': ' if where else ''}{message}; `{self.prog} --help` says more")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """``command``: the one that was typed; the arguments of `data`, `fit` and `submit` are their modules' own, loaded then."""
    parser = _Parser(prog="grscale", description="Scaling-law studies of generative recommendation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function: object, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        found.set_defaults(function=function)
        return found

    one = add("run", run, "run a study, or go on with one (with no STUDY: the built-in one)")
    one.add_argument("study", nargs="?", type=Path, metavar="STUDY.yaml")
    one.add_argument("--out", type=_place, metavar="DIR|URL", help="the study's folder (default: runs/<name of the study>)")
    one.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one key of the study")
    one.add_argument("--ray", metavar="ADDRESS", help="a running Ray cluster (default: one on this machine, for this run)")

    one = add("plan", plan, "price a study before it runs: parameters, FLOPs, memory, devices, time")
    one.add_argument("study", nargs="?", type=Path, metavar="STUDY.yaml")
    one.add_argument("--json", action="store_true", help="one JSON document")
    one.add_argument("--out", type=Path, metavar="DIR", help="the study's folder, to show what is done already")
    one.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one key of the study")

    one = add("status", status, "show what a study is doing")
    one.add_argument("folder", type=_place, metavar="DIR|URL")
    one.add_argument("--json", action="store_true", help="one JSON document")

    one = add("logs", logs, "print the log of a point's last stage")
    one.add_argument("folder", type=_place, metavar="DIR|URL")
    one.add_argument("point", metavar="POINT", help="its run_id, or the beginning of it")

    one = add("report", report, "write a study's report again from its metrics")
    one.add_argument("folder", type=_place, metavar="DIR|URL")

    one = add("data", data, "turn interactions and items into a data set folder")
    if command == "data":
        from gr.data import importer

        importer.add_arguments(one)

    one = add("fit", fit, "fit a scaling law to a table")
    if command == "fit":
        from fit import cli

        cli.add_arguments(one)

    one = add("submit", submit, "hand a study to Slurm, or to a Ray cluster as a job of its own")
    if command == "submit":
        from cluster import submit as submission

        submission.add_arguments(one)

    add("doctor", doctor, "check whether this machine can run a study")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 success, 1 a failed run, 2 a mistake of the user's."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(words[0] if words else None).parse_args(words)
        return int(args.function(args))
    except UserError as error:
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))  # a name may hold a terminal's commands
        print(f"grscale: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `grscale logs ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
