"""A job dies with the process that started it: a killed launcher leaves no rank that goes on writing beside the retry."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Linux: SIGKILL for this process when its parent ends. Elsewhere nothing."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def launched() -> bool:
    """Whether a study's trial or accelerate's launcher started this process; one that a person started may outlive the shell.

    For one process accelerate's launcher sets no WORLD_SIZE; ACCELERATE_MIXED_PRECISION it always sets.
    """
    return any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "GRSCALE_TRIAL"))
