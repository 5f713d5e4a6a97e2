"""Trains a fresh Qwen3-architecture backbone and its tokenizer on the catalogue's own text; no interaction enters it."""

import numpy as np
import torch

from gr.data.split import STREAMS, Split
from gr.llm.backbone import NextTitle, checkpoint_activations, count, fresh_backbone, train_flops
from gr.llm.documents import Walks
from gr.llm.sequences import Batch, Packed, at_once, micro_batches, pack
from gr.llm.titles import Titles, TitleTrie, title_texts
from gr.llm.tokenizer import frame_of
from gr.text import train_tokenizer
from jobs.llm_config import PretrainLlmConfig
from jobs.runtime import Context, main
from jobs.trainer import Micro, accelerator_for, train

TRAINING, VALIDATION = 0, 1  # the two never share a document's random numbers
VALIDATION_BATCHES = 4


def body(context: Context[PretrainLlmConfig]) -> None:
    config, optimizer = context.config, context.config.optimizer
    accelerator = accelerator_for(context, optimizer)
    items = Split(context.input("split")).items()
    tokenizer = train_tokenizer(title_texts(items)[0], config.vocab)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer))
    titles.check_fits(config.max_tokens)
    trie = TitleTrie(titles, config.normalize)
    torch.manual_seed(config.seed)
    lm = fresh_backbone(len(tokenizer), **config.size.model_dump())
    if config.checkpoint_activations:
        checkpoint_activations(lm)
    model = NextTitle(lm, trie.trie if config.normalize == "catalogue" else None)
    counts = count(model.lm)
    walks = Walks(items)
    limit = at_once(accelerator.device)
    documents, length = shape(optimizer.global_batch, config.max_tokens, float(titles.lengths.mean()))

    def sample(purpose: int, step: int) -> list[Packed]:
        runs = walks.sample(np.random.default_rng((config.seed, purpose, step)), documents, length)
        packed = []
        for numbers in titles.of_item[runs]:
            fit = int(np.searchsorted(np.cumsum(titles.lengths[numbers]), config.max_tokens - 1, side="right"))
            packed.append(pack(titles, numbers[:fit], 0))
        return packed

    def batches(step: int, accumulation: int) -> list[Micro]:
        mine = sample(TRAINING, step)[accelerator.process_index :: accelerator.num_processes]
        return [
            Micro(b.inputs, b.target_tokens, b.tokens, train_flops(counts, b.tokens, len(b.targets), b.pairs))
            for b in micro_batches(mine, titles.frame.pad, trie, len(tokenizer), accumulation, limit)
        ]

    held_out = [p for i in range(VALIDATION_BATCHES) for p in sample(VALIDATION, i)]
    validation = micro_batches(held_out, titles.frame.pad, trie, len(tokenizer), limit=limit)
    context.facts.update(
        n_llm=counts.total,
        n_non_embedding=counts.blocks,
        init="fresh",
        vocab=len(tokenizer),
        titles_per_document=length,
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
        model.lm.save_pretrained(context.out)
        tokenizer.save_pretrained(context.out)


def shape(global_batch: int, max_tokens: int, mean_tokens: float) -> tuple[int, int]:
    """(documents, titles of each) of a batch of ``global_batch`` titles: as many as fit ``max_tokens`` on average, and no fewer
    documents than there may be processes."""
    length = max(2, min(int((max_tokens - 1) / mean_tokens), global_batch // STREAMS))
    return max(STREAMS, -(-global_batch // length)), length


def mean_loss(module: torch.nn.Module, validation: list[Batch], device: torch.device) -> float:
    """Mean negative log-likelihood (nats) per target token."""
    total = sum(float(module(**{k: v.to(device) for k, v in b.inputs.items()})) for b in validation)
    return total / sum(b.target_tokens for b in validation)


if __name__ == "__main__":
    main("pretrain_llm", body)
