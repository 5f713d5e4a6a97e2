"""Whether this machine can run a study, and if not, what is missing."""

import importlib
import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

LEAST_MEMORY = 4 << 30
LEAST_DISK = 2 << 30

Check = tuple[bool, str, str]
"""(good, what, finding)."""


def check() -> list[Check]:
    """Every finding, good or bad; nothing is changed on the machine."""
    memory, disk = psutil.virtual_memory().total, shutil.disk_usage(Path.cwd()).free
    found: list[Check] = [
        (sys.version_info >= (3, 11), "python", f"{platform.python_version()} (needs 3.11)"),
        (True, "cores", f"{len(os.sched_getaffinity(0))}"),
        (memory >= LEAST_MEMORY, "memory", f"{memory / 2**30:.1f} GiB (needs {LEAST_MEMORY >> 30})"),
        (disk >= LEAST_DISK, "disk", f"{disk / 2**30:.1f} GiB free here (needs {LEAST_DISK >> 30})"),
    ]
    return (
        found + _packages() + [_imports(name) for name in ("torch", "transformers", "accelerate", "peft", "ray.tune")] + [_gpu()]
    )


def _packages() -> list[Check]:
    """The installed versions against what the project's metadata asks for."""
    try:
        needed = requires("grscale") or []
    except PackageNotFoundError:
        return [(False, "grscale", "not installed in this Python; `pip install -e .` in the project's folder")]
    found: list[Check] = []
    for requirement in needed:
        if ";" in requirement:
            continue  # an extra
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?", requirement)
        if match is None:
            continue
        name, least = match.groups()
        try:
            got = version(name)
        except PackageNotFoundError:
            found.append((False, name, f"not installed (needs {requirement})"))
            continue
        good = least is None or _numbers(got) >= _numbers(least)
        found.append((good, name, f"{got}" + (f" (needs {least})" if least else "")))
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def _imports(name: str) -> Check:
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken native library can raise anything; the finding is the point
        return False, f"import {name}", f"{type(error).__name__}: {' '.join(str(error).split())}"
    return True, f"import {name}", "works"


def _gpu() -> Check:
    try:
        import torch
    except ImportError:
        return True, "GPU", "unknown (no torch)"
    if not torch.cuda.is_available():
        return True, "GPU", "none; studies run on the CPU"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, "GPU", ", ".join(names)


def doctor() -> int:
    """Prints the findings; 1 if one of them is bad."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    findings = check()
    for good, what, finding in findings:
        print(f"{'ok  ' if good else 'BAD '} {what}: {finding}")
    bad = [what for good, what, _ in findings if not good]
    print("all is well" if not bad else f"to mend: {', '.join(bad)}")
    return 1 if bad else 0
