"""`grscale submit`: hands a study to Slurm as one sbatch file, or to a Ray cluster's Jobs API.

The study's folder keeps the file, the jobs' ids and their logs in `slurm/`.
"""

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.sbatch import ROOT, check, checked, directives, fill, log_path, notice, seconds
from gr.errors import UserError, first_line
from gr.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    from cluster.graph import Plan
    from cluster.store import Store
    from jobs.config import Run

OVER = frozenset({
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
})  # fmt: skip
"""States of jobs that will not run again."""
MOST_JOBS = 20
"""Of a chain whose length is not given as a number."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="scheduler", required=True, metavar="slurm|ray")
    text = "one sbatch file, written and submitted"
    one = kinds.add_parser("slurm", help=text, description=text.capitalize() + ".")
    one.add_argument("study", type=Path, metavar="STUDY.yaml", help="or one stage's run.yaml, for accelerate on several nodes")
    one.add_argument("--nodes", type=int, default=1, metavar="N")
    one.add_argument("--gpus-per-node", type=int, default=0, metavar="N")
    one.add_argument("--cpus-per-node", type=int, metavar="N", help="default: whole nodes, for this job alone")
    for name, meaning in (
        ("time", "limit, such as 24:00:00; shortly before it the study saves and goes back into the queue"),
        ("account", "whom to charge"),
        ("partition", "one, or several with commas"),
        ("qos", "quality of service"),
        ("mem", "main memory per node, such as 64G"),
    ):
        one.add_argument(f"--{name}", metavar=name.upper(), help=meaning)
    one.add_argument("--array", action="store_true", help="no Ray: a job array of the study's points, one node each")
    words = "K jobs, each going on where the one before was stopped; auto: as many as the priced time needs, which is only as "
    words += "good as the study's resources.flops_per_second"
    one.add_argument("--chain", type=_jobs, default=1, metavar="K|auto", help=words)
    one.add_argument("--dry-run", action="store_true", help="print the sbatch file, and neither write nor submit anything")
    text = "a job of a running Ray cluster"
    two = kinds.add_parser("ray", help=text, description=text.capitalize() + ".")
    two.add_argument("study", type=Path, metavar="STUDY.yaml")
    two.add_argument("--address", required=True, metavar="URL", help="the cluster's dashboard, such as http://head:8265")
    for each in (one, two):
        each.add_argument("--out", type=_folder, metavar="DIR", help="the study's folder, on a file system that all nodes share")
        each.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override one key of the study")


def _folder(text: str) -> Path:
    """UserError for a URL, which a path would take for a folder of that name."""
    if "://" in text:
        raise UserError("submit: --out: the machines of a cluster share a path, not a URL; give a folder that all of them see")
    return Path(text)


def _jobs(text: str) -> int | None:
    """Of a chain; None for ``auto``."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of jobs nor auto") from None


def run(args: argparse.Namespace) -> int:
    if args.scheduler == "ray":
        return submit_ray(args)
    check(args)
    job = _read_job(args.study)
    return submit_job(args, job) if job is not None else submit_study(args)


def submit_study(args: argparse.Namespace) -> int:
    from cluster.plan import make_plan
    from cluster.store import Store
    from cluster.study import load_study
    from cluster.tuning import Records

    loaded = load_study(args.study, args.set)
    store = Store(args.out or Path("runs") / loaded.study.study)
    plan = make_plan(loaded, Records(store.folder))
    if args.chain is None:
        args.chain, why = chain_length(args, make_plan(loaded, Records(store.folder), priced=True), store)
        print(why, file=sys.stderr)
    file = store.folder / "slurm" / ("array.sbatch" if args.array else "ray.sbatch")
    checked(store.folder)
    text = study_text(args, plan, store, file)
    if args.dry_run:
        print(text, end="")
        return 0
    _need("sbatch")
    if alive := [job for job in queue(store.folder) if job["state"] not in OVER]:
        job = alive[0]
        raise UserError(f"{store.folder}: job {job['job']} of this study is {job['state']}; wait for it, or scancel {job['job']}")
    with store.lock():
        store.prepare(plan, loaded.raw)
    _write(file, text)
    for id in _submit_array(file, len(plan.points)) if args.array else _submit_chain(file, args.chain):
        _record(store.folder, id, file)
        print(f"submitted job {id}: {file}")
    print(f"`grscale status {shlex.quote(str(store.folder))}` shows its state; the logs are in {file.parent}")
    return 0


def study_text(args: argparse.Namespace, plan: "Plan", store: "Store", file: Path) -> str:
    """The sbatch file of a study. UserError when its stages need more than the nodes are asked to have."""
    if args.array and plan.pending:
        raise UserError("submit slurm: --array runs points of known learning rates, and some wait for a sweep; leave --array out")
    gpus = max(node.gpus for node in plan.nodes.values())
    cpus = max(node.processes * node.threads for node in plan.nodes.values())
    if gpus and not args.gpus_per_node:
        raise UserError(f"submit slurm: the study's stages need up to {gpus} GPUs; give --gpus-per-node")
    if args.cpus_per_node is not None and args.cpus_per_node < cpus:
        raise UserError(f"submit slurm: --cpus-per-node is {args.cpus_per_node}, but a stage needs {cpus} (processes x threads)")
    name = "grscale-" + re.sub(r"[^A-Za-z0-9_.-]", "_", plan.study.study)
    log = log_path(file.parent, "%A_%a.log" if args.array else "%j.log")
    cores = args.cpus_per_node or (cpus if args.array else None)
    values = {
        "directives": directives(args, name, log, cores),
        "out": store.folder,
        "root": checked(ROOT),
        "python": checked(Path(sys.executable)),
        "chain": args.chain > 1,
        "grace": notice(args) - 30,
    }
    if args.array:
        return fill("array.sbatch", **values, points=len(plan.points), file=file)
    return fill("ray.sbatch", **values)


def chain_length(args: argparse.Namespace, plan: "Plan", store: "Store") -> tuple[int, str]:
    """How many jobs of ``--time`` the priced rest of a study needs, and why; UserError above `MOST_JOBS`.

    The time is the longer of two lower bounds: the work of all devices over those of the allocation (of whole nodes of unknown
    cores: the widest stage's), and the longest path of stages that wait for each other. A job's time: its limit less the notice.
    """
    from cluster.price import price
    from cluster.progress import duration

    left = {entry["id"]: entry["price"] for entry in price(plan, store)["nodes"] if not entry["price"]["done"]}
    on_gpus = args.gpus_per_node > 0 and any(p["gpus"] for p in left.values())
    widths = {id: p["gpus"] if on_gpus else p["processes"] * p["threads"] for id, p in left.items()}
    slots = args.nodes * ((args.gpus_per_node if on_gpus else args.cpus_per_node) or max(widths.values(), default=1))
    path: dict[str, float] = {}
    for id, node in plan.nodes.items():  # each comes after its inputs
        own = left[id]["seconds"] if id in left else 0.0
        path[id] = own + max((path.get(source, 0.0) for source in node.inputs.values()), default=0.0)
    work = sum(left[id]["seconds"] * widths[id] for id in left) / slots
    needed = max(work, *path.values()) if path else 0.0
    each = seconds(args.time) - notice(args)
    if each <= 0:
        raise UserError(
            f"submit slurm: --chain auto: --time {args.time} leaves nothing before the notice of {notice(args)} s; give more"
        )
    jobs = max(1, math.ceil(needed / each))
    on = f"{slots} {'GPU' if on_gpus else 'core'}{'s' if slots > 1 else ''}"
    why = f"priced at {duration(needed)} on {on}, {duration(each)} per job: {jobs} job{'s' if jobs > 1 else ''}"
    if jobs > MOST_JOBS:
        raise UserError(f"submit slurm: --chain auto: {why}, over {MOST_JOBS}; give more --nodes or --time, or --chain {jobs}")
    return jobs, why


def _read_job(path: Path) -> "Run | None":
    """The run.yaml at ``path``; None when it is a study."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # what is wrong with it, the reader of studies says best
    if not isinstance(document, dict) or "stage" not in document:
        return None
    from jobs.runtime import read_run

    return read_run(path)


def submit_job(args: argparse.Namespace, job: "Run") -> int:
    """One stage on several nodes."""
    path = args.study.resolve()
    folder = (args.out or path.parent / job.work).resolve() / "slurm"
    processes, gpus = job.launch.processes, args.gpus_per_node
    if args.set or args.array:
        raise UserError(f"submit slurm: {args.study} is one stage's run.yaml; --set and --array are for studies")
    if args.chain is None:
        raise UserError(f"submit slurm: {args.study} is one stage's run.yaml; --chain auto is for studies, give --chain a number")
    if processes % args.nodes or (gpus and processes != args.nodes * gpus):
        on = f"{args.nodes} nodes" + (f" of {gpus} GPUs" if gpus else "")
        raise UserError(f"{args.study}: launch.processes is {processes}; it has to fit {on}, one process per device")
    log = log_path(folder, "%j.log")
    text = fill(
        "job.sbatch",
        directives=directives(args, f"grscale-{job.stage}", log, args.cpus_per_node),
        python=checked(Path(sys.executable)),
        run=checked(path),
        root=checked(ROOT),
        threads=job.launch.threads,
        gpus=gpus,
        zero=job.launch.zero,
        plain=processes == 1 and not job.launch.zero,
        processes=processes,
        stage=job.stage,
        chain=args.chain > 1,
    )
    if args.dry_run:
        print(text, end="")
        return 0
    _need("sbatch")
    _write(folder / "job.sbatch", text)
    for id in _submit_chain(folder / "job.sbatch", args.chain):
        print(f"submitted job {id}: {folder / 'job.sbatch'}; its log is in {folder}")
    return 0


def _submit_chain(file: Path, jobs: int) -> Iterator[str]:
    """Each job starts when the one before ended without finishing; one that finished takes the rest out of the queue."""
    yield (last := _sbatch(str(file)))
    for _ in range(jobs - 1):
        yield (last := _sbatch(f"--dependency=afternotok:{last}", "--kill-on-invalid-dep=yes", str(file)))


def _submit_array(file: Path, points: int) -> Iterator[str]:
    """The shared stages, the points, the report."""
    yield (shared := _sbatch("--array=0", str(file)))
    yield (each := _sbatch(f"--array=1-{points}", f"--dependency=afterok:{shared}", "--kill-on-invalid-dep=yes", str(file)))
    yield _sbatch(f"--array={points + 1}", f"--dependency=afterany:{each}", str(file))


def _sbatch(*arguments: str) -> str:
    """The new job's id; UserError with Slurm's own words where it refuses."""
    done = subprocess.run(["sbatch", "--parsable", *arguments], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"submit slurm: {said[-1] if said else f'sbatch ended with code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"submit slurm: {program} is not here; run this where Slurm is, or see the file with --dry-run")


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as aside:
            aside.write_text(text)
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}); give another --out") from None


def _record(folder: Path, job: str, file: Path) -> None:
    jobs = folder / "slurm" / "jobs.json"
    known = read_json(jobs) if jobs.is_file() else []
    write_json(jobs, [*known, {"job": job, "file": file.name, "submitted": time.strftime("%Y-%m-%d %H:%M:%S")}])


def queue(folder: Path) -> list[dict[str, str]]:
    """What squeue says of the study's jobs that it still knows: job, state, time, and where or why not; empty without Slurm."""
    jobs = folder / "slurm" / "jobs.json"
    if not jobs.is_file() or shutil.which("squeue") is None:
        return []
    ids: Sequence[str] = [str(entry["job"]) for entry in read_json(jobs)]
    command = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(ids)}", "--format=%i|%T|%M|%R"]
    done = subprocess.run(command, capture_output=True, text=True)
    # squeue fails when it knows none of the jobs any more.
    lines = [line.split("|", 3) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [dict(zip(("job", "state", "time", "where"), line, strict=True)) for line in lines]


def submit_ray(args: argparse.Namespace) -> int:
    """Hands the study to a running Ray cluster as a job of its own; its log is on the cluster's dashboard."""
    if not re.fullmatch(r"https?://[^\s@]+", args.address):
        raise UserError(f"submit ray: --address: {args.address!r} is not the URL of a dashboard, such as http://head:8265")
    from cluster.plan import make_plan
    from cluster.store import Store
    from cluster.study import load_study
    from cluster.tuning import Records

    loaded = load_study(args.study, args.set)
    store = Store(args.out or Path("runs") / loaded.study.study)
    plan = make_plan(loaded, Records(store.folder))
    from ray.job_submission import JobSubmissionClient

    words = [sys.executable, "-m", "cluster.cli", "run", str(store.folder / "study.yaml"), "--out", str(store.folder)]
    try:
        client = JobSubmissionClient(args.address)
        with store.lock():
            store.prepare(plan, loaded.raw)
        job = client.submit_job(entrypoint=shlex.join([*words, "--ray", "auto"]))  # the Jobs API takes a shell's line
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"submit ray: --address {args.address}: {first_line(error)}") from None
    print(f"submitted job {job}; `grscale status {shlex.quote(str(store.folder))}` shows what it does")
    return 0
