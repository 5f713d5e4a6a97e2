"""From what the files say to time-ordered sequences: every repair is counted.

The rules, in order:

- Exact duplicates (user, item, time) are removed, the first row stays. The same item at another time is a real repeat and stays;
  so does an item with unknown times, which nothing shows to be the same event.
- A user's rows are sorted by time, stably: rows of one time keep the file's order, or a random one where that is asked for
  (an order that the times do not tell may tell a recommender more than they do). Where one of a user's times is unknown, the
  file's order stands, since it is all that is known.
- Users with too few items are dropped; then the k-core.
- Texts are stripped, HTML-unescaped, and their white space collapsed.

A published benchmark's order is thus kept except where its own timestamps contradict it: Amazon Beauty (5-core, 22,363 users)
changes for 6 users. Sorting those keeps "oldest first" true for every user, which the temporal split relies on; 6 of 22,363
targets cannot move a reported metric by more than 0.0003.
"""

import html
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gr.data.dataset import Item
from gr.data.readers import UNKNOWN_TIME, Source
from gr.errors import UserError

LATEST_TIME = 10**11  # the year 5138 in seconds, and 1973 in milliseconds


@dataclass
class Sequences:
    """Clean data: user u's items are ``codes[offsets[u]:offsets[u + 1]]``, oldest first, their ``times`` beside them.

    ``offsets``: (users + 1,); ``codes``, ``times``: (interactions,).
    """

    items: list[Item]
    user_keys: list[str]
    offsets: NDArray[np.int64]
    codes: NDArray[np.int32]
    times: NDArray[np.int64]
    repairs: dict[str, int]


@dataclass
class _Columns:
    users: NDArray[np.int32]
    codes: NDArray[np.int32]
    times: NDArray[np.int64]

    def __getitem__(self, rows: NDArray[np.generic]) -> "_Columns":
        return _Columns(self.users[rows], self.codes[rows], self.times[rows])

    def __len__(self) -> int:
        return len(self.users)


def clean(source: Source, *, k_core: int = 0, min_user_items: int = 3, shuffle_ties: int | None = None) -> Sequences:
    """Applies the module's rules; with ``k_core`` > 0 the catalogue, too, keeps only what is in the k-core; ``shuffle_ties``: the
    seed of a random order among rows of one user and time."""
    if k_core < 0 or min_user_items < 1:
        raise UserError(f"k-core must be at least 0 and min-user-items at least 1, found {k_core} and {min_user_items}")
    if shuffle_ties is not None and shuffle_ties < 0:
        raise UserError(f"the seed of shuffle-ties must be at least 0, found {shuffle_ties}")
    rows = _Columns(source.users, source.codes, source.times)
    if not len(rows):
        raise UserError("no interactions in the input")
    if int(rows.times.max()) > LATEST_TIME:
        raise UserError(
            f"timestamp {int(rows.times.max())} is past the year 5138: Unix seconds are needed, are these milliseconds?"
        )
    n_users, n_items = len(source.user_keys), len(source.items)
    repairs = dict(source.repairs)
    rows = rows[_first_of_duplicates(rows)]
    repairs["duplicate_rows"] = len(source.users) - len(rows)
    rows = _sorted(rows, n_users, repairs, shuffle_ties)
    rows, user_kept = _filtered(rows, n_users, k_core, min_user_items, repairs)
    repairs["users_with_unknown_times"] = len(np.unique(rows.users[rows.times == UNKNOWN_TIME]))
    item_kept = _kept_items(rows, n_items, source.keep_unused_items and k_core == 0, repairs)
    items = [_clean_item(source.items[code], repairs) for code in np.flatnonzero(item_kept)]
    users = np.flatnonzero(user_kept)
    lengths = np.bincount(rows.users, minlength=n_users)[users]
    return Sequences(
        items=items,
        user_keys=[source.user_keys[u] for u in users],
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        codes=(np.cumsum(item_kept) - 1)[rows.codes].astype(np.int32),
        times=rows.times,
        repairs={"titles_cleaned": 0, "attributes_cleaned": 0} | repairs,
    )


def _first_of_duplicates(rows: _Columns) -> NDArray[np.bool_]:
    order = np.lexsort((rows.times, rows.codes, rows.users))  # stable, so the first of a run is the first in the file
    ordered = rows[order]
    same = (
        (ordered.users[1:] == ordered.users[:-1])
        & (ordered.codes[1:] == ordered.codes[:-1])
        & (ordered.times[1:] == ordered.times[:-1])
        & (ordered.times[1:] != UNKNOWN_TIME)
    )
    keep = np.ones(len(rows), dtype=bool)
    keep[order[1:][same]] = False
    return keep


def _sorted(rows: _Columns, n_users: int, repairs: dict[str, int], shuffle_ties: int | None) -> _Columns:
    """Grouped by user, oldest first; counts rows that are earlier than the row before them of the same user."""
    unknown = np.zeros(n_users, dtype=bool)
    unknown[rows.users[rows.times == UNKNOWN_TIME]] = True
    known_times = np.where(unknown[rows.users], 0, rows.times)
    grouped = np.argsort(rows.users, kind="stable")
    users, times = rows.users[grouped], known_times[grouped]
    back = (users[1:] == users[:-1]) & (times[1:] < times[:-1])
    repairs["out_of_order_rows"] = int(back.sum())
    repairs["out_of_order_users"] = len(np.unique(users[1:][back]))
    if shuffle_ties is None:
        return rows[np.lexsort((known_times, rows.users))]
    luck = np.random.default_rng(shuffle_ties).random(len(rows))
    luck[unknown[rows.users]] = 0.0  # the file's order is all that is known of them
    order = np.lexsort((luck, known_times, rows.users))
    ordered = rows[order]
    same = (ordered.users[1:] == ordered.users[:-1]) & (ordered.times[1:] == ordered.times[:-1]) & ~unknown[ordered.users[1:]]
    repairs["shuffled_tied_rows"] = int(np.sum(np.r_[same, False] | np.r_[False, same]))
    return ordered


def _filtered(
    rows: _Columns, n_users: int, k_core: int, min_user_items: int, repairs: dict[str, int]
) -> tuple[_Columns, NDArray[np.bool_]]:
    """The rows that stay, and which users stay, after the short users and then the k-core are taken out."""
    lengths = np.bincount(rows.users, minlength=n_users)
    enough = lengths >= min_user_items
    repairs["short_users"] = int((~enough).sum())
    before, rows = len(rows), rows[enough[rows.users]]
    repairs["short_user_rows"] = before - len(rows)
    if not len(rows):
        raise UserError(f"no user has {min_user_items} items or more (the longest sequence has {lengths.max()})")
    if k_core:
        users, items = len(np.unique(rows.users)), len(np.unique(rows.codes))
        before, rows = len(rows), rows[k_core_rows(rows.users, rows.codes, max(k_core, min_user_items), k_core)]
        if not len(rows):
            raise UserError(f"the {k_core}-core is empty ({users} users, {items} items, {before} interactions before it)")
        repairs["k_core_users"] = users - len(np.unique(rows.users))
        repairs["k_core_items"] = items - len(np.unique(rows.codes))
        repairs["k_core_rows"] = before - len(rows)
    return rows, np.bincount(rows.users, minlength=n_users) > 0


def k_core_rows(users: NDArray[np.int32], items: NDArray[np.int32], user_min: int, item_min: int) -> NDArray[np.int64]:
    """Rows of the largest part in which each user has ``user_min`` rows and each item ``item_min``; (rows,) in, (kept,) out.

    Takes out what is too rare until nothing is (Batagelj and Zaversnik 2003, on the bipartite graph, each side its own k).
    """
    kept = np.arange(len(users))
    while len(kept):
        u, i = users[kept], items[kept]
        enough = (np.bincount(u)[u] >= user_min) & (np.bincount(i)[i] >= item_min)
        if enough.all():
            break
        kept = kept[enough]
    return kept


def _kept_items(rows: _Columns, n_items: int, keep_unused: bool, repairs: dict[str, int]) -> NDArray[np.bool_]:
    used = np.zeros(n_items, dtype=bool)
    used[rows.codes] = True
    unused = int((~used).sum())
    if keep_unused:
        repairs["unused_items_kept"] = unused
        return np.ones(n_items, dtype=bool)
    dropped_by_core = repairs.get("k_core_items", 0)
    repairs["unused_items_dropped"] = repairs.get("unused_items_dropped", 0) + unused - dropped_by_core
    return used


def clean_text(text: str) -> str:
    """Stripped, HTML-unescaped once, runs of white space made one space; halves of surrogate pairs become '?'."""
    return " ".join(html.unescape(text).split()).encode("utf-8", "replace").decode()


def _clean_item(item: Item, repairs: dict[str, int]) -> Item:
    title = clean_text(item.title)
    attributes = tuple(dict.fromkeys(name for name in map(clean_text, item.attributes) if name))
    repairs["titles_cleaned"] = repairs.get("titles_cleaned", 0) + (title != item.title)
    repairs["attributes_cleaned"] = repairs.get("attributes_cleaned", 0) + (attributes != item.attributes)
    return Item(item.key, title, attributes)
