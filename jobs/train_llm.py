"""Trains one rung of LLM-as-RS: adapters on a backbone, all of it, or its head; histories of titles in, the next title out."""

import os
from functools import partial
from typing import Any

import torch

from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.errors import UserError
from gr.llm.backbone import NextTitle, count, load_backbone
from gr.llm.sequences import micro_batches, target_sequence, training_sequences
from gr.llm.titles import Titles, TitleTrie
from gr.llm.tokenizer import frame_of
from gr.llm.tuning import made_trainable, randomised, save_trained, trained_facts, tuning_flops
from jobs.config import TrainLlmConfig
from jobs.pretrain_llm import mean_loss
from jobs.runtime import Context, main
from jobs.trainer import Micro, accelerator_for, train

VALIDATION_USERS = 500
WHOLE = 10**6  # items: the stream is to cut no history, `training_sequences` cuts it into windows


def backbone_source(context: Context[Any], model: str | None) -> str:
    """The hub name or folder of the backbone: the config's ``model``, or the artifact of `pretrain_llm`."""
    if model is not None and "backbone" in context.run.inputs:
        raise UserError("run.yaml: the backbone is given twice, as config.model and as inputs.backbone")
    return str(context.input("backbone")) if model is None else context.model(model)


def body(context: Context[TrainLlmConfig]) -> None:
    config, optimizer = context.config, context.config.optimizer
    accelerator = accelerator_for(context, optimizer)
    split = Split(context.input("split"))
    backbone, tokenizer = load_backbone(backbone_source(context, config.model), config.max_tokens)
    if config.model is None:  # or the adapter would name a folder of this machine
        backbone.name_or_path = os.path.relpath(context.input("backbone").resolve(), context.out.resolve())
    titles = Titles.build(split.items(), tokenizer, frame_of(tokenizer), config.shared_titles)
    titles.check_fits(config.max_tokens)
    trie = TitleTrie(titles, config.normalize)
    counts = count(backbone)
    torch.manual_seed(config.seed)
    if config.start == "random":
        backbone = randomised(backbone)
    lm = made_trainable(backbone, config.tune, config.lora.model_dump() if config.lora else None)
    sizes = trained_facts(lm, config.tune, counts)
    flops = partial(tuning_flops, backbone, config.tune, counts, n_lora=sizes["n_lora"])
    model = NextTitle(lm, trie.trie if config.normalize == "catalogue" else None)
    stream = TrainStream(
        split,
        unit="users",
        seed=config.seed,
        global_batch=optimizer.global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        max_history=WHOLE,
    )
    pad, vocab = titles.frame.pad, backbone.get_output_embeddings().weight.shape[0]

    def batches(step: int, accumulation: int) -> list[Micro]:
        histories = [e.history for e in stream.batch(step)]
        packed = training_sequences(titles, histories, config.max_history, config.max_tokens)
        return [
            Micro(b.inputs, b.target_tokens, b.tokens, flops(b.tokens, len(b.targets), b.pairs))
            for b in micro_batches(packed, pad, trie, vocab, accumulation)
        ]

    users = split.evaluation_users("val", limit=VALIDATION_USERS)
    held_out = [target_sequence(titles, u.history, u.target, config.max_history, config.max_tokens) for u in users]
    validation = micro_batches(held_out, pad, trie, vocab)
    context.facts.update(
        n_llm=counts.total,
        n_non_embedding=counts.blocks,
        **sizes,
        init="random" if config.start == "random" else "fresh" if config.model is None else "pretrained",
        normalize=config.normalize,
        shared_titles_policy=config.shared_titles,
        units_per_epoch=stream.units,
        **titles.counts,
    )
    train(
        context,
        accelerator,
        model,
        optimizer,
        config.seed,
        batches,
        lambda module, inputs: module(**inputs),
        lambda module: mean_loss(module, validation, accelerator.device),
    )
    if context.is_main:
        save_trained(model.lm, tokenizer, config.tune, context.out, with_backbone=config.start == "random")


if __name__ == "__main__":
    main("train_llm", body)
