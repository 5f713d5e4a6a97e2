"""Reading a table of (sizes, metric) from memory or disk, and refusing what is not one.

A *role* is a law's own name for a column (N, D, R, L); `columns` maps roles to the table's names.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from fit.errors import FitError

Floats = NDArray[np.float64]
TableLike: TypeAlias = pa.Table | Mapping[str, ArrayLike] | str | Path


def read_table(source: TableLike) -> pa.Table:
    """A pyarrow Table from a Table, a mapping of arrays, or a path: .csv, .parquet, .jsonl, or a folder of .parquet.

    Raises FitError when the file is missing, unreadable, of another kind or empty.
    """
    if isinstance(source, pa.Table):
        table = source
    elif isinstance(source, Mapping):
        try:
            table = pa.Table.from_arrays([_array(values) for values in source.values()], [str(name) for name in source])
        except pa.ArrowException as error:
            raise FitError(f"the table's columns do not make a table: {_one_line(error)}") from None
    else:
        table = _read_path(Path(source))
    if table.num_rows == 0:
        raise FitError(f"{_name(source)}: no rows")
    return table


def _array(values: ArrayLike) -> pa.Array:
    array = np.asarray(values)
    if array.dtype.kind in "iuf" and array.ndim == 1:
        # Not pa.array: it loads pandas where that is installed, most of a second.
        return pa.Array.from_buffers(pa.float64(), len(array), [None, pa.py_buffer(np.ascontiguousarray(array, np.float64))])
    return pa.array(array.tolist())


def _name(source: TableLike) -> str:
    return str(source) if isinstance(source, str | Path) else "the table"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_path(path: Path) -> pa.Table:
    # Each reader is imported when its kind of file is met: together they cost more than the fit of a small table.
    try:
        if path.is_dir():
            import pyarrow.parquet as pq

            files = sorted(path.glob("*.parquet"))
            if not files:
                raise FitError(f"{path}: a folder without .parquet files")
            return pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive")
        if not path.is_file():
            raise FitError(f"{path}: no such file or folder")
        if path.suffix == ".csv":
            from pyarrow import csv

            # Only an empty cell is none: "n/a" or "NaN" are then named as what they are.
            return csv.read_csv(path, convert_options=csv.ConvertOptions(null_values=[""]))
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path)
        if path.suffix in (".jsonl", ".ndjson", ".json"):
            from pyarrow import json

            try:
                return json.read_json(path)
            except pa.ArrowInvalid:
                return _json_lines(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FitError(f"{path}: cannot be read: {_one_line(error)}") from None
    raise FitError(f"{path}: unknown kind of table; .csv, .parquet, .jsonl (one object a line) or a folder of .parquet")


def _json_lines(path: Path) -> pa.Table:
    """What pyarrow refuses: a column of mixed types is read as text, so that its first bad cell can be named, and so can a line
    that is no object."""
    import json

    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise FitError(f"{path}, line {number}: not JSON ({_one_line(error)}); one object a line is needed") from None
        if not isinstance(rows[-1], dict):
            raise FitError(f'{path}, line {number}: not a JSON object; one object a line is needed, such as {{"N": 1e6}}')
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        cells = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(cells)
        except pa.ArrowException:
            columns[name] = pa.array([None if cell is None else str(cell) for cell in cells])
    return pa.table(columns)


def column(table: pa.Table, name: str, role: str = "") -> pa.ChunkedArray:
    if (count := table.column_names.count(name)) > 1:
        raise FitError(f"column {name!r} is there {count} times; one of them needs another name")
    if count:
        return table.column(name)
    close = get_close_matches(name, table.column_names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(table.column_names)}"
    raise FitError(f"no column {name!r}{f' (for {role})' if role else ''}; {hint}")


def numbers(table: pa.Table, name: str, role: str = "") -> Floats:
    """One column as float64; FitError names the first cell that is empty, not a number, or not finite."""
    cells = column(table, name, role)
    numeric = pa.types.is_integer(cells.type) or pa.types.is_floating(cells.type)
    if numeric and cells.null_count == 0:
        chunks = [np.from_dlpack(chunk) for chunk in cells.chunks]  # to_numpy, too, loads pandas
        values: Floats = np.concatenate(chunks).astype(np.float64)
    else:
        values = np.array([_number(cell, name, row) for row, cell in enumerate(cells.to_pylist(), 1)])
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise FitError(f"column {name!r}, row {bad[0] + 1}: {values[bad[0]]} is not a finite number; drop the row or correct it")
    return values


def _number(cell: Any, name: str, row: int) -> float:
    if cell is None or cell == "":
        raise FitError(f"column {name!r}, row {row}: empty; a number is needed in every row")
    if isinstance(cell, bool):
        raise FitError(f"column {name!r}, row {row}: {cell} is not a number")
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise FitError(f"column {name!r}, row {row}: {str(cell)[:40]!r} is not a number") from None


def sizes(table: pa.Table, name: str, role: str) -> Floats:
    """A column of sizes: finite and above zero."""
    return _positive(table, name, role, "sizes")


def weights(table: pa.Table, name: str) -> Floats:
    """A column of weights: finite and above zero."""
    return _positive(table, name, "the weights", "weights")


def _positive(table: pa.Table, name: str, role: str, what: str) -> Floats:
    values = numbers(table, name, role)
    bad = np.flatnonzero(values <= 0)
    if bad.size:
        raise FitError(f"column {name!r} (for {role}), row {bad[0] + 1}: {values[bad[0]]:g}; {what} must be above zero")
    return values


def labels(table: pa.Table, name: str) -> NDArray[np.intp]:
    """A column of any type as group numbers 0.., one per row."""
    _, groups = np.unique([str(cell) for cell in column(table, name).to_pylist()], return_inverse=True)
    return groups.astype(np.intp)


def where(table: pa.Table, conditions: Mapping[str, str]) -> pa.Table:
    """The rows whose cells equal the given values (numbers by value, all else by text); FitError when none does."""
    for name, wanted in conditions.items():
        cells = column(table, name).to_pylist()
        keep = [_equal(cell, wanted) for cell in cells]
        if not any(keep):
            seen = sorted({str(cell) for cell in cells})
            shown = ", ".join(seen[:8]) + (" …" if len(seen) > 8 else "")
            raise FitError(f"no row has {name}={wanted}; there are {shown}")
        table = table.filter(pa.array(keep))
    return table


def _equal(cell: Any, wanted: str) -> bool:
    if isinstance(cell, int | float) and not isinstance(cell, bool):
        try:
            return float(wanted) == float(cell)
        except ValueError:
            return False
    return str(cell) == wanted


def rungs(size_columns: list[Floats]) -> NDArray[np.intp]:
    """Group numbers 0.. of rows that have the same sizes (but for rounding), ordered by the first size."""
    codes = []
    for values in size_columns:
        logs = np.log(values)
        order = np.argsort(logs, kind="stable")
        code = np.empty(len(values), dtype=np.intp)
        code[order] = np.concatenate([[0], np.cumsum(np.diff(logs[order]) > 1e-9)])
        codes.append(code)
    _, groups = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    return groups.reshape(-1).astype(np.intp)
