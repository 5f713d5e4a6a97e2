"""A thread beside the training: it ends a process that has stopped moving, with the reason and where every thread stands, and
starts one anew whose neighbour ran out of memory."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jobs.runtime import Context, fail
from jobs.smaller import accumulation, restart

SECONDS = {"step": 600.0, "validation": 3600.0, "checkpoint": 3600.0}
"""How long each may take at least before it counts as hanging; a process's first one may take as long as a validation."""
FACTOR = 20
"""And at least this many times the longest one of its kind so far in this process."""
LAST = 60.0
"""Seconds after which a process that can't run even this thread is ended from outside of Python."""
POLL = 0.5


class Watch:
    """Watches the main thread of one process. GRSCALE_HANG_SECONDS sets the floor of every kind."""

    def __init__(self, context: Context[Any], accumulation: int) -> None:
        self._context, self._accumulation = context, accumulation
        self._longest = dict.fromkeys(SECONDS, 0.0)
        self._doing: tuple[str, int, float] | None = None  # kind, step, when it began
        self._floor = os.environ.get("GRSCALE_HANG_SECONDS")
        threading.Thread(target=self._run, daemon=True).start()

    @contextmanager
    def during(self, kind: str, step: int) -> Iterator[None]:
        """The block is one of ``kind``."""
        began = time.monotonic()
        self._doing = (kind, step, began)
        faulthandler.dump_traceback_later(self._limit(kind) + LAST, exit=True)
        try:
            yield
        finally:
            self._doing = None
            faulthandler.cancel_dump_traceback_later()
        self._longest[kind] = max(self._longest[kind], time.monotonic() - began)

    def _limit(self, kind: str) -> float:
        least = SECONDS[kind] if self._longest[kind] else max(SECONDS.values())
        return max(float(self._floor or least), FACTOR * self._longest[kind])

    def _run(self) -> None:
        while True:
            time.sleep(POLL)
            if accumulation(self._context) > self._accumulation:
                restart(self._context)
            doing = self._doing
            if doing is not None and time.monotonic() - doing[2] > self._limit(doing[0]):
                kind, step, _ = doing
                sys.stdout.flush()
                faulthandler.dump_traceback(all_threads=True)
                longest = f"{self._longest[kind]:.1f} s" if self._longest[kind] else "none before"
                reason = f"hangs: {kind} {step} goes on for over {self._limit(kind):.0f} s (longest so far: {longest})"
                fail(self._context.work, f"{reason}; the log has where every thread stands", 1)
