"""The dataset folder: written whole or not at all, read back as it was, damage noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from gr.data.dataset import Dataset, DatasetWriter, Item, User
from gr.errors import UserError
from gr.files import whole_folder

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
    write(tmp_path / "e")
    manifest = tmp_path / "e" / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"[1]", b"\xff" + whole):
        manifest.write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest\.json: damaged \(.*\); its folder must be made again"):
            Dataset(tmp_path / "e")


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path) -> None:
    before = write(tmp_path / "d").fingerprint
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "d") as aside:
        shutil.rmtree(aside)  # so that the second of the two renames fails
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert Dataset(tmp_path / "d").fingerprint == before


def test_the_current_folder_is_replaced_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    monkeypatch.chdir(tmp_path / "d")
    with whole_folder(Path()) as aside:
        (aside / "new").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert (tmp_path / "d" / "new").is_file()


def test_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "d", Path("/proc/nowhere/d")):
        with pytest.raises(UserError, match=r"d: no folder can be written there \(.+\); name another"), whole_folder(out):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    """... and neither what a living one writes nor anything else is."""
    dies = "import os, sys; from pathlib import Path; from gr.files import whole_folder\n"
    dies += "with whole_folder(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    for name in ("d", "d.more"):
        subprocess.run([sys.executable, "-c", dies, str(tmp_path / name)])
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    (tmp_path / ".d.settings").mkdir()
    with whole_folder(tmp_path / "d") as living:
        write(tmp_path / "d")
        assert living.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"d", ".d.settings"} | {n for n in left if n.startswith(".d.more.")}
