"""One job's process group: how it is started, why it ended, and its end. No Ray here: the tasks of a Slurm array use it too."""

import contextlib
import os
import platform
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.store import kill_group
from gr.errors import UserError
from gr.files import write_json
from jobs.artifact import read_manifest
from jobs.launcher import command, environment
from jobs.lifeline import die_with_parent

GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: time for one checkpoint. GRSCALE_GRACE_SECONDS sets another number."""


def grace() -> float:
    """Seconds between SIGTERM and SIGKILL; UserError where GRSCALE_GRACE_SECONDS is no number of seconds."""
    text = os.environ.get("GRSCALE_GRACE_SECONDS", "").strip() or str(GRACE)
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < float("inf"):
            return seconds
    raise UserError(f"GRSCALE_GRACE_SECONDS is {text!r}; give a number of seconds, at least 0")


class Group:
    """One job's process group, its log and its end."""

    def __init__(self, path: Path, module: str, gpus: int) -> None:
        self.run: dict[str, Any] = yaml.safe_load(path.read_text())
        self.work = path.parent
        (self.work / "failure.json").unlink(missing_ok=True)
        with (self.work / "log.txt").open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command(self.run, module, path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.run, gpus),
                start_new_session=True,
                preexec_fn=die_with_parent,  # also of SIGKILL, and before the job can set this for itself
            )
        write_json(self.work / "process.json", {"pid": self.process.pid, "host": platform.node(), "started": time.time()})

    def reason(self) -> str | None:
        """None when the finished process did its work, else why not; a process that said nothing gets its failure.json here."""
        code = self.process.wait()
        (self.work / "process.json").unlink(missing_ok=True)
        finished = read_manifest(self.work / self.run["out"]) is not None
        if code == 0 and finished:
            return None
        file = self.work / "failure.json"
        if not file.is_file():
            if code < 0:
                reason = f"killed by signal {-code} ({signal.Signals(-code).name})"
            elif code == 0:
                reason = "exited with code 0 and left no artifact"
            else:
                reason = f"exited with code {code}: {last_words(self.work / 'log.txt')}"
            write_json(file, {"reason": reason})
        return str(yaml.safe_load(file.read_text())["reason"])

    def stop(self) -> None:
        """SIGTERM to the whole group, then SIGKILL to what is left of it."""
        kill_group(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace())
        kill_group(self.process.pid, signal.SIGKILL)
        self.process.wait()
        (self.work / "process.json").unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """What a program said last before it died: its last line that begins with ``error:``, else the last one with words in it.

    torch's launcher ends its own report with a rule, and a table of ranks before that.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").split("\n--- ")[-1].split("\n")]
    said = [line for line in lines if any(c.isalpha() for c in line)]
    errors = [line.removeprefix("error:").strip() for line in said if line.startswith("error:")]
    return (errors or said or ["it said nothing"])[-1]
