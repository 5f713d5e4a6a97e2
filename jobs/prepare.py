"""Splits a dataset by a protocol into what training may see and what is predicted."""

from pathlib import Path

from gr.data.dataset import Dataset
from gr.data.split import prepare_split
from jobs.config import PrepareConfig
from jobs.runtime import Context, main


def dataset_folder(path: Path) -> Path:
    """A dataset folder itself, or the one inside a `plant` artifact."""
    return path / "dataset" if (path / "dataset").is_dir() else path


def body(context: Context[PrepareConfig]) -> None:
    dataset = Dataset(dataset_folder(context.input("dataset")))
    dataset.verify()
    manifest = prepare_split(dataset, context.config.protocol, context.out)
    context.facts.update(manifest["counts"])


if __name__ == "__main__":
    main("prepare", body)
