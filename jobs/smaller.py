"""Out of memory: every process of the run starts again from the last checkpoint with micro-batches half as large.

A process that ran out of memory stands in the middle of a step, and the others wait for it in a collective that it will never
join; so no agreement can be had inside that process group. It writes the new accumulation into `work/accumulation.json` and
executes itself anew; the others see the file (`jobs.watch`) and do the same. They meet in the launcher's store under a prefix.
The global batch stays the same: its parts are summed in smaller portions.
"""

import logging
import os
import shutil
import sys
from typing import Any, NoReturn

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, TCPStore  # exported by torch.distributed, but not for mypy

from gr.files import read_json, write_json
from jobs.config import DIVISIBLE
from jobs.runtime import Context, RunFailed

FILE = "accumulation.json"
WORDS = ("can't allocate memory", "not enough memory", "out of memory")
logger = logging.getLogger(__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed: on a GPU, or of torch or Python in main memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def accumulation(context: Context[Any]) -> int:
    """How many times smaller the micro-batches are: what `launch` says, or more where that did not fit."""
    file = context.work / FILE
    found = int(read_json(file)["accumulation"]) if file.is_file() else 1
    return max(context.run.launch.accumulation, found)


def halve(context: Context[Any], now: int, rows: int, error: BaseException) -> NoReturn:
    """Asks for micro-batches half as large and starts this process again.

    RunFailed where a micro-batch has but one row already, or none can be cut. ``rows``: of the largest with accumulation ``now``.
    """
    words = str(error).split(". Error code")[0].split("\n")[0]
    if context.run.stage not in DIVISIBLE:
        raise RunFailed(f"out of memory ({words}); a batch of {context.run.stage} can't be cut: give it more memory")
    if rows <= 1:
        raise RunFailed(f"out of memory with one row in a micro-batch ({words}); give it more memory, or launch.zero: 3")
    write_json(context.work / FILE, {"accumulation": 2 * now, "reason": words})
    logger.warning("out of memory (%s): starting again with accumulation %d", words, 2 * now)
    restart(context)


def restart(context: Context[Any]) -> NoReturn:
    """Executes this process's own command again, with the same process id, so that its launcher goes on waiting for it."""
    if context.is_main:
        shutil.rmtree(context.out, ignore_errors=True)  # the folder aside: its writer's id stays alive, so nobody would sweep it
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def rejoin(backend: str, accumulation: int) -> None:
    """After a `restart`, joins the process group under a name of its own: the launcher's store still has the first one's keys."""
    before = os.environ.get("GRSCALE_ACCUMULATION")
    os.environ["GRSCALE_ACCUMULATION"] = str(accumulation)  # kept by execv
    if before in (None, str(accumulation)) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        backend,
        store=PrefixStore(f"accumulation-{accumulation}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
