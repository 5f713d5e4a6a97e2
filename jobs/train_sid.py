"""Trains one rung of the SID recommender."""

from gr.data.split import Split
from gr.sid.sids import SidTable
from jobs.runtime import Context, main
from jobs.sid_config import TrainSidConfig
from jobs.sid_recipes import recipe
from jobs.trainer import accelerator_for, train


def body(context: Context[TrainSidConfig]) -> None:
    config = context.config
    accelerator = accelerator_for(context, config.optimizer)
    split = Split(context.input("split"))
    sids = SidTable.read(context.input_file("sids", "sids.parquet"))
    made = recipe(config, accelerator, split, sids)
    context.facts.update(made.facts)
    train(
        context, accelerator, made.model, config.optimizer, config.seed, made.batches, made.loss, made.validate, made.recordable
    )
    if context.is_main:
        made.recommender.save_pretrained(context.out)


if __name__ == "__main__":
    main("train_sid", body)
