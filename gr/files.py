"""Writing folders and files whole, or not at all."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` beside ``path`` and renames it into place; NaN and infinity are refused."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside ``out`` to write in; it becomes ``out`` when the block ends without an error.

    A folder that is already at ``out`` is replaced. If the block raises, what it wrote is removed and ``out`` is left as it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    aside.chmod(0o755)  # mkdtemp's 0700 would hide an artifact from the other users of a shared file system
    try:
        yield aside
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.replace(old / "old")
            aside.replace(out)
            shutil.rmtree(old)
        else:
            aside.replace(out)
    finally:
        if aside.exists():
            shutil.rmtree(aside)
