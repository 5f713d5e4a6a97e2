"""What the sbatch files of `slurm/` call inside an allocation: ``python -m cluster.allocation wait|task``."""

import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from cluster.graph import Node, Plan
from cluster.group import Group
from cluster.store import Store, kill_group, open_store
from gr.errors import UserError

UP = 300.0
"""Seconds within which the nodes of a Ray cluster have to join it."""
STOPPED = 128 + signal.SIGTERM


def wait(address: str, nodes: int, starter: int) -> int:
    """Returns 0 once a Ray cluster at ``address`` (host:port) has that many nodes; 1 if that takes over `UP` seconds, or process
    ``starter``, which starts the nodes, has ended."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + UP
    found = 0
    while time.monotonic() < deadline and psutil.pid_exists(starter):
        if _listens(host, int(port)):  # asked too early, Ray itself waits for a minute
            found = _count(address)
        if found >= nodes:
            return 0
        time.sleep(1)
    print(f"{found} of {nodes} nodes joined the Ray cluster at {address}", file=sys.stderr)
    return 1


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def _count(address: str) -> int:
    """The nodes of a Ray cluster; 0 while it is not ready for an answer."""
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        return sum(bool(node["Alive"]) for node in ray.nodes())
    except (ConnectionError, RuntimeError, ValueError):
        return 0
    finally:
        ray.shutdown()


def shared_nodes(plan: Plan) -> list[Node]:
    """The stages that several points stand on, in the order in which they can run."""
    users = plan.points_of()
    return [node for node in plan.nodes.values() if len(users[node.id]) > 1]


def task_nodes(plan: Plan, task: int) -> list[Node]:
    """The stages of one task of the array: of task 0 the shared ones, of task i the i-th point's own, its other widths last."""
    shared = shared_nodes(plan)
    if task == 0:
        return shared
    point = plan.points[task - 1]
    own = [*plan.upstream(point), *(plan.nodes[id] for id in point.widths)]
    return [node for node in own if node not in shared]


def task(folder: Path, number: int, module: str = "jobs") -> int:
    """Runs what is missing of one task; 0 done, 1 a stage failed (its log says why), 143 stopped."""
    store, plan = open_store(folder)
    stop = {"asked": False}

    def ask(*_: Any) -> None:
        stop["asked"] = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ask)
    with (store.folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: with the other tasks, not with a `grscale run`
        except BlockingIOError:
            raise UserError(f"{store.folder}: a `grscale run` works here; wait for it or stop it") from None
        for node in task_nodes(plan, number):
            if store.done(node):
                continue
            if stop["asked"]:
                return STOPPED
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {node.key}", flush=True)
            reason = _run(store, plan, node, module, stop)
            if reason is not None:
                if stop["asked"]:
                    return STOPPED
                print(f"failed: {node.key}: {reason}\n        log: {store.work(node) / 'log.txt'}", file=sys.stderr)
                return 1
    return 0


def _run(store: Store, plan: Plan, node: Node, module: str, stop: dict[str, bool]) -> str | None:
    """Runs one stage as its own process group; why it failed, or None. It gets SIGTERM once when the task is asked to stop: a job
    that trains saves then. How long it may take is Slurm's to say."""
    group = Group(store.write_run(node, plan), module, node.gpus)
    asked = False
    while group.process.poll() is None:
        if stop["asked"] and not asked:
            kill_group(group.process.pid, signal.SIGTERM)
            asked = True
        time.sleep(0.1)
    reason = group.reason()
    if asked:
        (group.work / "failure.json").unlink(missing_ok=True)  # it was stopped, and did not fail
    return reason


def main() -> int:
    words = sys.argv[1:]
    if len(words) == 4 and words[0] == "wait":
        return wait(words[1], int(words[2]), int(words[3]))
    if len(words) == 3 and words[0] == "task":
        return task(Path(words[1]), int(words[2]))
    raise UserError("usage: python -m cluster.allocation wait HOST:PORT NODES PID | task DIR NUMBER")


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        sys.exit(main())
    except UserError as error:
        print(f"grscale: {error}", file=sys.stderr)
        sys.exit(2)
