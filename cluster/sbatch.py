"""The text of an sbatch file, from the templates of `slurm/`.

Whatever a user gives is checked against a pattern where it stands in an #SBATCH line, which no shell reads, and quoted for the
shell everywhere else, by the template engine itself.
"""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2

from gr.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "slurm"
PATTERNS = {
    "account": (r"[A-Za-z0-9][\w.+-]*", "letters, digits and _ . + -"),
    "partition": (r"[A-Za-z0-9][\w.+-]*(,[A-Za-z0-9][\w.+-]*)*", "names of letters, digits and _ . + -, with commas between"),
    "qos": (r"[A-Za-z0-9][\w.+-]*", "letters, digits and _ . + -"),
    "mem": (r"[0-9]+[KMGT]?", "a number with K, M, G or T, such as 64G"),
    "time": (r"([0-9]+-)?[0-9]+(:[0-9]{1,2}){0,2}", "a limit such as 24:00:00, 90 (minutes) or 2-12:00:00"),
}
"""Option -> what its value has to be, in full."""
NOTICE = (60, 600)
"""Seconds before the limit at which a job is asked to stop: a twelfth of the limit, within these bounds."""


class Directive(str):
    """Text for an #SBATCH line: checked, or quoted as Slurm reads these lines, and not for a shell."""


def check(args: argparse.Namespace) -> None:
    """UserError for an option that can't stand in an #SBATCH line, or makes no sense."""
    for name, (pattern, meaning) in PATTERNS.items():
        value = getattr(args, name)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            raise UserError(f"submit slurm: --{name}: {value!r} is not {meaning}")
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_node", 1), ("chain", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"submit slurm: --{name.replace('_', '-')}: {value} is less than {least}")
    if args.array and args.nodes > 1:
        raise UserError(
            "submit slurm: --array: each point runs on one node, so --nodes has to be 1; leave --array out, or --nodes"
        )
    if args.array and args.chain != 1:
        raise UserError("submit slurm: --array: its tasks go back into the queue by themselves; leave --chain out")
    if args.chain is None and args.time is None:
        raise UserError("submit slurm: --chain auto: give --time, the limit of each job")
    if args.time is not None and not seconds(args.time):
        raise UserError(f"submit slurm: --time: {args.time!r} is no time at all")


def seconds(limit: str) -> int:
    """Of a limit as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = (3600, 60, 1) if len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def log_path(folder: Path, name: str) -> Directive:
    """Where a job's output goes, as #SBATCH lines take it: in double quotes, where only `"` needs a backslash. ``name`` may hold
    Slurm's patterns such as %j; the folder's own % are none."""
    return Directive('"' + checked(folder).replace('"', '\\"').replace("%", "%%") + f'/{name}"')


def checked(path: Path) -> str:
    """The path's text; UserError where no line of an sbatch file can hold it."""
    text = str(path)
    if "\\" in text or not text.isprintable():
        raise UserError(f"submit: {text!r}: a path with a backslash or a control character can't stand in an sbatch file")
    return text


def fill(template: str, **values: Any) -> str:
    """A template of `slurm/` with its values, each quoted for the shell unless it is a `Directive`; a missing one is an error."""
    if not TEMPLATES.is_dir():
        raise UserError(f"{TEMPLATES}: not there; `grscale submit slurm` runs from a checkout of the project")

    def quoted(value: Any) -> str:
        return str(value) if isinstance(value, Directive) else shlex.quote(str(value))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=quoted,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # {# is how bash begins a length
    )
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(template).render(values))


def notice(args: argparse.Namespace) -> int:
    """Seconds before the limit at which the job is asked to stop."""
    least, most = NOTICE
    return min(most, max(least, seconds(args.time) // 12)) if args.time else most // 2


def directives(args: argparse.Namespace, name: str, log: Directive, cpus: int | None) -> list[tuple[Directive, Directive | None]]:
    """The #SBATCH lines. ``cpus``: cores per node, None for whole nodes."""
    found: dict[str, object] = {
        "job-name": name,
        "account": args.account,
        "partition": args.partition,
        "qos": args.qos,
        "nodes": args.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": cpus,
        "mem": args.mem or (0 if cpus is None else None),  # 0: all that the node has
        "time": args.time,
        "signal": f"B:USR1@{notice(args)}",
        "open-mode": "append",
        "output": log,
    }
    lines = [(Directive(key), Directive(str(value))) for key, value in found.items() if value is not None]
    return [*lines, (Directive("requeue"), None), *([(Directive("exclusive"), None)] if cpus is None else [])]
