"""Trains one rung of LLM-as-RS: adapters on a backbone, all of it, or its head; histories of titles in, the next title out."""

import os
from functools import partial
from typing import Any

import torch

from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.errors import UserError
from gr.llm.backbone import NextTitle, attend_by, checkpoint_activations, count, load_backbone
from gr.llm.sequences import at_once, check_fits, micro_batches, target_sequence, training_sequences
from gr.llm.shown import grow
from gr.llm.titles import TitleTrie
from gr.llm.tuning import made_trainable, randomised, save_trained, trained_facts, tuning_flops
from jobs.llm_config import TrainLlmConfig
from jobs.llm_items import llm_items
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
    backbone, tokenizer = load_backbone(backbone_source(context, config.model), config.max_tokens, config.load_in_4bit)
    if config.model is None:  # or the adapter would name a folder of this machine
        backbone.name_or_path = os.path.relpath(context.input("backbone").resolve(), context.out.resolve())
    attend_by(backbone, config.attention, context.run.launch.precision)
    titles, shown, new_tokens = llm_items(context, split, tokenizer, config)
    check_fits(titles, shown, config.max_tokens)
    trie = TitleTrie(titles, config.normalize)
    torch.manual_seed(config.seed)
    if config.start == "random":
        backbone = randomised(backbone)
    if new_tokens:
        grow(backbone, tokenizer, new_tokens)
    counts = count(backbone)
    lm = made_trainable(backbone, config.tune, config.lora.model_dump() if config.lora else None, new_tokens)
    if config.checkpoint_activations:
        checkpoint_activations(lm)
    sizes = trained_facts(lm, config.tune, counts)
    flops = partial(tuning_flops, backbone, config.tune, counts, n_lora=sizes["n_lora"], new_tokens=bool(new_tokens))
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
    pad, vocab, limit = titles.frame.pad, backbone.get_output_embeddings().weight.shape[0], at_once(accelerator.device)

    def batches(step: int, accumulation: int) -> list[Micro]:
        histories = [e.history for e in stream.batch(step)]
        packed = training_sequences(titles, histories, config.max_history, config.max_tokens, shown)
        return [
            Micro(b.inputs, b.target_tokens, b.tokens, flops(b.tokens, len(b.targets), b.pairs))
            for b in micro_batches(packed, pad, trie, vocab, accumulation, limit)
        ]

    users = split.evaluation_users("val", limit=VALIDATION_USERS)
    held_out = [target_sequence(titles, u.history, u.target, config.max_history, config.max_tokens, shown) for u in users]
    validation = micro_batches(held_out, pad, trie, vocab, limit=limit)
    context.facts.update(
        n_llm=counts.total,
        n_non_embedding=counts.blocks,
        **sizes,
        init="random" if config.start == "random" else "fresh" if config.model is None else "pretrained",
        normalize=config.normalize,
        shared_titles_policy=config.shared_titles,
        units_per_epoch=stream.units,
        input=config.input,
        new_tokens=len(new_tokens),
        **(titles.counts | shown.counts),
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
        save_trained(
            model.lm,
            tokenizer,
            config.tune,
            context.out,
            with_backbone=config.start == "random",
            with_tokenizer=bool(new_tokens),
            with_merged=config.save_merged,
        )


if __name__ == "__main__":
    main("train_llm", body)
