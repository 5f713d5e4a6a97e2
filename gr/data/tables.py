"""Interactions and items from CSV, TSV or Parquet tables with named columns."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.data import lines
from gr.data.dataset import Item
from gr.data.readers import UNKNOWN_TIME, Source
from gr.errors import UserError

COLUMNS = {
    "user": "user",
    "item": "item",
    "timestamp": "timestamp",
    "key": "key",
    "title": "title",
    "attributes": "attributes",
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(interactions: Path, items: Path | None = None, columns: Mapping[str, str] | None = None) -> Source:
    """Interactions with a user, an item and a timestamp column, and optionally a table of the items.

    ``columns`` maps any of `COLUMNS` to the name it has in the files. Timestamps are Unix seconds, or dates and times (UTC where
    they name no zone); empty means unknown. The items' ``attributes`` are a list of strings, or one string with ``|`` between
    them, and may be missing unless ``columns`` names them. An item that the items table does not list is added without a
    title (counted).
    """
    named = dict(columns or {})
    if unknown := set(named) - set(COLUMNS):
        raise UserError(f"unknown column role {sorted(unknown)[0]!r}; roles: {', '.join(COLUMNS)}")
    names = COLUMNS | named
    catalogue: list[Item] = []
    if items is not None:
        catalogue = list(_items(items, names, attributes_required="attributes" in named))
    item_of = {item.key: code for code, item in enumerate(catalogue)}
    known = len(catalogue)
    user_of: dict[str, int] = {}
    users, codes, times = [], [], []
    row = 1
    wanted = [names["user"], names["item"], names["timestamp"]]
    for batch in _batches(interactions, wanted):
        users.append(_codes(batch.column(0), user_of, wanted[0], interactions, row))
        codes.append(_codes(batch.column(1), item_of, wanted[1], interactions, row))
        times.append(_seconds(batch.column(2), wanted[2], interactions, row))
        row += batch.num_rows
    catalogue += [Item(key) for key in list(item_of)[known:]]
    return Source(
        items=catalogue,
        user_keys=list(user_of),
        users=np.concatenate([np.zeros(0, np.int32), *users]),
        codes=np.concatenate([np.zeros(0, np.int32), *codes]),
        times=np.concatenate([np.zeros(0, np.int64), *times]),
        repairs={"unknown_items_added": len(catalogue) - known if items is not None else 0},
    )


def _items(path: Path, names: Mapping[str, str], attributes_required: bool) -> Iterator[Item]:
    wanted = [names["key"], names["title"]]
    if attributes_required or names["attributes"] in _column_names(path):
        wanted.append(names["attributes"])
    row, row_of = 0, dict[str, int]()
    for batch in _batches(path, wanted):
        keys = _text(batch.column(0), wanted[0], path).to_pylist()
        titles = _text(batch.column(1), wanted[1], path).to_pylist()
        attributes = batch.column(2).to_pylist() if len(wanted) == 3 else [None] * len(keys)
        for key, title, names_ in zip(keys, titles, attributes, strict=True):
            row += 1
            if not key:
                raise UserError(f"{path}: row {row}: column '{wanted[0]}' is empty")
            if key in row_of:
                raise UserError(f"{path}: row {row}: item '{key}' appears a second time (first in row {row_of[key]})")
            row_of[key] = row
            yield Item(key, title or "", _attributes(names_, path, row))


def _attributes(value: Any, path: Path, row: int) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(name for name in value.split("|") if name)
    if isinstance(value, list):
        return tuple(str(v) for v in value if v is not None)
    raise UserError(
        f"{path}: row {row}: attributes must be a list of strings or one string with '|' between, found {value!r:.80}"
    )


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix in {".parquet", ".pq"}:
        return True
    if _delimiter(path) is not None:
        return False
    raise UserError(f"{path}: the file's name must end in .parquet, .csv, .tsv, .csv.gz or .tsv.gz")


def _delimiter(path: Path) -> str | None:
    return DELIMITERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _column_names(path: Path) -> list[str]:
    if _is_parquet(path):
        try:
            return list(pq.read_schema(path).names)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    for number, header in lines.read_lines(path):
        try:
            return next(csv.reader([header.decode("utf-8-sig")], delimiter=_delimiter(path) or ","))
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8 text") from None
    raise UserError(f"{path}: empty; a header with the columns' names is needed")


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The named columns in the given order, a batch at a time; every column of a CSV is read as text."""
    there = _column_names(path)
    for column in columns:
        if column not in there:
            raise UserError(f"{path}: no column '{column}'; columns there: {', '.join(there) or 'none'}")
    row = 0
    try:
        if _is_parquet(path):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=list(columns)):
                    row += batch.num_rows
                    yield batch.select(list(columns))
            return
        with pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(use_threads=False),  # one thread: a parse error then tells its row
            parse_options=pacsv.ParseOptions(delimiter=_delimiter(path), newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(
                include_columns=list(columns),
                column_types={column: pa.string() for column in columns},
                null_values=[""],
                strings_can_be_null=True,
            ),
        ) as reader:
            for batch in reader:
                row += batch.num_rows
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or malformed after row {row}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _text(column: pa.Array, name: str, path: Path) -> pa.Array:
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(f"{path}: column '{name}' is {column.type}, expected text or integers ({_first_line(error)})") from None


def _codes(column: pa.Array, code_of: dict[str, int], name: str, path: Path, first_row: int) -> NDArray[np.int32]:
    """Codes of a batch's keys; new keys are added to ``code_of``. Python sees each distinct key once a batch."""
    texts = _text(column, name, path)
    empty = pc.fill_null(pc.equal(texts, ""), True).to_numpy(zero_copy_only=False)
    if empty.any():
        raise UserError(f"{path}: row {first_row + int(empty.argmax())}: column '{name}' is empty")
    encoded = texts.dictionary_encode()
    codes = [code_of.setdefault(key, len(code_of)) for key in encoded.dictionary.to_pylist()]
    coded: NDArray[np.int32] = np.asarray(codes, dtype=np.int32)[encoded.indices.to_numpy()]
    return coded


def _seconds(column: pa.Array, name: str, path: Path, first_row: int) -> NDArray[np.int64]:
    seconds = _cast_seconds(column)
    if seconds is None:
        bad = next(i for i in range(len(column)) if _cast_seconds(column.slice(i, 1)) is None)
        raise UserError(
            f"{path}: row {first_row + bad}: column '{name}' must be Unix seconds or a date and time, "
            f"found {column[bad].as_py()!r:.80}"
        )
    return np.asarray(pc.fill_null(seconds, UNKNOWN_TIME).to_numpy(), dtype=np.int64)


def _cast_seconds(column: pa.Array) -> pa.Array | None:
    """int64 Unix seconds with nulls, or None where some value is no time. Fractions of a second are cut off."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        for kind in (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
            try:
                return _cast_seconds(column.cast(kind))
            except pa.ArrowException:
                continue
        return None
    try:
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("us"), safe=False).cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        if pa.types.is_floating(column.type):
            column = pc.floor(pc.if_else(pc.is_nan(column), None, column))
        return column.cast(pa.int64())
    except pa.ArrowException:
        return None
