"""What scheduling adds to a point: seconds from the end of one trial to the first line of the next one's job, on one slot, beyond
what the same `python -m <package>.<stage> run.yaml` costs when a person types it. Expected: under 3 s.

    .venv/bin/python tests/benchmarks/schedule_overhead.py [POINTS]
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from cluster import run as runs
from cluster.study import load_study
from jobs.config import STAGES

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import os, time
from jobs.runtime import main

def say(word):
    with open(os.environ["BENCHMARK"], "a") as file:
        file.write(f"{word} {time.time()}\\n")

def body(context):
    say(context.run.stage)
    context.facts.update({"users": 1, "interactions": 1, "recall@10": 0.0})
    (context.out / "result").write_text("")
    say("end")

if __name__ == "__main__":
    main("STAGE", body)
"""
STUDY = """
study: overhead
seeds: SEEDS
datasets: {world: {planted: {users: 50, items: 40, topics: 3, communities: 3, subtopics: 3}}}
cf: []
sid:
  encoders: {hub: {model: some/encoder}}
  quantizers: {rk: {levels: 2, width: 4}}
  train: {optimizer: {steps: 4, global_batch: 8, lr: 0.01}}
  ladder:
    - {name: xs, layers: 1, d_model: 16, heads: 1, d_kv: 16, d_ff: 32}
    - {name: s, layers: 1, d_model: 32, heads: 2, d_kv: 16, d_ff: 64}
"""


def typed(folder: Path, times: Path) -> float:
    """Seconds from typing a job's command to its first line, and from its last line to its end: the median of five."""
    folder.mkdir()
    took = []
    for i in range(5):
        run = {"stage": "train_sid", "id": f"t{i}", "out": f"typed{i}", "work": "work", "inputs": {}, "launch": {}}
        config = {"size": {"layers": 1, "d_model": 8, "heads": 1, "d_kv": 8, "d_ff": 8}, "seed": 0}
        config["optimizer"] = {"steps": 4, "global_batch": 8, "lr": 0.1}
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump({**run, "config": config}))
        times.write_text("")
        began = time.time()
        subprocess.run([sys.executable, "-m", "timedjobs.train_sid", str(path)], check=True)
        whole = time.time() - began
        first, last = (float(line.split()[1]) for line in times.read_text().splitlines())
        took.append(whole - (last - first))
    return statistics.median(took)


def main(points: int) -> None:
    with tempfile.TemporaryDirectory(prefix="gr") as name:
        folder = Path(name)
        package = folder / "path" / "timedjobs"
        package.mkdir(parents=True)
        for stage in STAGES:
            (package / f"{stage}.py").write_text(JOB.replace("STAGE", stage))
        times = folder / "times.txt"
        os.environ.update(BENCHMARK=str(times), PYTHONPATH=f"{package.parent}:{ROOT}")
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one slot: trials follow each other
        hand = typed(folder / "before", times)
        times.write_text("")
        study = folder / "study.yaml"
        study.write_text(STUDY.replace("SEEDS", str(list(range(points // 2)))))
        runs._report = lambda *_: None  # type: ignore[assignment]
        began = time.time()
        assert runs.run_study(load_study(study), folder / "out", module="timedjobs") == 0
        rows = [(word, float(at)) for word, at in map(str.split, times.read_text().splitlines())]
        hand = (hand + typed(folder / "after", times)) / 2  # the machine may have become busier
    gaps = [at - rows[i - 1][1] - hand for i, (word, at) in enumerate(rows) if word == "train_sid"]
    print(f"typed by hand: {hand:.2f} s until the first line and after the last one")
    print(f"Ray, until the first job's first line: {rows[0][1] - began - hand:.2f} s")
    print(f"added per trial ({len(gaps)}): median {statistics.median(gaps):.2f} s, largest {max(gaps):.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
