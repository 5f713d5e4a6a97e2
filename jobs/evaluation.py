"""The one evaluation loop of every paradigm: the same users, the same metric code, a per-user table of ranks."""

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.data.split import Split
from gr.errors import UserError
from gr.metrics import ranking_metrics, target_ranks
from jobs.runtime import Context

Rank = Callable[[list[NDArray[np.int32]]], NDArray[np.int32]]
LOG_SECONDS = 1.0


def evaluate(
    context: Context[Any],
    split: Split,
    which: Literal["val", "test"],
    users: int | None,
    batch: int,
    rank: Rank,
    stand_in: Callable[[int], int] = lambda item: item,
    observe: Callable[[NDArray[np.int64]], None] | None = None,
) -> None:
    """Ranks every user's items and writes hits.parquet and the metrics into the facts.

    ``rank(histories)``: (users, k) item numbers, best first, -1 where fewer than k. ``stand_in(item)``: the item that a hit
    on ``item`` is looked for as, where the ranking has one item for several. ``observe(targets)`` is called after each batch with
    its (users,) targets, for what else a job measures. Users are taken in order of the length of their history, so that a batch
    holds little padding.
    """
    began = logged = time.monotonic()
    rows = list(split.evaluation_users(which, limit=users))
    if not rows:
        raise UserError(f"{split.path}: no user has a {which} item under this protocol")
    rows.sort(key=lambda r: len(r.history))
    ranks = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ranked = rank([r.history for r in some])
        ranks.append(target_ranks(ranked, np.array([stand_in(r.target) for r in some])))
        if observe is not None:
            observe(np.array([r.target for r in some], dtype=np.int64))
        if time.monotonic() - logged > LOG_SECONDS:
            context.log(done=start + len(some), of=len(rows))
            logged = time.monotonic()
    seconds = time.monotonic() - began
    every = np.concatenate(ranks)
    table = pa.table(
        {
            "user": pa.array([r.user for r in rows], pa.int64()),
            "target": pa.array([r.target for r in rows], pa.int32()),
            "rank": pa.array(every, pa.int32()),
        }
    )
    pq.write_table(table.sort_by("user"), context.out / "hits.parquet")
    metrics = ranking_metrics(every)
    context.facts.update(
        metrics,
        evaluated_users=len(rows),
        eval_seconds=round(seconds, 3),
        users_per_second=len(rows) / seconds,
    )
