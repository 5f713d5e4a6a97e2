"""The training stream: every unit once an epoch, the same global batch for any number of ranks and from any step."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.data import split as split_module
from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.data.split import STREAMS, LeaveOneOut, Split, prepare_split
from gr.data.stream import Example, TrainStream
from gr.errors import UserError

LIMIT = 5
UNITS = ["targets", "users", "last", "subsequences"]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """150 users of 1 to 14 items in 40 small shards; an item's number tells its user and place."""
    folder = tmp_path_factory.mktemp("stream")
    random = np.random.default_rng(0)
    with DatasetWriter(folder / "d", "test", {}, [Item(str(i)) for i in range(15_000)]) as writer:
        for user, n in enumerate(random.integers(1, 15, size=150).tolist()):
            writer.add(User(str(user), [100 * user + place for place in range(n)], list(range(n))))
    (folder / "s").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_module, "SHARD_USERS", 4)
        prepare_split(Dataset(folder / "d"), LeaveOneOut(), folder / "s")
    split = Split(folder / "s")
    assert len(split.manifest["shards"]) == 40
    return split


def stream(split: Split, unit="targets", seed=0, global_batch=16, rank=0, world=1) -> TrainStream:
    return TrainStream(split, unit=unit, seed=seed, global_batch=global_batch, rank=rank, world=world, max_history=LIMIT)


def plain(examples: list[Example]) -> list[tuple[int, list[int], int]]:
    return [(user, history.tolist(), target) for user, history, target in examples]


def units_of(split: Split, unit: str, number: int) -> Counter:
    """Every example of one virtual stream, from the rows."""
    expected: Counter = Counter()
    for shard in range(number, len(split.manifest["shards"]), STREAMS):
        for row in split.shard(shard).to_pylist():
            train = row["items"][: row["n_train"]]
            if unit == "targets":
                expected.update((row["user"], tuple(train[max(0, p - LIMIT) : p]), train[p]) for p in range(1, len(train)))
            elif unit == "last":
                expected.update((row["user"], tuple(train[max(0, p - LIMIT) : p]), train[p]) for p in range(1, len(train))[-1:])
            elif unit == "subsequences":
                pairs = [(s, p) for p in range(1, len(train)) for s in range(p) if p - s <= LIMIT]
                expected.update((row["user"], tuple(train[s:p]), train[p]) for s, p in pairs)
            elif len(train) >= 2:
                expected[(row["user"], tuple(train[-LIMIT - 1 :]), -1)] += 1
    return expected


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), unit=st.sampled_from(UNITS), share=st.integers(1, 9))
def test_every_unit_once_an_epoch(split: Split, seed: int, unit: str, share: int) -> None:
    total = 0
    for v in range(STREAMS):
        expected = units_of(split, unit, v)
        size = sum(expected.values())
        total += size
        own = stream(split, unit, seed, global_batch=STREAMS * share, rank=v, world=STREAMS)
        examples = [e for step in range(-(-3 * size // share)) for e in own.batch(step)]
        epochs = [[(e.user, tuple(e.history.tolist()), e.target) for e in examples[n * size : (n + 1) * size]] for n in range(3)]
        assert all(Counter(epoch) == expected for epoch in epochs)
        assert epochs[0] != epochs[1], "each epoch has its own order"
        assert own.batch(0)[0].history.dtype == np.int32
    counted = {"targets": "train_targets", "users": "train_users", "last": "train_users"}
    assert own.units == total == (split.counts[counted[unit]] if unit in counted else total)
    assert own.steps_per_epoch == total / (STREAMS * share)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(UNITS), st.sampled_from([8, 16, 64]), st.integers(0, 300))
def test_global_batch_is_free_of_the_world_size(split: Split, seed: int, unit: str, size: int, step: int) -> None:
    whole = plain(stream(split, unit, seed, size).batch(step))
    assert len(whole) == size
    for world in (2, 4, 8):
        ranks = [stream(split, unit, seed, size, rank, world).batch(step) for rank in range(world)]
        assert [len(part) for part in ranks] == [size // world] * world
        assert [example for part in ranks for example in plain(part)] == whole


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(UNITS), st.lists(st.integers(0, 80), min_size=1, max_size=8))
def test_random_access_is_sequential_access(split: Split, seed: int, unit: str, steps: list[int]) -> None:
    sequential = stream(split, unit, seed)
    batches = [plain(sequential.batch(step)) for step in range(81)]
    jumping = stream(split, unit, seed)
    for step in steps:
        assert plain(jumping.batch(step)) == batches[step]
    resumed = stream(split, unit, seed)
    assert [plain(resumed.batch(step)) for step in range(max(steps), 81)] == batches[max(steps) :]


def test_seeds_differ_and_order_is_random(split: Split) -> None:
    first = [plain(stream(split, seed=seed, global_batch=64).batch(0)) for seed in range(4)]
    assert all(first[a] != first[b] for a in range(4) for b in range(a))
    users = [example[0] for example in first[0]]
    assert len(set(users)) > 16, "targets of one user are not served in a row"


def test_a_rank_reads_only_its_own_shards(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Split.shard
    monkeypatch.setattr(Split, "shard", lambda self, number, columns=None: read.append(number) or original(self, number, columns))
    own = stream(split, rank=1, world=4)
    steps = int(own.steps_per_epoch * 1.2)
    for step in range(steps):
        own.batch(step)
    assert {number % STREAMS for number in read} == {2, 3}
    assert len(read) <= 2 * 2 * 5, "sequential access reads each of the 10 shards once an epoch"


def test_wrong_arguments(split: Split, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 8, found 12"):
        stream(split, global_batch=12)
    with pytest.raises(UserError, match="must divide 8"):
        stream(split, world=3)
    with pytest.raises(UserError, match="rank 2 of 2"):
        stream(split, rank=2, world=2)
    with pytest.raises(UserError, match="one of targets, users, last, subsequences, found 'items'"):
        stream(split, unit="items")
    with pytest.raises(ValueError, match="at least 0"):
        stream(split).batch(-1)
    with DatasetWriter(tmp_path / "d", "tiny", {}, [Item("a")]) as writer:
        for user in range(6):
            writer.add(User(str(user), [0] * 5, [1] * 5))
    (tmp_path / "s").mkdir()
    prepare_split(Dataset(tmp_path / "d"), LeaveOneOut(), tmp_path / "s")
    with pytest.raises(UserError, match=r"too little to train on: the 8 streams have \[2, 2, 2, 2, 2, 2, 0, 0\] targets"):
        stream(Split(tmp_path / "s"))
