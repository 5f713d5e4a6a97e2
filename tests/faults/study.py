"""A small real study that faults are injected into: run once, copied, cut back to the stage under attack, compared."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from cluster.graph import Node
from cluster.store import open_store
from jobs.artifact import read_manifest
from tests.conftest import ROOT

STUDY = """\
study: faults
seeds: [0]
datasets:
  world: {planted: {users: 300, items: 80, topics: 8, communities: 6, subtopics: 3, mean_length: 10}}
cf: [popularity]
sid:
  encoders:
    small: {fresh: {layers: 1, d_model: 16, heads: 2, d_ff: 32, vocab: 300, optimizer: {steps: 20, global_batch: 16, lr: 0.003}}}
  quantizers:
    rq: {method: rqvae, levels: 2, width: 8, hidden: [16], latent: 8, steps: 1500}
  train: {max_history: 8, optimizer: {steps: 150, global_batch: 64, lr: 0.01, validations: 3}}
  ladder:
    - {name: one, layers: 1, d_model: 16, heads: 2, d_kv: 8, d_ff: 32}
    - {name: two, layers: 1, d_model: 16, heads: 2, d_kv: 8, d_ff: 48, launch: {processes: 2}}
llm:
  pretrain: {vocab: 300, max_tokens: 128, optimizer: {steps: 20, global_batch: 16, lr: 0.003}}
  train:
    lora: {rank: 4}
    max_history: 4
    max_tokens: 96
    optimizer: {steps: 100, global_batch: 16, lr: 0.005, validations: 2}
  ladder:
    - {name: llm, layers: 1, d_model: 32, heads: 2, d_ff: 64}
"""
MEASURED_ANEW = {"train_seconds", "eval_seconds", "users_per_second", "peak_memory_bytes", "started", "host"}
"""Columns of the metrics table that tell of the run, and not of its result."""
MARK = "GRSCALE_FAULTS_CELL"
EARLY = ("encode", "quantize")
PATIENCE = 400.0
"""Seconds that a driver may take; then it hangs."""


class Study:
    """A study's folder, its driver, and every process that came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "study"
        self.log = folder / "driver.txt"
        self.env: dict[str, str] = {}
        """For the drivers that are started, beside the environment of this process."""
        self.options: list[str] = []
        self.joined = False
        """Whether it runs on a Ray cluster that is not its own."""

    def start(self, *options: str, out: Path | None = None) -> "subprocess.Popen[bytes]":
        """`grscale run`, its output appended to ``log``; all its offspring inherit the mark by which `processes` finds them."""
        file = self.folder / "study.yaml"
        file.write_text(STUDY)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_", "GRSCALE_"))}
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", MARK: str(self.out)} | self.env
        words = [sys.executable, "-m", "cluster.cli", "run", str(file), "--out", str(out or self.out), *self.options, *options]
        with self.log.open("ab") as log:
            return subprocess.Popen(words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def processes(self) -> list[psutil.Process]:
        """Living processes of this study: those that inherited its mark, and on a joined cluster those that name its folder.

        A worker without work belongs to its raylet: one that lost its cluster's head ends itself, and them, a minute later.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                idle = self.joined and words[:1] and words[0].strip() == "ray::IDLE"
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid() or idle:
                    continue
                named = any(word.startswith(f"{self.out}/") or word == str(self.out) for word in words)
                if named or process.environ().get(MARK) == str(self.out):
                    found.append(process)
        return found

    def node(self, stage: str, rung: str) -> Node:
        """The stage that the point of ``rung`` stands on."""
        _, plan = open_store(self.out)
        point = next(point for point in plan.points if point.model == rung)
        return next(node for node in plan.upstream(point) if node.stage == stage)

    def work(self, node: Node) -> Path:
        return self.out / "work" / node.key

    def artifact(self, node: Node) -> Path:
        return self.out / "artifacts" / node.stage / node.id

    def cut_back(self, node: Node) -> None:
        """Forgets the stage and all that stands on it; of an early one the stage alone.

        The ids of what stands on that do not change, and `files` tells whether it is made again bit for bit.
        """
        store, plan = open_store(self.out)
        gone = {node.id}
        for other in plan.nodes.values() if node.stage not in EARLY else ():  # inputs come before those that need them
            if gone.intersection(other.inputs.values()):
                gone.add(other.id)
        for id in gone:
            shutil.rmtree(store.artifact(plan.nodes[id]))
            shutil.rmtree(store.work(plan.nodes[id]))
        for point in plan.points:
            if gone.intersection(n.id for n in plan.upstream(point)):
                store.row(point).unlink()
        shutil.rmtree(self.out / "report")

    def files(self, node: Node) -> dict[str, str]:
        """The checksums of the stage's artifact."""
        manifest = read_manifest(self.artifact(node))
        return dict(manifest["files"]) if manifest else {}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The metrics table without what every run measures anew, by the point's id."""
        rows = [pq.read_table(file).to_pylist()[0] for file in sorted((self.out / "metrics").glob("*.parquet"))]
        return {row["run_id"]: {k: v for k, v in row.items() if k not in MEASURED_ANEW} for row in rows}

    def said(self, node: Node | None = None) -> str:
        """The drivers' output, or a stage's log with its failure."""
        files = [self.log] if node is None else [self.work(node) / "log.txt", self.work(node) / "failure.json"]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())


def copy_of(base: Study, folder: Path) -> Study:
    """A copy of a study that is finished."""
    study = Study(folder)
    study.options = base.options
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(base.out, study.out, dirs_exist_ok=True)
    return study


def wait(
    what: str, happened: Callable[[], Any], driver: "subprocess.Popen[bytes] | None" = None, seconds: float = PATIENCE
) -> Any:
    """What ``happened`` returns once that is true; AssertionError after ``seconds``, or when the driver ended before."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        assert driver is None or driver.poll() is None, f"the driver ended with {driver.returncode} before: {what}"
        time.sleep(0.02)
    return found


def kill_all(study: Study) -> None:
    for process in study.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
