"""Three recommenders without a gradient, the floors of every table: popularity, item-kNN and a co-occurrence (Markov) table.

All count on the training part only (`items[:n_train]`, read a shard at a time) and rank the full catalogue, the items of the
history among them: the generative paradigms exclude nothing, so no floor does.

- ``popularity``: how often an item was interacted with.
- ``item-knn``: cosine of two items' sets of users (Sarwar et al. 2001; Deshpande and Karypis 2004), each item keeping its
  `NEIGHBOURS` nearest others; a candidate's score is the sum over the set of items in the history.
- ``markov``: counts of "b came d places after a" for d = 1..`MAX_DISTANCE`, each worth 1/d; a candidate's score is the sum over
  the last `MAX_DISTANCE` items of the history, the r-th from the end (r = 1, 2, ...) worth 1/r.

Ties, unseen histories and places left over go by popularity, and items of the same popularity by a fixed random order: the
catalogue's own order often tells something (numbers given in order of first appearance), so it may not decide. Scores are
compared in single precision.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray

from gr.data.split import Split, training_part
from gr.errors import UserError

Method = Literal["popularity", "item-knn", "markov"]
METHODS: tuple[str, ...] = get_args(Method)
NEIGHBOURS = 100  # accuracy is flat from about 50 to 200 neighbours in the literature; the table stays linear in the catalogue
MAX_DISTANCE = 3
TIE_SEED = 0
SCORE_CELLS = 8_000_000  # users ranked at once = this / items: 64 MB of keys


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline. ``weights[a, b]`` is what item a of a history adds to candidate b (None: nothing does)."""

    method: str
    popularity: NDArray[np.int64]  # (items,) training interactions
    weights: sp.csr_array | None  # (items, items), no negative entry
    seed: int = TIE_SEED

    @property
    def n_cf(self) -> int:
        """Stored numbers: the popularity counts and the table's non-zero entries (their column indices not counted)."""
        return int(self.popularity.size + (self.weights.nnz if self.weights is not None else 0))

    def rank(self, histories: Sequence[NDArray[np.integer]], top_k: int) -> NDArray[np.int32]:
        """(users, top_k) items, best first, -1 past the end of a smaller catalogue; histories oldest first, perhaps empty."""
        n_items = self.popularity.size
        k = min(top_k, n_items)
        ranked = np.full((len(histories), top_k), -1, dtype=np.int32)
        # Position 0 is the item that loses every tie, so that the greatest key wins.
        tie_order = np.lexsort((np.random.default_rng(self.seed).permutation(n_items), self.popularity))
        if self.weights is None:
            ranked[:, :k] = tie_order[::-1][:k]
            return ranked
        table = self.weights[:, tie_order]
        step = max(1, SCORE_CELLS // n_items)
        for start in range(0, len(histories), step):
            batch = histories[start : start + step]
            scores = (_profiles(self.method, batch, n_items) @ table).toarray()
            ranked[start : start + step, :k] = tie_order[_best(scores, k)]
        return ranked


def fit_baseline(method: str, split: Split) -> Baseline:
    """Counts the training part of ``split``, one shard in memory; UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"baseline: method {method!r}; one of {', '.join(METHODS)}")
    return count_baseline(method, split.users(["items", "n_train"]), split.n_items)


def count_baseline(method: str, shards: Iterable[pa.Table], n_items: int) -> Baseline:
    """The same from tables with the columns ``items`` (lists) and ``n_train``; sums over shards, whatever their order."""
    popularity = np.zeros(n_items, dtype=np.int64)
    counts = sp.csr_array((n_items, n_items))
    count: dict[str, Callable[..., sp.csr_array]] = {"item-knn": _shared_users, "markov": _followers}
    for shard in shards:
        user, item = training_part(shard)
        popularity += np.bincount(item, minlength=n_items)
        if method in count:
            counts = counts + count[method](user, item, n_items)
    if method == "popularity":
        return Baseline(method, popularity, None)
    return Baseline(method, popularity, _cosine_neighbours(counts) if method == "item-knn" else counts.astype(np.float32))


def _followers(user: NDArray[np.int64], item: NDArray[np.int64], n_items: int) -> sp.csr_array:
    """[a, b]: sum over d of (times b came d places after a) / d."""
    total = sp.csr_array((n_items, n_items))
    for d in range(1, MAX_DISTANCE + 1):
        same = user[d:] == user[:-d]
        pairs = (item[:-d][same], item[d:][same])
        total = total + sp.coo_array((np.full(pairs[0].size, 1 / d), pairs), shape=total.shape).tocsr()
    return total


def _shared_users(user: NDArray[np.int64], item: NDArray[np.int64], n_items: int) -> sp.csr_array:
    """[a, b]: number of users who have both; the diagonal: who have a."""
    n_users = int(user.max()) + 1 if user.size else 0
    seen = sp.coo_array((np.ones(user.size), (user, item)), shape=(n_users, n_items)).tocsr()
    seen.data[:] = 1.0  # an item that a user has twice is one item of the set
    return sp.csr_array(seen.T @ seen)


def _cosine_neighbours(shared: sp.csr_array) -> sp.csr_array:
    """shared / sqrt(users_a · users_b), without the diagonal, each row's `NEIGHBOURS` largest.

    Rows are the history's items. Equal similarities at the cut are kept by a fixed random order, like all ties.
    """
    users = shared.diagonal()
    pairs = shared.tocoo()
    a, b = pairs.coords
    other = a != b
    a, b, similarity = a[other], b[other], pairs.data[other] / np.sqrt(users[a[other]] * users[b[other]])
    order = np.lexsort((np.random.default_rng(TIE_SEED).permutation(shared.shape[0])[b], -similarity, a))
    a, b, similarity = a[order], b[order], similarity[order]
    kept = np.arange(a.size) - np.searchsorted(a, a) < NEIGHBOURS
    return sp.coo_array((similarity[kept].astype(np.float32), (a[kept], b[kept])), shape=shared.shape).tocsr()


def _profiles(method: str, histories: Sequence[NDArray[np.integer]], n_items: int) -> sp.csr_array:
    """(users, items): the weight of each history item; 1 for each in the set (item-knn), recency over the last few (markov)."""
    rows = [np.unique(h) if method == "item-knn" else np.asarray(h)[-MAX_DISTANCE:][::-1] for h in histories]
    lengths = np.array([r.size for r in rows], dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([*rows, np.empty(0, dtype=np.int64)]).astype(np.int64)
    place = np.arange(columns.size) - np.repeat(indptr[:-1], lengths)
    values = np.ones(columns.size) if method == "item-knn" else 1.0 / (1 + place)
    profiles = sp.csr_array((values, columns, indptr), shape=(len(histories), n_items))
    profiles.sum_duplicates()
    return profiles


def _best(scores: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """(rows, k) columns of the largest scores, best first; of equal scores the later column first.

    The bits of non-negative single-precision floats order like integers, so score and column make one integer key without ties.
    """
    bits = np.ascontiguousarray(scores, dtype=np.float32).view(np.uint32).astype(np.int64)
    keys = (bits << 31) | np.arange(scores.shape[1])
    top = np.argpartition(keys, scores.shape[1] - k, axis=1)[:, -k:]
    order = np.argsort(-np.take_along_axis(keys, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)
