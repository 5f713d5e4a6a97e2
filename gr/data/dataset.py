"""The dataset folder: a catalogue and time-ordered user sequences in sharded Parquet, with a manifest.

The layout is in docs/architecture.md. A reader holds one shard at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import UserError
from gr.files import check_file, read_object, sha256, whole_folder, write_json

SCHEMA_VERSION = 1
SHARD_USERS = 4096

ITEMS_SCHEMA = pa.schema(
    [("item", pa.int32()), ("key", pa.string()), ("title", pa.string()), ("attributes", pa.list_(pa.string()))]
)
USERS_SCHEMA = pa.schema([("user", pa.string()), ("items", pa.list_(pa.int32())), ("timestamps", pa.list_(pa.int64()))])


@dataclass(frozen=True)
class Item:
    """One item of the catalogue; its number is its place in the catalogue."""

    key: str
    title: str = ""
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class User:
    """One user's sequence, oldest first; ``timestamps`` in Unix seconds, None where unknown."""

    key: str
    items: Sequence[int]
    timestamps: Sequence[int | None]


def check_names(manifest: Path, entries: Iterable[Any]) -> None:
    """UserError where an entry of the manifest is of a file that does not lie in the manifest's own folder."""
    for entry in entries:
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(f"{manifest}: file {name!r} is no name of a file in this folder; the folder can't be trusted")


class Dataset:
    """A dataset folder opened for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        manifest = path / "manifest.json"
        if not manifest.is_file():
            raise UserError(f"{path}: not a dataset folder (no manifest.json); `grscale data` makes one")
        self.manifest = read_object(manifest)
        if self.manifest.get("schema") != SCHEMA_VERSION or "items" not in self.manifest:
            raise UserError(f"{manifest}: schema {self.manifest.get('schema')!r}, this version reads {SCHEMA_VERSION}")
        check_names(manifest, [self.manifest["items"], *self.manifest.get("shards", [])])

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.manifest["counts"])

    def verify(self) -> None:
        """Reads every file and compares its checksum with the manifest's; UserError names the first that differs."""
        for entry in [self.manifest["items"], *self.manifest["shards"]]:
            check_file(self.path, entry)

    def items(self) -> pa.Table:
        """The catalogue, row i being item i."""
        return pq.read_table(self.path / self.manifest["items"]["file"], schema=ITEMS_SCHEMA)

    def shards(self) -> Iterator[pa.Table]:
        """The users, one shard at a time."""
        for entry in self.manifest["shards"]:
            yield pq.read_table(self.path / entry["file"], schema=USERS_SCHEMA)

    def users(self) -> Iterator[User]:
        """The users, one at a time, one shard in memory."""
        for shard in self.shards():
            for row in shard.to_pylist():
                yield User(row["user"], row["items"], row["timestamps"])


class DatasetWriter:
    """Writes a dataset folder; leaving the ``with`` block without an error puts it in place whole.

    ``items`` is the catalogue; users are added one at a time and written a shard at a time.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        source: dict[str, Any],
        items: Iterable[Item],
        repairs: dict[str, int] | None = None,
        shard_users: int = SHARD_USERS,
    ) -> None:
        self._folder = whole_folder(out)
        self._name, self._source, self._items = name, source, items
        self.repairs = dict(repairs or {})
        self._shard_users = shard_users
        self._pending: list[User] = []
        self._shards: list[dict[str, Any]] = []
        self._users = self._interactions = 0

    def __enter__(self) -> "DatasetWriter":
        self.path = self._folder.__enter__()
        try:
            self._items_entry = self._write("items.parquet", self._catalogue())
        except BaseException as failure:  # `with` calls __exit__ only after __enter__ has returned
            self._folder.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self

    def _catalogue(self) -> pa.Table:
        rows = [
            {"item": i, "key": item.key, "title": item.title, "attributes": list(item.attributes)}
            for i, item in enumerate(self._items)
        ]
        return pa.Table.from_pylist(rows, ITEMS_SCHEMA)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        try:
            if kind is None:
                self._finish()
        except BaseException as failure:
            self._folder.__exit__(type(failure), failure, failure.__traceback__)
            raise
        return self._folder.__exit__(kind, error, trace)

    def add(self, user: User) -> None:
        self._pending.append(user)
        if len(self._pending) == self._shard_users:
            self._flush()

    def _write(self, file: str, table: pa.Table) -> dict[str, Any]:
        pq.write_table(table, self.path / file, compression="zstd")
        return {"file": file, "rows": table.num_rows, "sha256": sha256(self.path / file)}

    def _flush(self) -> None:
        users, self._pending = self._pending, []
        table = pa.table(
            {
                "user": [u.key for u in users],
                "items": [list(u.items) for u in users],
                "timestamps": [list(u.timestamps) for u in users],
            },
            schema=USERS_SCHEMA,
        )
        interactions = sum(len(u.items) for u in users)
        entry = self._write(f"users-{len(self._shards):05d}.parquet", table)
        self._shards.append({**entry, "interactions": interactions})
        self._users += len(users)
        self._interactions += interactions

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        shas = [self._items_entry["sha256"], *(s["sha256"] for s in self._shards)]
        write_json(
            self.path / "manifest.json",
            {
                "schema": SCHEMA_VERSION,
                "name": self._name,
                "source": self._source,
                "counts": {
                    "users": self._users,
                    "items": self._items_entry["rows"],
                    "interactions": self._interactions,
                },
                "repairs": self.repairs,
                "items": self._items_entry,
                "shards": self._shards,
                "fingerprint": hashlib.sha256("".join(shas).encode()).hexdigest(),
            },
        )
