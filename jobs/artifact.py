"""The artifact of a finished stage: a folder with a manifest, in place whole or not there at all."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gr.files import read_json, sha256, write_json

MANIFEST = "artifact.json"
VERSIONS_OF = ("grscale", "torch", "transformers", "accelerate", "peft", "numpy", "pyarrow")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, None where there is none."""
    file = folder / MANIFEST
    return read_json(file) if file.is_file() else None


def versions() -> dict[str, str]:
    """The installed versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_manifest(
    folder: Path,
    *,
    stage: str,
    id: str,
    config: dict[str, Any],
    inputs: dict[str, str],
    launch: dict[str, Any],
    started: float,
    facts: dict[str, Any],
) -> None:
    """Writes ``folder``'s manifest, with a checksum of every other file in it; the last thing before the rename."""
    files = {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(
        folder / MANIFEST,
        {
            "stage": stage,
            "id": id,
            "config": config,
            "inputs": inputs,
            "launch": launch,
            "versions": versions(),
            "host": platform.node(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 3),
            "files": files,
            "facts": facts,
        },
    )
