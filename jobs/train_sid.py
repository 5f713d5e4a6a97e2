"""Trains one rung of the SID recommender."""

import numpy as np
import torch

from gr.count import count_parameters
from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.sid.recommender import SidBatcher, SidLoss, t5, t5_flops
from gr.sid.sids import SidTable
from jobs.config import TrainSidConfig
from jobs.runtime import Context, main
from jobs.trainer import Micro, accelerator_for, train

VALIDATION_USERS = 1024
LENGTH_GROUPS = 4  # micro-batches of similar length: most histories are short, padding to the longest would waste half the work


def body(context: Context[TrainSidConfig]) -> None:
    config, optimizer = context.config, context.config.optimizer
    accelerator = accelerator_for(context, optimizer.precision)
    split = Split(context.input("split"))
    sids = SidTable.read(context.input_file("sids", "sids.parquet"))
    torch.manual_seed(config.seed)
    model = t5(sids.vocab, **config.size.model_dump(), dropout=config.dropout)
    total, non_embedding = count_parameters(model)
    batcher = SidBatcher(sids, config.max_history)
    loss = SidLoss(sids, config.normalize)
    digits = sids.tokens.shape[1]
    stream = TrainStream(
        split,
        unit="targets",
        seed=config.seed,
        global_batch=optimizer.global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        max_history=config.max_history,
    )

    def batches(step: int) -> list[Micro]:
        examples = sorted(stream.batch(step), key=lambda e: len(e.history))
        micros = []
        for rows in np.array_split(np.arange(len(examples)), LENGTH_GROUPS * optimizer.accumulate):
            group = [examples[i] for i in rows]
            if not group:
                continue
            inputs = batcher.encoder_inputs([e.history for e in group])
            inputs["labels"] = batcher.labels([e.target for e in group])
            lengths = inputs["attention_mask"].sum(1).numpy()
            flops = 3 * t5_flops(model.config, lengths, digits)  # the gradients of inputs and of weights cost as much again, each
            micros.append(Micro(inputs, len(group), int(lengths.sum()) + len(group) * digits, flops))
        return micros

    validation = list(split.evaluation_users("val", limit=VALIDATION_USERS))

    def validate(module: torch.nn.Module) -> float:
        total_loss = 0.0
        for start in range(0, len(validation), 256):
            rows = validation[start : start + 256]
            inputs = batcher.encoder_inputs([r.history for r in rows])
            inputs["labels"] = batcher.labels([r.target for r in rows])
            total_loss += loss(module, {k: v.to(accelerator.device) for k, v in inputs.items()}).item()
        return total_loss / len(validation)

    context.facts.update(n_rs=total, n_non_embedding=non_embedding, digits=digits, units_per_epoch=stream.units, init="fresh")
    model = train(context, accelerator, model, optimizer, config.seed, batches, loss, validate)
    if context.is_main:
        model.save_pretrained(context.out)


if __name__ == "__main__":
    main("train_sid", body)
