"""Generates a planted dataset."""

from gr.data.planted import plant
from jobs.config import PlantConfig
from jobs.runtime import Context, main


def body(context: Context[PlantConfig]) -> None:
    plant(context.config.world, context.out / "dataset")


if __name__ == "__main__":
    main("plant", body)
