"""Reading text files line by line, with every fault named by file and line."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gr.errors import UserError, first_line

GZIP_MAGIC = b"\x1f\x8b"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its line end) of a plain or gzip file, told apart by their first bytes.

    Blank lines are skipped. UserError for a missing file, and for a gzip stream that ends early or fails its check.
    """
    number = 0
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == GZIP_MAGIC
        with gzip.open(path, "rb") if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip(b"\r\n")
    except EOFError:
        raise UserError(f"{path}: truncated gzip file: it ends early, after about line {number}; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file after about line {number} ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_objects(path: Path, parse: Callable[[bytes], Any] = json.loads) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file with one JSON object per line; UserError names the line that is not one."""
    for number, line in read_lines(path):
        try:
            value = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise UserError(f"{path}:{number}: not a JSON object ({first_line(error)}); is the file complete?") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
        yield number, value


def field(row: dict[str, Any], column: str, path: Path, number: int) -> Any:
    """``row[column]``; UserError names the missing column and those that are there."""
    try:
        return row[column]
    except KeyError:
        there = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(f"{path}:{number}: no column '{column}'; columns there: {there}") from None


def text_key(value: Any, column: str, path: Path, number: int) -> str:
    """A user's or item's key as text; numbers are accepted, anything else (or nothing) is a UserError."""
    if type(value) is str and value:
        return value
    if type(value) is int:
        return str(value)
    raise UserError(f"{path}:{number}: column '{column}' must be a non-empty string or an integer, found {value!r}")


def text_list(value: Any, column: str, path: Path, number: int) -> list[str]:
    """A list of strings, [] for null."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    raise UserError(f"{path}:{number}: column '{column}' must be a list of strings, found {value!r:.80}")


def text(value: Any, column: str, path: Path, number: int) -> str:
    """A string, "" for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise UserError(f"{path}:{number}: column '{column}' must be a string, found {value!r:.80}")
