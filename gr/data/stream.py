"""Training examples in a fixed random order, read a shard at a time.

Eight virtual streams, whatever the number of ranks: stream v owns shards v, v + 8, ... and gives an eighth of every global batch;
each rank serves whole streams. So the global batch of a step does not depend on how many processes train, a rank reads only its
own shards, and a resumed run computes where it stands instead of replaying what it has read.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from gr.data.split import STREAMS, Split, flat_lists
from gr.errors import UserError

Unit = Literal["targets", "users", "last", "subsequences"]


class Example(NamedTuple):
    """``history`` (up to the stream's limit, oldest first, int32, read-only) and ``target`` item; -1 for the unit "users"."""

    user: int
    history: NDArray[np.int32]
    target: int


@dataclass(frozen=True)
class _Shard:
    """Histories of a shard, (n,) each: the user, and where in ``items`` the user's row begins and the history ends.

    Its target, where the unit has one, is ``items[ends[j]]``. ``first``: (n + 1,) for the unit "subsequences", the number of the
    first unit of each history, whose units are its newest item, its two newest, and so on; else None, and a history is a unit.
    """

    number: int
    users: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    items: NDArray[np.int32]
    first: NDArray[np.int64] | None

    @property
    def units(self) -> int:
        return len(self.ends) if self.first is None else int(self.first[-1])

    def histories(self, units: NDArray[np.int64], longest: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) numbers of units to (n,) numbers of histories, and where in ``items`` each unit's begins, cut to ``longest``."""
        if self.first is None:
            return units, np.maximum(self.starts[units], self.ends[units] - longest)
        rows = np.searchsorted(self.first, units, side="right") - 1
        return rows, self.ends[rows] - 1 - (units - self.first[rows])


class _Stream:
    """One virtual stream: an endless sequence of units, epoch after epoch, each a new permutation."""

    def __init__(self, split: Split, unit: Unit, seed: int, number: int, max_history: int) -> None:
        self._split, self._unit, self._seed, self._number = split, unit, seed, number
        self._max_history = max_history
        shards = range(number, len(split.manifest["shards"]), STREAMS)
        self._sizes: dict[int, int] = {shard: size for shard in shards if (size := _units(split, shard, unit, max_history))}
        self.units = sum(self._sizes.values())
        self._order: tuple[int, list[int], list[int]] = (-1, [], [])
        self._shard: _Shard | None = None
        self._permutation: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.zeros(0, np.int64))

    def take(self, start: int, count: int) -> list[Example]:
        """Units ``start`` to ``start + count`` of the sequence."""
        examples: list[Example] = []
        while len(examples) < count:
            epoch, position = divmod(start + len(examples), self.units)
            shards, starts = self._epoch(epoch)
            place = bisect_right(starts, position) - 1
            shard = self._load(shards[place])
            permutation = self._permuted(epoch, shard.number)
            first = position - starts[place]
            examples += self._examples(shard, permutation[first : first + count - len(examples)])
        return examples

    def _examples(self, shard: _Shard, units: NDArray[np.int64]) -> list[Example]:
        whole = self._unit == "users"
        rows, starts = shard.histories(units, self._max_history + whole)
        users, ends, items = shard.users[rows].tolist(), shard.ends[rows], shard.items
        targets = [-1] * len(units) if whole else items[ends].tolist()
        return [
            Example(user, items[start:end], target)
            for user, start, end, target in zip(users, starts.tolist(), ends.tolist(), targets, strict=True)
        ]

    def _random(self, purpose: int, epoch: int, number: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, purpose, epoch, number))

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """An epoch's shards in their order, and the position in the epoch at which each begins."""
        if self._order[0] != epoch:
            shards = self._random(0, epoch, self._number).permutation(list(self._sizes)).tolist()
            starts = np.cumsum([0] + [self._sizes[shard] for shard in shards])[:-1].tolist()
            self._order = (epoch, shards, starts)
        return self._order[1], self._order[2]

    def _permuted(self, epoch: int, shard: int) -> NDArray[np.int64]:
        if self._permutation[:2] != (epoch, shard):
            self._permutation = (epoch, shard, self._random(1, epoch, shard).permutation(self._sizes[shard]))
        return self._permutation[2]

    def _load(self, number: int) -> _Shard:
        if self._shard is None or self._shard.number != number:
            self._shard = None  # free the old shard before the new one is read
            self._shard = _decode(self._split, number, self._unit, self._max_history)
            if self._shard.units != self._sizes[number]:
                file = self._split.manifest["shards"][number]["file"]
                raise UserError(
                    f"{self._split.path / file}: {self._shard.units} {self._unit} to train on, "
                    f"the manifest says {self._sizes[number]}; prepare the split again"
                )
        return self._shard


def _units(split: Split, number: int, unit: Unit, max_history: int) -> int:
    """Of a shard: as its manifest counts them, but for "subsequences", whose number hangs on ``max_history`` too."""
    if unit != "subsequences":
        return int(split.manifest["shards"][number]["targets" if unit == "targets" else "train_users"])
    targets = np.maximum(split.shard(number, ["n_train"])["n_train"].to_numpy().astype(np.int64) - 1, 0)
    short = np.minimum(targets, max_history)  # targets whose histories are no longer than that: 1 + 2 + ... units
    return int((short * (short + 1) // 2 + (targets - short) * max_history).sum())


def _decode(split: Split, number: int, unit: Unit, max_history: int) -> _Shard:
    table = split.shard(number, ["user", "items", "n_train"])
    offsets, items = flat_lists(table["items"])
    n_train = table["n_train"].to_numpy().astype(np.int64)
    users = table["user"].to_numpy()
    first = None
    if unit in ("users", "last"):
        rows = np.flatnonzero(n_train >= 2)
        ends = offsets[rows] + n_train[rows] - (unit == "last")
    else:
        targets = np.maximum(n_train - 1, 0)
        rows = np.repeat(np.arange(len(targets)), targets)
        place_in_row = np.arange(len(rows)) - np.repeat(np.cumsum(targets) - targets, targets)
        ends = offsets[rows] + 1 + place_in_row
        if unit == "subsequences":
            first = np.concatenate([[0], np.cumsum(np.minimum(1 + place_in_row, max_history))])
    return _Shard(number, users[rows], offsets[rows], ends, items, first)


class TrainStream:
    """Global batches of training examples, the same for every number of ranks.

    ``unit`` "targets": an example per train target, with the items before it; "last": the last of these of each user;
    "subsequences": every train target with every run of 1 to ``max_history`` items that ends before it, so that a user counts by
    about the square of the sequence's length; "users": one per user with at least two training items, with all of them and one
    more than ``max_history`` (inputs and shifted targets). Holds one shard per owned stream.
    """

    def __init__(
        self,
        split: Split,
        *,
        unit: Unit,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        max_history: int,
    ) -> None:
        if unit not in get_args(Unit):
            raise UserError(f"unit must be one of {', '.join(get_args(Unit))}, found {unit!r}")
        if global_batch < STREAMS or global_batch % STREAMS:
            raise UserError(f"the global batch must be a multiple of {STREAMS}, found {global_batch}")
        if world < 1 or STREAMS % world or not 0 <= rank < world:
            raise UserError(f"the number of ranks must divide {STREAMS} (1, 2, 4 or 8), found rank {rank} of {world}")
        if max_history < 1 or seed < 0:
            raise UserError(f"max_history must be at least 1 and the seed at least 0, found {max_history} and {seed}")
        streams = [_Stream(split, unit, seed, number, max_history) for number in range(STREAMS)]
        sizes = [stream.units for stream in streams]
        if not all(sizes):
            raise UserError(f"{split.path}: too little to train on: the {STREAMS} streams have {sizes} {unit}; each needs one")
        self.units: int = sum(sizes)
        self._streams = streams[rank * STREAMS // world : (rank + 1) * STREAMS // world]
        self._share, self._global_batch = global_batch // STREAMS, global_batch

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over all units; not rounded."""
        return self.units / self._global_batch

    def batch(self, step: int) -> list[Example]:
        """This rank's ``global_batch / world`` examples of global batch ``step`` (from 0); calls may come in any order."""
        if step < 0:
            raise ValueError(f"step must be at least 0, found {step}")
        start = step * self._share
        return [example for stream in self._streams for example in stream.take(start, self._share)]
