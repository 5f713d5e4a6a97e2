"""What every reader returns, and the reader of JSON-lines sequences.

A reader checks the form of its files and leaves the repair of their content (order, duplicates, short users, texts) to
`gr.data.clean`. Interactions are integer-coded columns, so that a file of a hundred million rows fits in memory.
"""

from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr.data import lines
from gr.data.dataset import Item
from gr.errors import UserError

UNKNOWN_TIME = int(np.iinfo(np.int64).min)


@dataclass
class Source:
    """A data set as its files tell it.

    ``users``, ``codes`` (item numbers, places in ``items``) and ``times`` (Unix seconds or UNKNOWN_TIME) are (rows,), one entry
    per interaction in the order of the file.
    """

    items: list[Item]
    user_keys: list[str]
    users: NDArray[np.int32]
    codes: NDArray[np.int32]
    times: NDArray[np.int64]
    keep_unused_items: bool = True
    repairs: dict[str, int] = field(default_factory=dict)


class Rows:
    """Interactions while they are being read: 16 bytes a row, and each key once."""

    def __init__(self) -> None:
        self.user_of: dict[str, int] = {}
        self.item_of: dict[str, int] = {}
        self._users, self._codes, self._times = array("i"), array("i"), array("q")

    def add(self, user: str, item: str, time: int) -> None:
        self._users.append(self.user_of.setdefault(user, len(self.user_of)))
        self._codes.append(self.item_of.setdefault(item, len(self.item_of)))
        self._times.append(time)

    def columns(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]:
        """Users, items and times, (rows,) each."""
        return (
            np.frombuffer(self._users, dtype=np.int32),
            np.frombuffer(self._codes, dtype=np.int32),
            np.frombuffer(self._times, dtype=np.int64),
        )


def unix_seconds(value: Any, column: str, path: Path, number: int) -> int:
    """A whole number of seconds; a float with no fraction is accepted."""
    if type(value) is int and abs(value) < 2**62:
        return value
    if type(value) is float and value.is_integer() and abs(value) < 2**62:
        return int(value)
    raise UserError(f"{path}:{number}: column '{column}' must be Unix seconds (an integer), found {value!r:.80}")


def read_jsonl(sequences: Path, items: Path) -> Source:
    """Sequences and items as JSON lines, plain or gzip.

    ``items``: one object per item with ``item`` (an integer, any base: the catalogue is in the file's order), ``asin`` (its key),
    ``title``, ``attributes``. ``sequences``: one object per user with ``user``, ``items`` (those integers, oldest first) and
    ``timestamps`` (Unix seconds or null, as many). Other columns are ignored.
    """
    catalogue, code_of = _jsonl_items(items)
    user_of: dict[str, int] = {}
    users, codes, times = array("i"), array("i"), array("q")
    for number, row in lines.read_objects(sequences):
        key = lines.text_key(lines.field(row, "user", sequences, number), "user", sequences, number)
        if key in user_of:
            raise UserError(f"{sequences}:{number}: user '{key}' appears a second time; a user's sequence must be one line")
        user_of[key] = user = len(user_of)
        sequence = lines.field(row, "items", sequences, number)
        stamps = lines.field(row, "timestamps", sequences, number)
        if not isinstance(sequence, list) or not isinstance(stamps, list):
            raise UserError(f"{sequences}:{number}: columns 'items' and 'timestamps' must be lists")
        if len(sequence) != len(stamps):
            raise UserError(f"{sequences}:{number}: {len(sequence)} items but {len(stamps)} timestamps; one is needed per item")
        for item, time in zip(sequence, stamps, strict=True):
            code = code_of.get(item) if type(item) is int else None
            if code is None:
                raise UserError(f"{sequences}:{number}: item {item!r:.80} is not in {items}")
            users.append(user)
            codes.append(code)
            times.append(UNKNOWN_TIME if time is None else unix_seconds(time, "timestamps", sequences, number))
    return Source(
        items=catalogue,
        user_keys=list(user_of),
        users=np.frombuffer(users, dtype=np.int32),
        codes=np.frombuffer(codes, dtype=np.int32),
        times=np.frombuffer(times, dtype=np.int64),
    )


def _jsonl_items(path: Path) -> tuple[list[Item], dict[int, int]]:
    catalogue: list[Item] = []
    code_of: dict[int, int] = {}
    line_of: dict[str, int] = {}
    for number, row in lines.read_objects(path):
        item = lines.field(row, "item", path, number)
        if type(item) is not int:
            raise UserError(f"{path}:{number}: column 'item' must be an integer, found {item!r:.80}")
        key = lines.text_key(lines.field(row, "asin", path, number), "asin", path, number)
        if item in code_of:
            first = line_of[catalogue[code_of[item]].key]
            raise UserError(f"{path}:{number}: item {item} appears a second time (first on line {first})")
        if key in line_of:
            raise UserError(f"{path}:{number}: asin '{key}' appears a second time (first on line {line_of[key]})")
        title = lines.text(lines.field(row, "title", path, number), "title", path, number)
        attributes = lines.text_list(lines.field(row, "attributes", path, number), "attributes", path, number)
        code_of[item], line_of[key] = len(catalogue), number
        catalogue.append(Item(key, title, tuple(attributes)))
    return catalogue, code_of
