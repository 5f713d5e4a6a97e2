"""The dataset folder: written whole or not at all, read back as it was, damage noticed."""

from pathlib import Path

import pyarrow as pa
import pytest

from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.errors import UserError

ITEMS = [Item("a", "A", ("x", "y")), Item("b")]
USERS = [User(f"u{n}", [n % 2, 0, 1], [n, None, n + 1]) for n in range(7)]


def write(out: Path, users: list[User] = USERS, shard_users: int = 3) -> Dataset:
    with DatasetWriter(out, "name", {"format": "test"}, ITEMS, {"duplicate_rows": 2}, shard_users) as writer:
        for user in users:
            writer.add(user)
    return Dataset(out)


def test_round_trip(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d")
    assert list(dataset.users()) == USERS
    assert [(row["key"], row["title"], tuple(row["attributes"])) for row in dataset.items().to_pylist()] == [
        ("a", "A", ("x", "y")),
        ("b", "", ()),
    ]
    assert dataset.counts == {"users": 7, "items": 2, "interactions": 21}
    assert [(shard["rows"], shard["interactions"]) for shard in dataset.manifest["shards"]] == [(3, 9), (3, 9), (1, 3)]
    dataset.verify()


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    same, other = write(tmp_path / "d"), write(tmp_path / "e")
    assert same.fingerprint == other.fingerprint
    assert write(tmp_path / "f", USERS[:6]).fingerprint != same.fingerprint


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    before = write(tmp_path / "d").fingerprint

    def fails() -> None:
        with DatasetWriter(tmp_path / "d", "name", {}, ITEMS, shard_users=1) as writer:
            writer.add(USERS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert Dataset(tmp_path / "d").fingerprint == before
    # An error while the last shard is written is found only on leaving the block.
    with pytest.raises(pa.ArrowInvalid), DatasetWriter(tmp_path / "d", "name", {}, ITEMS) as writer:
        writer.add(User("u", [2**40], [1]))
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    # ... and one in the catalogue before the block is entered.
    writer = DatasetWriter(tmp_path / "d", "name", {}, [Item("\ud800")])
    with pytest.raises(UnicodeEncodeError), writer:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d")
    shard = tmp_path / "d" / "users-00001.parquet"
    body = bytearray(shard.read_bytes())
    body[10] ^= 1
    shard.write_bytes(body)
    with pytest.raises(UserError, match=r"users-00001\.parquet: damaged"):
        dataset.verify()
    shard.unlink()
    with pytest.raises(UserError, match=r"users-00001\.parquet: missing"):
        dataset.verify()
    with pytest.raises(UserError, match="not a dataset folder"):
        Dataset(tmp_path)
