"""Recall@k and NDCG@k of items, from the rank of each user's one target.

One metric code for every paradigm: a recommender returns a ranked list of items per user, `target_ranks` finds the target in it,
`ranking_metrics` averages over users. With one relevant item per user Recall@k is the hit rate at k and the ideal DCG is 1, so
NDCG@k = 1/log2(1 + rank) for a hit within k (Järvelin and Kekäläinen 2002, with binary gains).

A target is *cold* when the training part has at most `COLD_AT` interactions with it.
"""

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10, 20)
NDCG_AT = (5, 10, 20)
TOP_K = 20
COLD_AT = 5
COLD = ("recall@10", "ndcg@10")
"""What is reported of users with a cold target, as ``recall@10_cold`` and so on."""


def target_ranks(ranked: NDArray[np.integer], targets: NDArray[np.integer]) -> NDArray[np.int32]:
    """1-based rank of each user's target among the returned items, 0 where it was not returned.

    ``ranked``: (users, k) item numbers, best first, -1 where fewer than k were returned; ``targets``: (users,).
    An item returned twice would count its first place; a list with repeats is the caller's fault.
    """
    hit = ranked == targets[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0).astype(np.int32)


def ranking_metrics(ranks: NDArray[np.integer]) -> dict[str, float]:
    """Means over users of Recall@k and NDCG@k; ``ranks``: (users,) 1-based, 0 = not returned."""
    if ranks.size == 0:
        raise ValueError("no users to evaluate")
    found = ranks > 0
    metrics = {f"recall@{k}": float(np.mean(found & (ranks <= k))) for k in RECALL_AT}
    gain = np.zeros(ranks.shape)
    gain[found] = 1.0 / np.log2(1.0 + ranks[found])
    return metrics | {f"ndcg@{k}": float(np.mean(np.where(ranks <= k, gain, 0.0))) for k in NDCG_AT}


def within(metrics: Mapping[str, float], returned: int) -> dict[str, float]:
    """Of ``metrics`` (``recall@10``, ``ndcg@10_cold``, ...) those @k with k at most ``returned``, the length of the ranked lists,
    and what is not @k."""
    depths = {name: re.search(r"@(\d+)", name) for name in metrics}
    return {name: metrics[name] for name, k in depths.items() if k is None or int(k[1]) <= returned}


def cold_metrics(ranks: NDArray[np.integer], popularity: NDArray[np.integer]) -> dict[str, float]:
    """The metrics of `COLD` over the users with a cold target, and their number ``users_cold``; without one, the number alone.

    ``ranks``: (users,) as in `ranking_metrics`; ``popularity``: (users,) training interactions of each user's target.
    """
    cold = ranks[popularity <= COLD_AT]
    found: dict[str, float] = {"users_cold": cold.size}
    if cold.size:
        metrics = ranking_metrics(cold)
        found |= {f"{name}_cold": metrics[name] for name in COLD}
    return found
