"""Work that processes share, and that goes on after a kill: chunks of it are files that come whole, in a folder of the run's own.

The chunks depend on neither the number of processes nor on what a killed run had done, so neither does a bit of the result.
Processes take them in turn. The first one waits for those of the others; a launcher ends them all where one fails.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from jobs.runtime import Context


def chunk_folder(context: Context[Any]) -> Path:
    """Where this run's chunks lie, and those of no other configuration; removed when the artifact is in place.

    Of the launch only the precision is part of it: a run may be gone on with by another number of processes.
    """
    signature = context.signature() | {"launch": context.run.launch.precision}
    name = "chunks-" + hashlib.sha256(json.dumps(signature, sort_keys=True).encode()).hexdigest()[:16]
    place = context.work / "checkpoint"
    if context.is_main and place.is_dir():
        for other in place.iterdir():
            if other.name != name:
                shutil.rmtree(other)
    (place / name).mkdir(parents=True, exist_ok=True)
    return place / name
