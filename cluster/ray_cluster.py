"""Ray: one on this machine, for this run only, or a cluster that is there already (docs/ray.md)."""

import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from cluster.graph import Plan
from cluster.group import grace
from cluster.room import Need
from cluster.store import Store
from gr.errors import UserError

PACKAGES = ("cluster", "fit", "gr", "jobs")
"""The study's own code: it travels with the run. What it imports has to be there."""
REQUIREMENTS = ("accelerate", "peft", "torch", "transformers")
"""Distributions that must be the same everywhere, or a point's result would depend on where it ran."""
TRAVELS, SECRET = re.compile("(GRSCALE|HF|TRANSFORMERS|TORCH|NCCL|GLOO)_"), re.compile("TOKEN|KEY|SECRET|PASSWORD")
"""Variables that go with the run; who can see the cluster's jobs can read them, so none with a secret."""
ANSWER = 120.0
"""Seconds that a machine may take to start a worker and look at the study's folder."""
DEATH = 20.0
"""Seconds within which Ray's head notices that a machine is gone, by its default settings."""
HEAD_GONE = 15.0
"""Seconds without Ray's head after which a driver gives up; Ray itself would end the process, without a word, later."""
_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15 any other process of the machine would starve the study
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "10000",  # the schedule suggests only what has room
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}


def connect(address: str | None, slots: int) -> None:
    """Starts a Ray of this run's own with ``slots`` cores, or joins the cluster at ``address``.

    UserError where there is none, or it does not let us in. The token of a Ray of our own is this run's; left to itself Ray would
    put one in the home folder, after which clients that know nothing of it fail.
    """
    os.environ.update(_ENVIRONMENT)
    # When Tune takes a trial's actor away that has not ended its job by itself: after SIGTERM, the grace and SIGKILL.
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(math.ceil(grace()) + 10)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address and address.startswith("ray://"):
        raise UserError(f"--ray {address}: start it on a machine of the cluster, with the address of its head: HOST:PORT")
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's way, on Linux too, to bind its servers to loopback
    elif not reachable(address):
        raise UserError(f"--ray {address}: nothing listens there; it is HOST:PORT of the cluster's head (or: auto)")
    import ray

    # "local": without an address Ray would join whatever cluster RAY_ADDRESS or a file in /tmp names.
    options: dict[str, Any] = {"address": address or "local", "logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["runtime_env"] = {
            "py_modules": [str(_package(name)) for name in PACKAGES],
            "excludes": ["__pycache__"],
            "env_vars": {name: value for name, value in os.environ.items() if TRAVELS.match(name) and not SECRET.search(name)},
        }
    else:
        options |= {"num_cpus": slots, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(**options)
    except Exception as error:  # of a wrong address: ValueError, ConnectionError, RuntimeError, by what is wrong with it
        if not address:
            raise
        words = " ".join(str(error).split())
        token = "its token is given by RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, and none by RAY_AUTH_MODE=disabled"
        raise UserError(f"--ray {address}: no Ray cluster there that lets us in ({words}); {token}") from None


def reachable(address: str) -> bool:
    """Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return True  # "auto"
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=5):
        return True
    return False


def _package(name: str) -> Path:
    module = __import__(name)
    return Path(str(module.__file__)).parent


def machines() -> dict[str, Need]:
    """What each living machine of the cluster has in all, by its id."""
    import ray

    return {
        node["NodeID"]: Need(*(float(node["Resources"].get(name, 0)) for name in ("CPU", "GPU", "memory")))
        for node in ray.nodes()
        if node["Alive"]
    }


def look(folder: str, paths: list[str], name: str) -> dict[str, Any]:
    """Runs on a machine of the cluster: what it sees of the study, and what it has installed."""
    there = Path(folder)
    found: dict[str, Any] = {"sees": (there / "probe").is_file(), "writes": False, "python": platform.python_version()}
    if found["sees"]:
        with contextlib.suppress(OSError):
            (there / name).write_text(name)
            found["writes"] = True
    found["missing"] = [path for path in paths if not Path(path).exists()]
    for package in REQUIREMENTS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def check_machines(plan: Plan, store: Store) -> None:
    """UserError, naming the machine, unless every one of the cluster sees the study's folder and data and has what jobs import.

    Each has to read a file of ours there and to write one that we can read, in a task of its own.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = store.folder / "work" / f".probe-{os.getpid()}"
    probe.mkdir()
    try:
        (probe / "probe").touch()
        task, tasks = ray.remote(look), {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                options = task.options(num_cpus=0, max_retries=0, scheduling_strategy=where)
                tasks[options.remote(str(probe), _outside(plan), node["NodeID"])] = node
        ready, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER)
        for task_ in late:
            raise UserError(f"--ray: {_named(tasks[task_])} did not answer within {ANSWER:.0f} s")
        mine = look(str(probe), [], "driver")
        for task_ in ready:
            try:
                found = ray.get(task_)
            except Exception as error:  # Ray's many words for a worker that could not start
                if _dies(tasks[task_]["NodeID"]):
                    continue
                raise UserError(f"--ray: {_named(tasks[task_])} can't run anything: {str(error).split(chr(10))[0]}") from None
            _check(_named(tasks[task_]), found, mine, store.folder, probe / tasks[task_]["NodeID"])
    finally:
        shutil.rmtree(probe)


def _check(name: str, found: dict[str, Any], mine: dict[str, Any], folder: Path, wrote: Path) -> None:
    shared = "it has to lie on a file system that every machine of the cluster has at the same path (--out)"
    if not found["sees"]:
        raise UserError(f"--ray: {name} can't see {folder}; {shared}")
    if not (found["writes"] and _appears(wrote)):
        raise UserError(f"--ray: {name} can't write in {folder}; {shared}")
    if found["missing"]:
        raise UserError(f"--ray: {name} can't see {found['missing'][0]}, which the study reads")
    for package in ("python", *REQUIREMENTS):
        if found[package] != mine[package]:
            has = f"has {package} {found[package]}" if found[package] else f"has no {package}"
            raise UserError(f"--ray: {name} {has}, this machine {mine[package]}; give every machine the same environment")


def _dies(id: str) -> bool:
    """Whether a machine that did not answer is gone: Ray's head notices that some seconds late."""
    until = time.monotonic() + DEATH
    while id in machines():
        if time.monotonic() > until:
            return False
        time.sleep(1.0)
    return True


def _appears(file: Path, seconds: float = 10.0) -> bool:
    """A network file system may show another machine's file some seconds late."""
    until = time.monotonic() + seconds
    while file.name not in os.listdir(file.parent):  # noqa: PTH208 -- a look into the folder is what refreshes its entries
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _outside(plan: Plan) -> list[str]:
    """What the study reads from outside its folder: data sets and models in folders."""
    inputs = {path for node in plan.nodes.values() for path in node.inputs.values() if path not in plan.nodes}
    models = {str(node.config["model"]) for node in plan.nodes.values() if node.config.get("model")}
    return sorted(inputs | {model for model in models if Path(model).is_absolute()})


def _named(node: dict[str, Any]) -> str:
    return f"machine {node['NodeManagerHostname']} ({node['NodeManagerAddress']}, Ray's node {node['NodeID'][:8]})"


@contextlib.contextmanager
def head_watched(address: str | None, last_words: str) -> Iterator[None]:
    """Ends this process with exit code 1 when the head of a joined cluster, or a process of a Ray of our own, is gone.

    No call to Ray would return any more, or only after a minute and with words of Ray's.
    """
    lost, over = _head_lost() if address else _own_lost(), threading.Event()

    def look() -> None:
        if what := lost():
            print(f"{what}; {last_words}", file=sys.stderr, flush=True)
            os._exit(1)

    def watch() -> None:
        while not over.wait(2.0):
            look()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
        look()  # ray.shutdown would wait for what is gone, as it is after a SIGTERM to everything


def _head_lost() -> Callable[[], str]:
    """Says that the cluster's head has not answered for `HEAD_GONE` seconds; empty as long as it has."""
    import ray

    gcs, seen = str(ray.get_runtime_context().gcs_address), time.monotonic()

    def lost() -> str:
        nonlocal seen
        if reachable(gcs):
            seen = time.monotonic()
        return f"--ray: the cluster's head at {gcs} is gone" if time.monotonic() - seen > HEAD_GONE else ""

    return lost


def _own_lost() -> Callable[[], str]:
    """Says which process of the Ray that this process started has died; empty as long as none has."""
    parts = {part: part.name() for part in psutil.Process().children() if part.name() in ("gcs_server", "raylet")}

    def lost() -> str:
        dead = [name for part, name in parts.items() if _dead(part)]
        return f"Ray's {dead[0]} on this machine died (killed, or out of memory)" if dead else ""

    return lost


def _dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def check_room(plan: Plan, needs: Iterable[tuple[str, Need]], having: dict[str, Need]) -> None:
    """UserError when no machine has room for a stage: it would wait for ever. ``needs``: (a node's id, what it needs)."""
    for id, need in needs:
        if any(need.within(total).fits(total) for total in having.values()):
            continue
        node, most = plan.nodes[id], max(having.values())
        raise UserError(
            f"launch: {node.key} needs {need.cpus:g} CPUs and {need.gpus:g} GPUs ({node.processes} processes x {node.threads}"
            f" threads) of one machine; the largest has {most.cpus:g} and {most.gpus:g}. Several machines for one rung:"
            " slurm/README.md"
        )
