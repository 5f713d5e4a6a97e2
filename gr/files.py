"""Writing folders and files whole, or not at all."""

import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from gr.errors import UserError, first_line


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a file's name beside ``path`` to write at; it is renamed to ``path`` when the block ends without an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    yield aside
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` whole, see `whole_file`; NaN and infinity are refused."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a folder that was written whole; UserError where it is cut, damaged or no object."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); its folder must be made again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged (not a JSON object); its folder must be made again")
    return value


def check_file(folder: Path, entry: Mapping[str, Any]) -> None:
    """UserError unless the file that a manifest lists as ``entry`` is in ``folder``, bit for bit."""
    file = folder / entry["file"]
    if not file.is_file():
        raise UserError(f"{file}: missing; the manifest lists it")
    if sha256(file) != entry["sha256"]:
        raise UserError(f"{file}: damaged (its checksum is not the manifest's); its folder must be made again")


@contextmanager
def usable(out: Path) -> Iterator[None]:
    """UserError where the block finds that no folder can be made or looked into at ``out``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: no folder can be written there ({error.strerror}); name another") from None


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside ``out`` to write in; it becomes ``out`` when the block ends without an error.

    A folder that is already at ``out`` is replaced. If the block raises, what it wrote is removed and ``out`` is left as it was.
    What a killed process left of its try at the same ``out`` is removed first.
    """
    with usable(out):
        out = out.resolve()  # "." can't be renamed
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}@{platform.node()}.", dir=out.parent))
    try:
        aside.chmod(0o755)  # mkdtemp's 0700 would hide an artifact from the other users of a shared file system
        yield aside
        if out.exists():
            _exchange(aside, out)
        else:
            aside.replace(out)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _sweep(out: Path) -> None:
    """Removes the folders aside whose writers, on this machine, are dead; of other machines' nothing is known."""
    half = re.compile(rf"\.{re.escape(out.name)}\.(\d+)@{re.escape(platform.node())}\.\w+")
    for path in out.parent.iterdir():
        if (found := half.fullmatch(path.name)) and path.is_dir() and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _exchange(aside: Path, out: Path) -> None:
    """Puts ``aside`` in the place of the folder at ``out``, which goes back where that fails."""
    holder = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    old = holder / "old"
    try:
        out.replace(old)
        aside.replace(out)
    finally:
        if old.exists() and not out.exists():
            old.replace(out)
        shutil.rmtree(holder)  # not reached where the old folder can't go back: it must not be lost
