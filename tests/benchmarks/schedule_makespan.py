"""How well a finished run filled its machine: makespan / max(work / cores, longest trial), which no order can beat.

    .venv/bin/python tests/benchmarks/schedule_makespan.py [DIR] [--slots N]   (default: runs/builtin, this machine's cores)

Times are those of the last run that did the work: from the line that a job's log begins with to its artifact's manifest.
"""

import argparse
import time
from pathlib import Path

from cluster.run import slots
from cluster.schedule import need
from cluster.store import open_store
from jobs.artifact import MANIFEST


def began(log: Path) -> float:
    """When the last try began: the line ``--- 2026-01-31 12:00:00 on HOST``."""
    line = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("--- ")][-1]
    return time.mktime(time.strptime(line[4:23], "%Y-%m-%d %H:%M:%S"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/builtin"))
    parser.add_argument("--slots", type=int, default=slots())
    args = parser.parse_args()
    store, plan = open_store(args.folder)
    spans = {
        node.id: (began(store.work(node) / "log.txt"), (store.artifact(node) / MANIFEST).stat().st_mtime)
        for node in plan.nodes.values()
        if store.done(node)
    }
    took = {node: end - start for node, (start, end) in spans.items()}
    work = sum(seconds * need(plan, plan.nodes[node]).cpus for node, seconds in took.items())
    longest = max(sum(took.get(node, 0.0) for node in chain.nodes) for chain in plan.chains())
    makespan = max(end for _, end in spans.values()) - min(start for start, _ in spans.values())
    bound = max(work / args.slots, longest)
    print(f"{args.folder}: {len(spans)} stages, {len(plan.points)} points on {args.slots} cores")
    print(f"makespan {makespan:.0f} s, work / cores {work / args.slots:.0f} s, longest trial {longest:.0f} s")
    print(f"makespan / bound: {makespan / bound:.3f}")


if __name__ == "__main__":
    main()
