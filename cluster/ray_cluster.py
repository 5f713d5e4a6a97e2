"""Ray: one on this machine, for this run only, or a cluster that is there already (docs/ray.md)."""

import contextlib
import logging
import math
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from cluster.group import grace
from gr.errors import UserError

PACKAGES = ("cluster", "fit", "gr", "jobs")
"""The study's own code: it travels with the run. What it imports has to be there."""
TRAVELS, SECRET = re.compile("(GRSCALE|HF|TRANSFORMERS|TORCH|NCCL|GLOO)_"), re.compile("TOKEN|KEY|SECRET|PASSWORD")
"""Variables that go with the run; who can see the cluster's jobs can read them, so none with a secret."""
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
