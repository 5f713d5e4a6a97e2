"""How each architecture of SID recommender is trained: module, batches, loss and validation for the loop of `jobs.trainer`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gr.count import count_parameters
from gr.data.split import Split
from gr.data.stream import TrainStream, Unit
from gr.llm.backbone import NextTitle, count, train_flops
from gr.llm.sequences import Batch, at_once, micro_batches
from gr.llm.titles import TitleTrie
from gr.sid.decoder_only import SidSequences, decoder_only
from gr.sid.inputs import Reads
from gr.sid.recommender import SidBatcher, SidLoss, t5, t5_flops
from gr.sid.sids import SidTable
from gr.sid.t5 import GroupedT5
from jobs.sid_config import SidTraining, TrainSidConfig
from jobs.trainer import Batches, Micro

VALIDATION_USERS = 1024
LENGTH_GROUPS = 4
"""On a CPU, micro-batches of similar length: most histories are short, padding to the longest would waste half the work."""
WIDTHS_ON_GPU = 16
"""There, histories are padded to a multiple of so many tokens: few shapes, for each of which libraries choose their kernels."""
WHOLE = 10**6  # items: the stream is to cut no history, `training_sequences` cuts it into windows
UNITS: dict[str, Unit] = {"last": "last", "prefixes": "targets", "subsequences": "subsequences"}
"""Rows -> units of the stream, where each row has one target."""


@dataclass(frozen=True)
class Recipe:
    """``model`` is what the loop trains, ``recommender`` the part of it that is saved; the callables are those of
    `jobs.trainer.train`. ``validate``: nats per target item, over the catalogue or the vocabulary as in training."""

    model: nn.Module
    recommender: Any
    batches: Batches
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    validate: Callable[[nn.Module], float]
    facts: dict[str, Any]
    recordable: bool = False


def recipe(config: TrainSidConfig, accelerator: Accelerator, split: Split, sids: SidTable) -> Recipe:
    """Of ``config.architecture``; seeds torch."""
    torch.manual_seed(config.seed)
    make = _decoder_only if config.architecture == "decoder-only" else _encoder_decoder
    made = make(config, accelerator, split, sids)
    n_rs, n_non_embedding = count_parameters(made.recommender)
    made.facts.update(n_rs=n_rs, n_non_embedding=n_non_embedding, architecture=config.architecture, init="fresh")
    return made


def reads_of(config: SidTraining) -> Reads:
    return Reads(config.user_tokens, config.separator, config.item_position)


def tables_of(config: SidTraining) -> dict[str, int]:
    """Rows of the tables that the recommender reads from beside that of its tokens: an encoder sees the places of a history, a
    pass of the decoder-only model that of the target too."""
    return reads_of(config).tables(config.max_history + (config.architecture == "decoder-only"))


def _stream(config: TrainSidConfig, accelerator: Accelerator, split: Split, unit: Unit, max_history: int) -> TrainStream:
    return TrainStream(
        split,
        unit=unit,
        seed=config.seed,
        global_batch=config.optimizer.global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        max_history=max_history,
    )


def _encoder_decoder(config: TrainSidConfig, accelerator: Accelerator, split: Split, sids: SidTable) -> Recipe:
    """A history in, the next item out: one target per example, as TIGER."""
    model = t5(sids.vocab, **config.size.model_dump(), dropout=config.dropout, **tables_of(config))
    batcher, digits = SidBatcher(sids, config.max_history, reads_of(config)), sids.tokens.shape[1]
    loss, grouped = SidLoss(sids, config.normalize), GroupedT5(model)
    stream = _stream(config, accelerator, split, UNITS[config.rows], config.max_history)
    on_gpu = accelerator.device.type != "cpu"

    def batches(step: int, accumulation: int) -> list[Micro]:
        examples = sorted(stream.batch(step), key=lambda e: len(e.history))
        micros = []
        for rows in np.array_split(np.arange(len(examples)), accumulation):
            group = [examples[i] for i in rows]
            if not group:
                continue
            inputs = batcher.encoder_inputs([e.history for e in group], [e.user for e in group])
            inputs["labels"] = batcher.labels([e.target for e in group])
            lengths = inputs["attention_mask"].sum(1).numpy()
            flops = 3 * t5_flops(model.config, lengths, digits)  # the gradients of inputs and of weights cost as much again, each
            if on_gpu:
                inputs |= {name: to_multiple(inputs[name], WIDTHS_ON_GPU) for name in ("input_ids", "attention_mask")}
            micros.append(Micro(inputs, len(group), int(lengths.sum()) + len(group) * digits, flops))
        return micros

    validation = list(split.evaluation_users("val", limit=VALIDATION_USERS))

    def validate(module: nn.Module) -> float:
        total = 0.0
        for start in range(0, len(validation), 256):
            rows = validation[start : start + 256]
            inputs = batcher.encoder_inputs([r.history for r in rows], [r.user for r in rows])
            inputs["labels"] = batcher.labels([r.target for r in rows])
            total += loss(module, {k: v.to(accelerator.device) for k, v in inputs.items()}).item()
        return total / len(validation)

    facts = {"digits": digits, "units_per_epoch": stream.units}
    return Recipe(grouped, model, batches, loss, validate, facts, recordable=True)


def to_multiple(tokens: Tensor, of: int) -> Tensor:
    """(rows, n) -> (rows, next multiple), zeros on the right."""
    return nn.functional.pad(tokens, (0, -tokens.shape[1] % of))


def _decoder_only(config: TrainSidConfig, accelerator: Accelerator, split: Split, sids: SidTable) -> Recipe:
    """A user's items in, every one but the first (or only the last) a target of the same pass (`gr.sid.decoder_only`)."""
    lm = decoder_only(sids.vocab, **config.size.model_dump(), dropout=config.dropout, **tables_of(config))
    sequences, digits = SidSequences(sids, config.max_history, reads_of(config)), sids.tokens.shape[1]
    trie, counts = TitleTrie(sequences.titles, config.normalize), count(lm)
    model = NextTitle(lm, trie.trie if config.normalize == "catalogue" else None)
    stream = _stream(config, accelerator, split, "users", WHOLE)
    limit, cuts = at_once(accelerator.device), LENGTH_GROUPS if accelerator.device.type == "cpu" else 1

    def batches(step: int, accumulation: int) -> list[Micro]:
        examples = stream.batch(step)
        packed = sequences.training([e.user for e in examples], [e.history for e in examples], config.rows == "last")
        packed.sort(key=lambda p: len(p.tokens))
        groups = [packed[rows[0] : rows[-1] + 1] for rows in np.array_split(np.arange(len(packed)), cuts) if len(rows)]
        return [
            Micro(b.inputs, b.target_tokens / digits, b.tokens, train_flops(counts, b.tokens, len(b.targets), b.pairs))
            for group in groups
            for b in micro_batches(group, 0, trie, sids.vocab, accumulation, limit)
        ]

    users = list(split.evaluation_users("val", limit=VALIDATION_USERS))
    held_out = [sequences.target(u.user, u.history, u.target) for u in users]
    validation: list[Batch] = micro_batches(held_out, 0, trie, sids.vocab, limit=limit)

    def validate(module: nn.Module) -> float:
        return sum(float(module(**{k: v.to(accelerator.device) for k, v in b.inputs.items()})) for b in validation) / len(users)

    facts = {"digits": digits, "units_per_epoch": stream.units}
    return Recipe(model, lm, batches, lambda module, inputs: module(**inputs), validate, facts)
