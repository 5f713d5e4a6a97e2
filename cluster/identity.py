"""The identity of a stage: a hash of everything that changes its result, and of nothing else."""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

LENGTH = 16
"""Hexadecimal digits kept (64 bits)."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces; tuples are lists. TypeError for what has no single spelling: NaN, paths, functions."""
    _check(value, "")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _check(value: Any, where: str) -> None:
    if value is None or isinstance(value, bool | int | str):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where or 'value'}: {value} has no place in an identity")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            _check(part, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where or 'value'}: key {key!r} is not a string")
            _check(part, f"{where}.{key}" if where else key)
    else:
        raise TypeError(f"{where or 'value'}: a {type(value).__name__} has no place in an identity")


def identity(
    stage: str,
    interface: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    processes: int,
    launch: Mapping[str, Any] | None = None,
) -> str:
    """The stage's identity. ``inputs``: name -> identity of the artifact, or the fingerprint of a folder from outside.

    Placement and paths are left out; the number of processes is in, because sums in another order give other weights, and so is
    what else of `launch` is not the default (`jobs.options.Launch.identity`).
    """
    text = canonical(
        {
            "stage": stage,
            "interface": interface,
            "config": dict(config),
            "inputs": dict(inputs),
            **(launch or {}),
            "processes": processes,
        }
    )
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]
