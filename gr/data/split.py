"""Train, validation and test parts of a dataset, as a split folder (docs/architecture.md); the artifact of `prepare`.

Leave-one-out is the usual protocol of sequential recommendation (Kang and McAuley 2018, SASRec, section IV-A); it lets training
see what lies, in time, after another user's test item. The temporal protocol does not (Ji et al. 2023, "A Critical Study on Data
Leakage in Recommender System Offline Evaluation").
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gr.data.dataset import SHARD_USERS, Dataset, check_names
from gr.errors import UserError, first_line
from gr.files import check_file, read_object, sha256, write_json

SCHEMA_VERSION = 1
STREAMS = 8  # shards come in multiples of this, so that 1, 2, 4 or 8 ranks own whole shards
NONE = -1
SPLIT_SCHEMA = pa.schema(
    [
        ("user", pa.int64()),
        ("key", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("n_train", pa.int32()),
        ("val", pa.int32()),
        ("test", pa.int32()),
    ]
)


class LeaveOneOut(BaseModel):
    """Each user's last item is the test target, the last but one the validation target."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["leave-one-out"] = "leave-one-out"


class Temporal(BaseModel):
    """Two global times part training, validation and test; ``val`` and ``test`` are shares of all interactions."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["temporal"] = "temporal"
    val: float = Field(default=0.1, gt=0, lt=1)
    test: float = Field(default=0.1, gt=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training(self) -> "Temporal":
        if self.val + self.test >= 1:
            raise ValueError(f"val + test = {self.val + self.test:g} leaves nothing to train on; their sum must be below 1")
        return self


Protocol = Annotated[LeaveOneOut | Temporal, Field(discriminator="kind")]


class EvaluationUser(NamedTuple):
    """One user to evaluate: ``history`` (items before the target, oldest first, int32) and the ``target`` item."""

    user: int
    history: NDArray[np.int32]
    target: int


def flat_lists(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """A list column without nulls as offsets (rows + 1,), from 0, and values (total,)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0], array.flatten().to_numpy(zero_copy_only=False)


@dataclass
class _Parts:
    """Positions of a block of users, (users,) each, and what the protocol counts about them."""

    n_train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    counts: dict[str, int]


def _leave_one_out(items: pa.ChunkedArray, timestamps: pa.ChunkedArray) -> _Parts:
    offsets, _ = flat_lists(items)
    lengths = np.diff(offsets)
    enough = lengths >= 3  # one item of history for the validation target
    _, times = flat_lists(timestamps)  # float with NaN where a time is unknown, and NaN equals nothing
    ends = offsets[1:][enough]
    return _Parts(
        n_train=np.where(enough, lengths - 2, lengths),
        val=np.where(enough, lengths - 2, NONE),
        test=np.where(enough, lengths - 1, NONE),
        counts={"same_time_last_two": int((times[ends - 1] == times[ends - 2]).sum())},
    )


def _temporal(items: pa.ChunkedArray, timestamps: pa.ChunkedArray, t_val: int, t_test: int, where: Path) -> _Parts:
    offsets, _ = flat_lists(items)
    lengths = np.diff(offsets)
    _, times = flat_lists(timestamps.combine_chunks().cast(pa.list_(pa.float64())))  # exact for seconds; NaN = unknown
    owner = np.repeat(np.arange(len(lengths)), lengths)
    if np.any((owner[1:] == owner[:-1]) & (times[1:] < times[:-1]) & ~_any_unknown(times, owner, len(lengths))[owner[1:]]):
        raise UserError(f"{where}: a user's items are not in the order of time; import the data again")
    n_train = np.bincount(owner, times < t_val, len(lengths)).astype(np.int64)
    before_test = np.bincount(owner, times < t_test, len(lengths)).astype(np.int64)
    has_val, has_test = before_test > n_train, lengths > before_test
    unknown = _any_unknown(times, owner, len(lengths))
    for u in np.flatnonzero(unknown):
        n_train[u] = _known_before(times[offsets[u] : offsets[u + 1]], t_val)
    val_history, test_history = n_train > 0, before_test > 0
    counts = {
        "users_with_unknown_times": int(unknown.sum()),
        "val_without_history": int((has_val & ~val_history & ~unknown).sum()),
        "test_without_history": int((has_test & ~test_history & ~unknown).sum()),
    }
    return _Parts(
        n_train=n_train,
        val=np.where(has_val & val_history & ~unknown, n_train, NONE),
        test=np.where(has_test & test_history & ~unknown, before_test, NONE),
        counts=counts,
    )


def _any_unknown(times: NDArray[np.floating], owner: NDArray[np.int64], users: int) -> NDArray[np.bool_]:
    return np.bincount(owner, np.isnan(times), users) > 0


def _known_before(times: NDArray[np.floating], t_val: int) -> int:
    """How many of one user's items surely lie before ``t_val``, where some times are unknown (NaN).

    The sequence is in order, so an item of unknown time is before ``t_val`` if a later item is known to be. What follows the last
    such item may be of any time and is left out: training must not see the future.
    """
    late = np.flatnonzero(times >= t_val)
    early = np.flatnonzero(times[: late[0] if len(late) else None] < t_val)
    return int(early[-1]) + 1 if len(early) else 0


def _cut_times(dataset: Dataset, protocol: Temporal) -> tuple[int, int]:
    """(t_val, t_test): the times before which lie 1 - val - test, and 1 - test, of the interactions of known time."""
    known = [flat_lists(shard["timestamps"].combine_chunks())[1] for shard in dataset.shards()]
    times = np.concatenate([np.zeros(0), *(t[~np.isnan(t)] if t.dtype.kind == "f" else t for t in known)]).astype(np.int64)
    if not len(times):
        raise UserError(f"{dataset.path}: no interaction has a timestamp; the temporal split needs them, leave-one-out does not")
    places = [int((1 - protocol.val - protocol.test) * len(times)), int((1 - protocol.test) * len(times))]
    t_val, t_test = (int(t) for t in np.partition(times, places)[places])
    if t_val == t_test:
        raise UserError(
            f"{dataset.path}: val={protocol.val:g} and test={protocol.test:g} both begin at time {t_val}: "
            "the times are too coarse for these shares"
        )
    return t_val, t_test


def prepare_split(dataset: Dataset, protocol: LeaveOneOut | Temporal, out: Path) -> dict[str, Any]:
    """Writes the split of ``dataset`` into the existing empty folder ``out``; returns its manifest.

    Its ``counts`` say what the protocol leaves: ``train_only_users`` are trained on and not evaluated, ``dropped_users`` give
    neither a target to train on nor one to evaluate; ``*_cold_targets`` are evaluation targets that training never shows.
    ``same_time_last_two`` (leave-one-out): users whose order of the last two items their timestamps do not tell. Temporal: users
    with an unknown time are not evaluated, and train only on what surely lies before t_val (``users_with_unknown_times``); a
    first item is no target (``*_without_history``).
    """
    times = _cut_times(dataset, protocol) if isinstance(protocol, Temporal) else None
    writer = _SplitWriter(out, dataset.counts["items"])
    for first_user, block in _blocks(dataset):
        if times is None:
            parts = _leave_one_out(block["items"], block["timestamps"])
        else:
            parts = _temporal(block["items"], block["timestamps"], *times, dataset.path)
        writer.add(first_user, block, parts)
    for part in ("train_targets", "val_users", "test_users"):
        if not writer.counts[part]:
            what = f"no {part.replace('_', ' ')} (of {writer.counts['users']} users)"
            raise UserError(f"{dataset.path}: the {protocol.kind} split leaves {what}")
    items = out / "items.parquet"
    pq.write_table(dataset.items(), items, compression="zstd")
    manifest = {
        "schema": SCHEMA_VERSION,
        "dataset": {key: value for key, value in dataset.manifest.items() if key != "shards"},
        "protocol": protocol.model_dump(),
        "times": None if times is None else {"t_val": times[0], "t_test": times[1]},
        "counts": {"items": dataset.counts["items"], **writer.counts, **writer.cold_targets()},
        "items": {"file": items.name, "rows": dataset.counts["items"], "sha256": sha256(items)},
        "shards": writer.shards,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _blocks(dataset: Dataset) -> Iterator[tuple[int, pa.Table]]:
    """(first user's number, users) in blocks of up to STREAMS * SHARD_USERS users, of nearly one size."""
    users = dataset.counts["users"]
    if not users:
        raise UserError(f"{dataset.path}: no users")
    blocks = max(1, -(-users // (STREAMS * SHARD_USERS)))
    edges = [users * b // blocks for b in range(blocks + 1)]
    shards, pending, done = dataset.shards(), pa.table({}), 0
    for size in np.diff(edges).tolist():
        while pending.num_rows < size:
            shard = next(shards)
            pending = pa.concat_tables([pending, shard]) if pending.num_rows else shard
        yield done, pending.slice(0, size)
        pending, done = pending.slice(size), done + size


class _SplitWriter:
    """Deals each block of users to STREAMS shards and keeps the counts."""

    def __init__(self, out: Path, n_items: int) -> None:
        self.out, self.shards = out, list[dict[str, Any]]()
        self.counts: dict[str, int] = {"users": 0, "train_targets": 0, "val_users": 0, "test_users": 0}
        self._in_train = np.zeros(n_items, dtype=np.int64)
        self._as_target = {"val": np.zeros(n_items, dtype=np.int64), "test": np.zeros(n_items, dtype=np.int64)}

    def add(self, first_user: int, block: pa.Table, parts: _Parts) -> None:
        targets = np.maximum(parts.n_train - 1, 0)
        table = pa.table(
            {
                "user": np.arange(first_user, first_user + block.num_rows),
                "key": block["user"],
                "items": block["items"],
                "n_train": parts.n_train,
                "val": parts.val,
                "test": parts.test,
            },
        ).cast(SPLIT_SCHEMA)
        self._count(table, parts, targets)
        for rows in _deal(targets):
            file = self.out / f"users-{len(self.shards):05d}.parquet"
            pq.write_table(table.take(rows), file, compression="zstd")
            self.shards.append(
                {
                    "file": file.name,
                    "rows": len(rows),
                    "targets": int(targets[rows].sum()),
                    "train_users": int((targets[rows] > 0).sum()),
                    "sha256": sha256(file),
                }
            )

    def _count(self, table: pa.Table, parts: _Parts, targets: NDArray[np.int64]) -> None:
        offsets, items = flat_lists(table["items"])
        _, train = training_part(table)
        self._in_train += np.bincount(train, minlength=len(self._in_train))
        evaluated = (parts.val >= 0) | (parts.test >= 0)
        for which, place in (("val", parts.val), ("test", parts.test)):
            chosen = items[(offsets[:-1] + place)[place >= 0]]
            self._as_target[which] += np.bincount(chosen, minlength=len(self._in_train))
        added = {
            "users": table.num_rows,
            "interactions": len(items),
            "train_users": (targets > 0).sum(),
            "train_interactions": len(train),
            "train_targets": targets.sum(),
            "val_users": (parts.val >= 0).sum(),
            "test_users": (parts.test >= 0).sum(),
            "train_only_users": ((targets > 0) & ~evaluated).sum(),
            "dropped_users": ((targets == 0) & ~evaluated).sum(),
        } | parts.counts
        for key, value in added.items():
            self.counts[key] = self.counts.get(key, 0) + int(value)

    def cold_targets(self) -> dict[str, int]:
        return {f"{which}_cold_targets": int(n[self._in_train == 0].sum()) for which, n in self._as_target.items()}


def _deal(targets: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """STREAMS sets of rows with nearly equal numbers of users and of targets.

    Users are dealt by falling number of targets, back and forth: each stream passes over its own users, so a stream with fewer
    targets would show each of them more often.
    """
    order = np.argsort(-targets, kind="stable")
    turn = np.arange(len(order)) % (2 * STREAMS)
    hand = np.where(turn < STREAMS, turn, 2 * STREAMS - 1 - turn)
    return [np.sort(order[hand == v]) for v in range(STREAMS)]


class Split:
    """A split folder opened for reading; one shard is in memory at a time, and checked when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"{path}: not a split folder (no manifest.json); the stage `prepare` makes one")
        self.manifest = read_object(manifest)
        self._checked: set[str] = set()
        if self.manifest.get("schema") != SCHEMA_VERSION or "protocol" not in self.manifest:
            raise UserError(f"{manifest}: not the manifest of a split with schema {SCHEMA_VERSION}")
        check_names(manifest, [self.manifest.get("items", {"file": "items.parquet"}), *self.manifest.get("shards", [])])

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.manifest["counts"])

    @property
    def n_items(self) -> int:
        return int(self.manifest["counts"]["items"])

    @cached_property
    def popularity(self) -> NDArray[np.int64]:
        """(items,) interactions in the training part."""
        found = np.zeros(self.n_items, dtype=np.int64)
        for shard in self.users(["items", "n_train"]):
            found += np.bincount(training_part(shard)[1], minlength=self.n_items)
        return found

    def items(self) -> pa.Table:
        """The catalogue, row i being item i: item, key, title, attributes."""
        return self._read(self.manifest.get("items", {"file": "items.parquet"}))

    def titles(self) -> list[str]:
        """Title of item i at place i, "" where there is none."""
        titles: list[str] = self.items()["title"].to_pylist()
        return titles

    def shard(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard's users; ``columns`` of `SPLIT_SCHEMA`, all by default."""
        return self._read(self.manifest["shards"][number], columns)

    def _read(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        file = self.path / entry["file"]
        try:
            if "sha256" in entry and file.name not in self._checked:
                check_file(self.path, entry)
                self._checked.add(file.name)
            return pq.read_table(file, columns=None if columns is None else list(columns))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read ({first_line(error)}); prepare the split again") from None

    def users(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All users, one shard at a time."""
        for number in range(len(self.manifest["shards"])):
            yield self.shard(number, columns)

    def evaluation_users(
        self, which: Literal["val", "test"], limit: int | None = None, seed: int = 0
    ) -> Iterator[EvaluationUser]:
        """Users with a ``which`` target, shard by shard; with ``limit``, that many of them, always the same for a ``seed``."""
        chosen = None if limit is None else self._chosen(which, limit, seed)
        for table in self.users(["user", "items", which]):
            users, place = table["user"].to_numpy(), table[which].to_numpy()
            offsets, items = flat_lists(table["items"])
            wanted = place >= 0
            if chosen is not None:
                wanted &= np.isin(users, chosen)
            for row in np.flatnonzero(wanted):
                start, at = offsets[row], offsets[row] + place[row]
                history = items[start:at].copy()  # a view would keep the whole shard in memory
                yield EvaluationUser(int(users[row]), history, int(items[at]))

    def _chosen(self, which: str, limit: int, seed: int) -> NDArray[np.int64]:
        """The ``limit`` users with a target whose numbers hash smallest."""
        best = np.zeros(0, dtype=np.int64)
        for table in self.users(["user", which]):
            users = table["user"].to_numpy()[table[which].to_numpy() >= 0]
            best = np.concatenate([best, users])
            best = best[np.argsort(splitmix64(best, seed), kind="stable")[:limit]]
        return best


def training_part(shard: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shard's training interactions as parallel arrays: user (row number, ascending) and item (oldest first)."""
    offsets, item = flat_lists(shard["items"])
    lengths = np.diff(offsets)
    user = np.repeat(np.arange(lengths.size), lengths)
    place = np.arange(item.size) - np.repeat(offsets[:-1], lengths)
    kept = place < np.repeat(shard["n_train"].to_numpy(), lengths)
    return user[kept], item[kept].astype(np.int64)


def splitmix64(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A hash (Steele et al. 2014) of each number, the same everywhere; one to one, so that no two numbers tie."""
    z = numbers.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
