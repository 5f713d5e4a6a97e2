"""The data of the benchmarks: Amazon Beauty where it is there, or a planted world."""

from pathlib import Path

from gr.data.dataset import Dataset
from gr.data.importer import import_dataset
from gr.data.planted import World, plant
from gr.data.split import LeaveOneOut, Split, prepare_split

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "amazon-beauty"


def leave_one_out(folder: Path, world: World | None = None) -> Split:
    """A split, made in ``folder``, of Amazon Beauty or of ``world``."""
    data, parts = folder / "data", folder / "split"
    if world is None:
        import_dataset("jsonl", [DATA / "sequences.jsonl.gz", DATA / "items.jsonl.gz"], data)
    else:
        plant(world, data)
    parts.mkdir()
    prepare_split(Dataset(data), LeaveOneOut(), parts)
    return Split(parts)
