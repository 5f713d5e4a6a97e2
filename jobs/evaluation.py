"""The one evaluation of every paradigm: the same users, the same metric code, a per-user table of ranks.

Users are streamed in chunks that processes share and that a run which is started again finds done (`jobs.chunks`).
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.data.split import EvaluationUser, Split
from gr.errors import UserError
from gr.files import whole_file
from gr.metrics import TOP_K, cold_metrics, ranking_metrics, target_ranks, within
from jobs.chunks import chunk_folder
from jobs.runtime import Context

CHUNK = 4
"""Batches in a chunk: what a killed process does again at most. In it users are taken in order of the length of their history, so
that a batch holds little padding."""
LOG_SECONDS = 1.0
NUMBERS = b"grscale"
"""Key of a chunk's own numbers in the metadata of its file."""
logger = logging.getLogger(__name__)


class Ranked(NamedTuple):
    """``items``: (users, k), best first, -1 where fewer than k; ``flops`` spent on all of them; ``missing``: beams that found
    nothing."""

    items: NDArray[np.int32]
    flops: float = 0.0
    missing: int = 0


Rank = Callable[[list[EvaluationUser]], Ranked]
Observe = Callable[[NDArray[np.int64]], dict[str, NDArray[np.int32]]]


class Evaluated(NamedTuple):
    """``table``: user, target, rank and what was observed of each user, by user; ``flops`` and ``missing`` over all users."""

    table: pa.Table
    flops: float
    missing: int


def evaluate(
    context: Context[Any],
    split: Split,
    which: Literal["val", "test"],
    users: int | None,
    batch: int,
    rank: Rank,
    stand_in: Callable[[int], int] = lambda item: item,
    observe: Observe | None = None,
    returned: int = TOP_K,
) -> Evaluated | None:
    """Ranks every user's items and writes hits.parquet and the metrics into the facts; None on all processes but the first.

    ``stand_in(item)``: the item that a hit on ``item`` is looked for as, where the ranking has one item for several.
    ``observe(targets)`` is called after each batch with its (users,) targets, for more numbers per user. ``returned``: the
    length of a ranking; metrics that look deeper are left out.
    """
    total = split.counts[f"{which}_users"]
    total = total if users is None else min(users, total)
    if not total:
        raise UserError(f"{split.path}: no user has a {which} item under this protocol")
    processes = context.run.launch.processes
    folder = chunk_folder(context)
    files = [folder / f"{number:06d}.parquet" for number in range(-(-total // (CHUNK * batch)))]
    tables = [_read(file) for file in files]
    old = [table.num_rows for table in tables if table is not None and _numbers(table)["written"] < context.started]
    if resumed := sum(old):  # without what another process of this run has done already
        context.log(event="resumed", done=resumed, of=total)
    log = _Progress(context, files, CHUNK * batch, total)
    for number, rows in enumerate(_chunks(split.evaluation_users(which, limit=users), CHUNK * batch)):
        if number % processes == context.rank and tables[number] is None:
            if files[number].is_file():
                logger.warning("%s: damaged; its users are evaluated again", files[number])
            tables[number] = _saved(_ranked(rows, batch, rank, stand_in, observe, log), files[number], context.rank)
    if not context.is_main:
        return None
    tables = [_waited_for(file) if table is None else table for file, table in zip(files, tables, strict=True)]
    numbers = [_numbers(table) for table in tables]
    table = pa.concat_tables(tables).replace_schema_metadata(None).sort_by("user")
    pq.write_table(table.select(["user", "target", "rank"]), context.out / "hits.parquet")
    busy = [sum(n["seconds"] for n in numbers if n["process"] == process) for process in {n["process"] for n in numbers}]
    flops = sum(n["flops"] for n in numbers)
    ranks = table["rank"].to_numpy()
    cold = cold_metrics(ranks, split.popularity[table["target"].to_numpy()])
    context.facts.update(
        within(ranking_metrics(ranks) | cold, returned),
        evaluated_users=total,
        resumed_users=resumed,
        eval_seconds=round(max(busy), 3),
        users_per_second=total / max(busy),
    )
    if flops:
        context.facts["infer_flops_per_user"] = flops / total
    return Evaluated(table, flops, sum(n["missing"] for n in numbers))


def device() -> str:
    """This process's own GPU, or the CPU."""
    import torch  # here, for the baselines do without

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _chunks(users: Iterator[EvaluationUser], size: int) -> Iterator[list[EvaluationUser]]:
    while rows := list(islice(users, size)):
        yield sorted(rows, key=lambda r: len(r.history))


def _ranked(
    rows: list[EvaluationUser],
    batch: int,
    rank: Rank,
    stand_in: Callable[[int], int],
    observe: Observe | None,
    log: "_Progress",
) -> pa.Table:
    """A chunk's table; its metadata has the seconds, the FLOPs and the beams that found nothing."""
    began = time.monotonic()
    parts: list[dict[str, NDArray[Any]]] = []
    flops, missing = 0.0, 0
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ranked = rank(some)
        flops, missing = flops + ranked.flops, missing + ranked.missing
        targets = np.array([r.target for r in some], dtype=np.int64)
        found = target_ranks(ranked.items, np.array([stand_in(r.target) for r in some]))
        users = np.array([r.user for r in some], dtype=np.int64)
        own: dict[str, NDArray[Any]] = {"user": users, "target": targets.astype(np.int32), "rank": found.astype(np.int32)}
        parts.append(own | (observe(targets) if observe is not None else {}))
        log(start + len(some))
    table = pa.table({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    numbers = {"seconds": time.monotonic() - began, "flops": flops, "missing": missing}
    return table.replace_schema_metadata({NUMBERS: json.dumps(numbers)})


class _Progress:
    """Logs, every `LOG_SECONDS`, how many users all processes have done."""

    def __init__(self, context: Context[Any], files: list[Path], size: int, total: int) -> None:
        self.context, self.files, self.size, self.total = context, files, size, total
        self.logged = time.monotonic()

    def __call__(self, in_chunk: int) -> None:
        if self.context.is_main and time.monotonic() - self.logged > LOG_SECONDS:
            finished = sum(file.is_file() for file in self.files)
            self.context.log(done=min(self.total, finished * self.size + in_chunk), of=self.total)
            self.logged = time.monotonic()


def _saved(table: pa.Table, file: Path, process: int) -> pa.Table:
    """``table`` as `_read` finds it at ``file``."""
    numbers = _numbers(table) | {"process": process, "written": time.time()}
    table = table.replace_schema_metadata({NUMBERS: json.dumps(numbers)})
    with whole_file(file) as aside:
        pq.write_table(table, aside, write_page_checksum=True)
    return table


def _numbers(table: pa.Table) -> dict[str, Any]:
    """A chunk's own: the ``process`` that did it, its ``seconds``, ``flops``, ``missing`` beams, and when ``written``."""
    found: dict[str, Any] = json.loads(table.schema.metadata[NUMBERS])
    return found


def _read(file: Path) -> pa.Table | None:
    """A chunk's table; None where there is none, or it is damaged and has to be done again."""
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        return table if "written" in _numbers(table) else None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def _waited_for(file: Path) -> pa.Table:
    """The table that another process of this run writes at ``file``."""
    while (table := _read(file)) is None:
        time.sleep(0.1)
    return table
