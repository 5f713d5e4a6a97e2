"""Splits: against a plain per-user rereading of the protocols."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gr.data import split as split_module
from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.data.split import STREAMS, LeaveOneOut, Protocol, Split, Temporal, prepare_split
from gr.errors import UserError
from gr.files import read_json, write_json

N_ITEMS = 30


def dataset(out: Path, sequences: list[list[int | None]], shard_users: int = 5) -> Dataset:
    """One user per list of times; items are drawn from a fixed seed."""
    random = np.random.default_rng(0)
    with DatasetWriter(out, "test", {}, [Item(f"i{i}", f"title {i}") for i in range(N_ITEMS)], shard_users=shard_users) as writer:
        for n, times in enumerate(sequences):
            writer.add(User(f"u{n}", random.integers(N_ITEMS, size=len(times)).tolist(), times))
    return Dataset(out)


def prepared(data: Dataset, protocol: LeaveOneOut | Temporal, out: Path) -> tuple[Split, list[dict]]:
    """The split and its rows by user number."""
    out.mkdir()
    manifest = prepare_split(data, protocol, out)
    split = Split(out)
    assert split.manifest == manifest
    rows = [row for table in split.users() for row in table.to_pylist()]
    rows.sort(key=lambda row: row["user"])
    assert [row["user"] for row in rows] == list(range(len(rows)))
    assert [(row["key"], row["items"]) for row in rows] == [(user.key, user.items) for user in data.users()]
    return split, rows


def check_counts(split: Split, rows: list[dict]) -> None:
    """The manifest's counts, recounted from the rows."""
    train = [row["items"][: row["n_train"]] for row in rows]
    seen = {item for items in train for item in items}
    n_targets = [max(len(items) - 1, 0) for items in train]
    evaluated = [row["val"] >= 0 or row["test"] >= 0 for row in rows]
    expected = {
        "users": len(rows),
        "items": N_ITEMS,
        "interactions": sum(len(row["items"]) for row in rows),
        "train_users": sum(n > 0 for n in n_targets),
        "train_interactions": sum(map(len, train)),
        "train_targets": sum(n_targets),
        "train_only_users": sum(n > 0 and not e for n, e in zip(n_targets, evaluated, strict=True)),
        "dropped_users": sum(n == 0 and not e for n, e in zip(n_targets, evaluated, strict=True)),
    }
    for which in ("val", "test"):
        found = [(row["user"], row["items"][: row[which]], row["items"][row[which]]) for row in rows if row[which] >= 0]
        assert all(history for _, history, _ in found)
        streamed = [(user, history.tolist(), target) for user, history, target in split.evaluation_users(which)]
        assert sorted(streamed) == sorted(found)
        expected |= {f"{which}_users": len(found), f"{which}_cold_targets": sum(target not in seen for *_, target in found)}
    assert {key: split.counts[key] for key in expected} == expected
    shards = split.manifest["shards"]
    assert sum(shard["rows"] for shard in shards) == len(rows)
    assert sum(shard["targets"] for shard in shards) == expected["train_targets"]
    assert sum(shard["train_users"] for shard in shards) == expected["train_users"]


def test_leave_one_out(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    times = [np.sort(random.integers(0, 9, size=n)).tolist() for n in random.integers(1, 8, size=57)]
    split, rows = prepared(dataset(tmp_path / "d", times), LeaveOneOut(), tmp_path / "s")
    for row, user_times in zip(rows, times, strict=True):
        n = len(user_times)
        assert (row["n_train"], row["val"], row["test"]) == ((n - 2, n - 2, n - 1) if n >= 3 else (n, -1, -1))
    check_counts(split, rows)
    assert split.counts["same_time_last_two"] == sum(len(t) >= 3 and t[-1] == t[-2] for t in times) > 0
    assert split.counts["dropped_users"] == sum(len(t) == 1 for t in times) > 0
    assert split.counts["train_only_users"] == sum(len(t) == 2 for t in times) > 0
    assert split.titles() == [f"title {i}" for i in range(N_ITEMS)]
    assert split.n_items == N_ITEMS
    assert split.manifest["dataset"]["fingerprint"] == Dataset(tmp_path / "d").fingerprint


def test_unknown_times_are_not_the_same_time(tmp_path: Path) -> None:
    users = [[1, None, None], [1, 2, 2], [None, None, None], [1, 2, None], [1, 2, 3, 4]] * 3
    split, _ = prepared(dataset(tmp_path / "d", users), LeaveOneOut(), tmp_path / "s")
    assert split.counts["same_time_last_two"] == 3


TIMES = st.lists(st.lists(st.integers(0, 50), max_size=8).map(sorted), min_size=4, max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(TIMES, st.sampled_from([Temporal(), Temporal(val=0.2, test=0.3)]))
def test_temporal(tmp_path_factory: pytest.TempPathFactory, times: list, protocol: Temporal) -> None:
    folder = tmp_path_factory.mktemp("temporal")
    data = dataset(folder / "d", times)
    try:
        split, rows = prepared(data, protocol, folder / "s")
    except UserError as error:
        assert any(text in str(error) for text in ("leaves no", "too coarse", "no interaction has a timestamp"))
        return
    t_val, t_test = split.manifest["times"]["t_val"], split.manifest["times"]["t_test"]
    flat = np.array([t for user in times for t in user])
    assert np.mean(flat < t_val) <= 1 - protocol.val - protocol.test <= np.mean(flat <= t_val)
    assert np.mean(flat < t_test) <= 1 - protocol.test <= np.mean(flat <= t_test)
    lost = {"val": 0, "test": 0}
    for row, user in zip(rows, times, strict=True):
        assert row["n_train"] == sum(t < t_val for t in user)
        first = {
            "val": next((p for p, t in enumerate(user) if t_val <= t < t_test), -1),
            "test": next((p for p, t in enumerate(user) if t >= t_test), -1),
        }
        for which, place in first.items():
            assert row[which] == (place if place > 0 else -1)
            lost[which] += place == 0
    assert {which: split.counts[f"{which}_without_history"] for which in lost} == lost
    check_counts(split, rows)


def test_temporal_with_unknown_times_sees_no_future(tmp_path: Path) -> None:
    known = [list(range(start, start + 60, 6)) for start in range(40)]
    unknown = [[None, 10, None, 20, None], [None, None, 99], [None] * 4, [5, None, 98, None, 7], [None, 97, None, 3]]
    split, rows = prepared(dataset(tmp_path / "d", known + unknown), Temporal(), tmp_path / "s")
    assert 20 < split.manifest["times"]["t_val"] < split.manifest["times"]["t_test"] <= 97
    assert [(row["n_train"], row["val"], row["test"]) for row in rows[40:]] == [(n, -1, -1) for n in (4, 0, 0, 1, 0)]
    assert split.counts["users_with_unknown_times"] == 5
    check_counts(split, rows)


def test_what_leaves_nothing_is_named(tmp_path: Path) -> None:
    cases: list[tuple[list, LeaveOneOut | Temporal, str]] = [
        ([[None] * 5] * 9, Temporal(), "no interaction has a timestamp"),
        ([[1, 2]] * 9, LeaveOneOut(), r"leave-one-out split leaves no val users \(of 9 users\)"),
        ([[1, 2, 3]] * 9, LeaveOneOut(), "leaves no train targets"),
        ([[5] * 6] * 9, Temporal(), "too coarse"),
        ([[1, 2, 3, 4]] * 8 + [[50], [60]], Temporal(val=0.02, test=0.02), "temporal split leaves no val users"),
        ([[3, 2, 1, 5 + n] for n in range(9)], Temporal(), "not in the order of time"),
        ([], LeaveOneOut(), "no users"),
    ]
    for n, (times, protocol, line) in enumerate(cases):
        (tmp_path / f"s{n}").mkdir()
        with pytest.raises(UserError, match=line):
            prepare_split(dataset(tmp_path / f"d{n}", times), protocol, tmp_path / f"s{n}")
    with pytest.raises(UserError, match="not a split folder"):
        Split(tmp_path)
    with pytest.raises(UserError, match="not the manifest of a split"):
        Split(tmp_path / "d0")


def test_protocols_validate() -> None:
    protocol: TypeAdapter[LeaveOneOut | Temporal] = TypeAdapter(Protocol)
    assert protocol.validate_python({"kind": "leave-one-out"}) == LeaveOneOut()
    assert protocol.validate_python({"kind": "temporal", "val": 0.2}) == Temporal(val=0.2)
    for wrong in (
        {"kind": "temporal", "val": 0.6, "test": 0.4},
        {"kind": "temporal", "test": 0},
        {"name": "loo"},
        {"kind": "leave-one-out", "k": 1},
    ):
        with pytest.raises(ValidationError):
            protocol.validate_python(wrong)


@pytest.mark.parametrize("users", [1, 7, 8, 9, 31, 32, 33, 64, 65, 100])
def test_shards_are_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: int) -> None:
    monkeypatch.setattr(split_module, "SHARD_USERS", 4)
    random = np.random.default_rng(users)
    times = [list(range(n)) for n in np.sort(random.integers(3, 40, size=users))]  # sorted: the worst case for a plain cut
    times[0] = list(range(4))
    split, rows = prepared(dataset(tmp_path / "d", times), LeaveOneOut(), tmp_path / "s")
    check_counts(split, rows)
    shards = split.manifest["shards"]
    sizes = [shard["rows"] for shard in shards]
    assert len(shards) == STREAMS * -(-users // (STREAMS * 4))
    assert max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 2
    assert min(sizes) > 0 or users < STREAMS
    streams = [sum(shard["targets"] for shard in shards[v::STREAMS]) for v in range(STREAMS)]
    if users == 64:
        assert max(streams) < 1.05 * min(streams)


def test_limit_is_a_fixed_sample(tmp_path: Path) -> None:
    split, _ = prepared(dataset(tmp_path / "d", [[1, 2, 3, 4]] * 400), LeaveOneOut(), tmp_path / "s")

    def chosen(limit: int, seed: int = 0) -> set[int]:
        users = [user for user, _, _ in split.evaluation_users("val", limit, seed)]
        assert len(users) == len(set(users)) == min(limit, 400)
        return set(users)

    assert chosen(50) == chosen(50)
    assert chosen(50) < chosen(100), "a larger limit adds users"
    assert chosen(50) != chosen(50, seed=1)
    assert chosen(1000) == set(range(400))
    assert abs(np.mean(list(chosen(100))) - 199.5) < 40, "from all over the data"


def test_a_history_does_not_hold_its_shard_in_memory(tmp_path: Path) -> None:
    split, _ = prepared(dataset(tmp_path / "d", [list(range(500))] * 400), LeaveOneOut(), tmp_path / "s")
    before = pa.total_allocated_bytes()
    kept = list(split.evaluation_users("val", limit=8))
    assert len(kept) == 8
    held = [pa.total_allocated_bytes() - before]
    while held[-1] >= 10_000 and len(held) < 100:  # Arrow's threads give back what they read with a little later
        time.sleep(0.05)
        held.append(pa.total_allocated_bytes() - before)
    assert held[-1] < 10_000, "8 histories of 2 kB, out of shards of 100 kB"


def flipped(file: Path) -> bytes:
    """Changes one bit of a file in place; returns what it held."""
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[10] ^= 1
    file.write_bytes(damaged)
    return whole


def test_damage_is_noticed_before_it_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, _ = prepared(dataset(tmp_path / "d", [[1, 2, 3, 4]] * 40), LeaveOneOut(), tmp_path / "s")
    reads = {"users-00003.parquet": lambda s: s.shard(3, ["items"]), "items.parquet": lambda s: s.items()}
    for name, read in reads.items():
        file = tmp_path / "s" / name
        whole = flipped(file)
        with pytest.raises(UserError, match=f"{name}: damaged"):
            read(Split(tmp_path / "s"))
        file.unlink()
        with pytest.raises(UserError, match=f"{name}: missing"):
            read(Split(tmp_path / "s"))
        file.write_bytes(whole)
    sums: list[str] = []
    monkeypatch.setattr("gr.files.sha256", lambda file: sums.append(file.name) or split_module.sha256(file))
    split = Split(tmp_path / "s")
    for _ in range(3):
        assert split.shard(3).num_rows + split.items().num_rows == 5 + N_ITEMS
    assert sums == ["users-00003.parquet", "items.parquet"], "once is enough"


def test_an_older_split_without_the_sum_of_its_catalogue(tmp_path: Path) -> None:
    prepared(dataset(tmp_path / "d", [[1, 2, 3, 4]] * 9), LeaveOneOut(), tmp_path / "s")
    manifest = read_json(tmp_path / "s" / "manifest.json")
    del manifest["items"]
    write_json(tmp_path / "s" / "manifest.json", manifest)
    assert Split(tmp_path / "s").titles() == [f"title {i}" for i in range(N_ITEMS)]
    items = tmp_path / "s" / "items.parquet"
    items.write_bytes(items.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"items\.parquet: cannot be read .*; prepare the split again"):
        Split(tmp_path / "s").titles()
    items.unlink()
    with pytest.raises(UserError, match=r"items\.parquet: cannot be read"):
        Split(tmp_path / "s").titles()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    prepared(dataset(tmp_path / "d", [[1, 2, 3, 4]] * 9), LeaveOneOut(), tmp_path / "s")
    manifest = tmp_path / "s" / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"[1]", b"\xff" + whole):
        manifest.write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest\.json: damaged \(.*\); its folder must be made again"):
            Split(tmp_path / "s")
