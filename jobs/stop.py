"""What training does when it is asked to end: it goes on to the end of the step, saves, and exits."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Of a study that is stopped, and of a batch system before its time limit."""
EXIT = 128 + signal.SIGTERM


class StopRequest:
    """Whether this process was asked to end. Its neighbours may not have been yet: all have to agree on the step."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """In the block the signals only set ``asked``. Once asked they stay caught: launchers signal twice, and the second signal
        must not break off what the first began."""
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            if not self.asked:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 -- signal's own signature
        self.asked = True
