"""A study on object storage: a folder of this machine that is filled from a URL before a run and mirrored to it while it goes on.

An object is there whole or not at all, a folder of them is not: of an artifact the manifest goes up last, and what comes down is
compared with the checksums in it. Names hold the hash of what they are the result of, so two writers write the same.
"""

import hashlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from cluster.store import Store
from gr.errors import UserError, first_line
from gr.files import read_json, sha256, whole_folder
from jobs.artifact import MANIFEST, read_manifest

CACHE = Path("runs") / ".remote"
EVERY = 5.0
"""Seconds between two looks for artifacts and rows to send."""
_SMALL = ("study.yaml", "plan.json", "failures.json", "widths.parquet", "metrics/*.parquet", "tuning/*.json", "report/*")
_LOGS = ("work/*/log.txt", "work/*/failure.json", "work/*/metrics.jsonl")
_CAUSES = {
    "NO_SUCH_BUCKET": "no such bucket; make it first",
    "INVALID_ACCESS_KEY_ID": "the storage does not know these credentials",
    "ACCESS_DENIED": "no permission, or no credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a profile)",
}
logger = logging.getLogger(__name__)


class Mirror:
    """The study at ``url`` and its ``folder`` on this machine; ``name``: the URL without user and query, which may be secret."""

    def __init__(self, url: str, cache: Path = CACHE) -> None:
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
        self.folder = cache / hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self._sent: set[tuple[str, int, int]] = set()
        self._damaged: set[str] = set()
        with self._named():
            self.files, self.root = pafs.FileSystem.from_uri(url)
            if self.files.get_file_info(self.root.split("/")[0] or "/").type == pafs.FileType.NotFound:
                raise UserError(f"{self.name}: no such bucket; make it first")

    def pull(self) -> None:
        """Brings what is there and not here: the study's files, and artifacts, each checked against its manifest."""
        with self._named():
            found = self.files.get_file_info(pafs.FileSelector(self.root, recursive=True, allow_not_found=True))
            locked = Store(self.folder).locked()  # a run is at work here: what it writes is newer
            names = {info.path[len(self.root) :].lstrip("/") for info in found if info.type == pafs.FileType.File}
            for name in sorted(names):
                if any(PurePosixPath(name).match(pattern) for pattern in (*_SMALL, *_LOGS)) and _inside(name):
                    if not locked or not (self.folder / name).exists():
                        self._download(name, self.folder / name)
                elif name.startswith("artifacts/") and name.endswith(f"/{MANIFEST}") and name.count("/") == 3:
                    self._pull_artifact(name.removesuffix(f"/{MANIFEST}"))

    def push(self) -> None:
        """Sends what is finished here and not there."""
        with self._named():
            for manifest in sorted(self.folder.glob(f"artifacts/*/[!.]*/{MANIFEST}")):
                self._push_artifact(manifest.parent)
            gone = f"{self.root}/failures.json"  # of a run in which nothing failed there is none
            if not (self.folder / "failures.json").is_file() and self.files.get_file_info(gone).type == pafs.FileType.File:
                self.files.delete_file(gone)
            for pattern in (*_SMALL, *_LOGS):
                for file in sorted(self.folder.glob(pattern)):
                    if not file.name.startswith("."):
                        self._upload(file)

    @contextmanager
    def kept(self) -> Iterator[Path]:
        """Pulls, yields the folder, pushes all the while and, however the block ends, once more.

        UserError where the last push fails: what is finished is then in the folder, and goes up with the next run.
        """
        self.pull()
        over = threading.Event()

        def work() -> None:
            while not over.wait(EVERY):
                try:
                    self.push()
                except (UserError, OSError) as error:  # tried again, and the last time not forgiven
                    logger.warning("%s", error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield self.folder
        finally:
            over.set()
            thread.join()
            self.push()
            print(f"stored: {self.name}", file=sys.stderr)

    def _pull_artifact(self, name: str) -> None:
        here = self.folder / name
        if not _inside(name) or read_manifest(here) is not None:
            return
        try:
            with whole_folder(here) as aside:
                self._download(f"{name}/{MANIFEST}", aside / MANIFEST)
                manifest: dict[str, Any] = read_json(aside / MANIFEST)
                for file, digest in manifest["files"].items():
                    if not _inside(file):
                        raise ValueError(f"{file!r} is no name of a file in it")
                    self._download(f"{name}/{file}", aside / file)
                    if sha256(aside / file) != digest:
                        raise ValueError(f"the checksum of {file} is not the manifest's")
        except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
            self._damaged.add(name)
            print(f"{self.name}/{name}: damaged ({first_line(error)}); it is made again", file=sys.stderr)

    def _push_artifact(self, folder: Path) -> None:
        name = folder.relative_to(self.folder).as_posix()
        there = f"{self.root}/{name}/{MANIFEST}"
        if (name, 0, 0) in self._sent:
            return
        if name in self._damaged and self.files.get_file_info(there).type == pafs.FileType.File:
            self.files.delete_file(there)  # or the files of two makings would lie under the old manifest
        if self.files.get_file_info(there).type == pafs.FileType.NotFound:
            for file in (read_manifest(folder) or {})["files"]:
                self._upload(folder / file)
            self._upload(folder / MANIFEST)
        self._damaged.discard(name)
        self._sent.add((name, 0, 0))

    def _upload(self, file: Path) -> None:
        name, stat = file.relative_to(self.folder).as_posix(), file.stat()
        if (name, stat.st_size, stat.st_mtime_ns) in self._sent:
            return
        target = f"{self.root}/{name}"
        if isinstance(self.files, pafs.LocalFileSystem):
            self.files.create_dir(target.rpartition("/")[0])
        pafs.copy_files(str(file.resolve()), target, pafs.LocalFileSystem(), self.files)
        self._sent.add((name, stat.st_size, stat.st_mtime_ns))

    def _download(self, name: str, to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        aside = to.with_name(f".{to.name}.part")
        pafs.copy_files(f"{self.root}/{name}", str(aside.resolve()), self.files, pafs.LocalFileSystem())
        aside.replace(to)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Says in one line what the storage refused; of the URL no more than may be shown."""
        try:
            yield
        except FileNotFoundError as error:
            raise UserError(f"{self.name}: {first_line(error)}") from None
        except (OSError, ValueError) as error:  # Arrow's are among them
            text = first_line(error)
            cause = next((words for code, words in _CAUSES.items() if code in text), None)
            kind = f"{type(error).__name__}, nothing more is shown, for it could hold a secret"
            raise UserError(f"{self.name}: {cause or kind}") from None


def _inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\0" in part for part in parts)
