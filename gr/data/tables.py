"""Interactions and items from CSV, TSV or Parquet tables with named columns."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gr.data import lines
from gr.data.dataset import Item
from gr.data.readers import UNKNOWN_TIME, Source
from gr.errors import UserError, first_line

COLUMNS = {
    "user": "user",
    "item": "item",
    "timestamp": "timestamp",
    "key": "key",
    "title": "title",
    "attributes": "attributes",
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DATE = r"^\d{4}-"
SPELLINGS = (  # of a time in text, and what arrow reads it as; the first that matches
    (r"^-?\d+$", pa.int64()),
    (DATE + r".*[T ].*(Z|[+-][\d:]+)$", pa.timestamp("us", "UTC")),
    (DATE, pa.timestamp("us")),
    ("", pa.float64()),
)


def read_table(interactions: Path, items: Path | None = None, columns: Mapping[str, str] | None = None) -> Source:
    """Interactions with a user, an item and a timestamp column, and optionally a table of the items.

    ``columns`` maps any of `COLUMNS` to the name it has in the files. Timestamps are Unix seconds throughout, or dates and times
    throughout (UTC where they name no zone); empty means unknown. The items' ``attributes`` are a list of strings, or one string
    with ``|`` between them, and may be missing unless ``columns`` names them. An item that the items table does not list is added
    without a title (counted).
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
    clock = _Times(wanted[2], interactions)
    for batch in _batches(interactions, wanted):
        users.append(_codes(batch.column(0), user_of, wanted[0], interactions, row))
        codes.append(_codes(batch.column(1), item_of, wanted[1], interactions, row))
        times.append(clock.seconds(batch.column(2), row))
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
            raise UserError(f"{path}: not a readable Parquet file ({first_line(error)})") from None
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
        if there.count(column) > 1:
            raise UserError(f"{path}: {there.count(column)} columns are named '{column}'; each needs its own name")
    row = 0
    try:
        if _is_parquet(path):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=list(columns)):
                    batch.validate(full=True)  # a file may say UTF-8 of text that is not; CSV's reader checks by itself
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
        raise UserError(f"{path}: damaged or malformed after row {row}: {first_line(error)}") from None


def _nan_as_null(column: pa.Array) -> pa.Array:
    """pandas writes what is missing among numbers as NaN."""
    return pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column


def _text(column: pa.Array, name: str, path: Path) -> pa.Array:
    try:
        return _nan_as_null(column).cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(f"{path}: column '{name}' is {column.type}, expected text or integers ({first_line(error)})") from None


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


class _Times:
    """Reads a column of timestamps, a batch at a time.

    One of text is numbers throughout or dates throughout, as its first value is: where a batch happens to end must not matter.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._name, self._path = name, path
        self._dates: bool | None = None

    def seconds(self, column: pa.Array, first_row: int) -> NDArray[np.int64]:
        """(rows,) Unix seconds, UNKNOWN_TIME for null; UserError names the first row that can't be read."""
        other = self._of_other_kind(column)
        seconds = _cast_seconds(column)
        if seconds is None or other.any():
            self._refuse(column, other, first_row)
        return np.asarray(pc.fill_null(seconds, UNKNOWN_TIME).to_numpy(), dtype=np.int64)

    def _of_other_kind(self, column: pa.Array) -> NDArray[np.bool_]:
        if not _is_text(column):
            return np.zeros(len(column), dtype=bool)
        dates = pc.match_substring_regex(column, DATE)
        if self._dates is None and dates.null_count < len(dates):
            self._dates = dates.drop_null()[0].as_py()
        other: NDArray[np.bool_] = pc.fill_null(pc.not_equal(dates, self._dates), False).to_numpy(zero_copy_only=False)
        return other

    def _refuse(self, column: pa.Array, other: NDArray[np.bool_], first_row: int) -> NoReturn:
        bad = next(i for i in range(len(column)) if other[i] or _cast_seconds(column.slice(i, 1)) is None)
        found = f"{self._path}: row {first_row + bad}: column '{self._name}'"
        value = f"found {column[bad].as_py()!r:.80}"
        if _cast_seconds(column.slice(bad, 1)) is None:
            raise UserError(f"{found} must be Unix seconds or a date and time, {value}")
        before = "dates" if self._dates else "Unix seconds"
        raise UserError(f"{found} must be all Unix seconds or all dates, {value} after {before}")


def _is_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _cast_seconds(column: pa.Array) -> pa.Array | None:
    """int64 Unix seconds with nulls, or None where some value is no time. Fractions of a second are cut off."""
    try:
        if _is_text(column):
            return _parse_seconds(column)
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            return column.cast(pa.timestamp("us"), safe=False).cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        if pa.types.is_floating(column.type):
            column = pc.floor(_nan_as_null(column))
        return column.cast(pa.int64())
    except pa.ArrowException:
        return None


def _parse_seconds(texts: pa.Array) -> pa.Array | None:
    """`_cast_seconds` of text, where each value has its own spelling: arrow casts no column that mixes them."""
    seconds = pa.nulls(len(texts), pa.int64())
    for pattern, kind in SPELLINGS:
        if texts.null_count == len(texts):
            break
        matches = pc.match_substring_regex(texts, pattern)
        part = _cast_seconds(pc.if_else(matches, texts, None).cast(kind))
        if part is None:
            return None
        seconds, texts = pc.coalesce(seconds, part), pc.if_else(matches, None, texts)
    return seconds
