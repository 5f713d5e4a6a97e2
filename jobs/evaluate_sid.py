"""Evaluates a trained SID recommender: beam search over existing SIDs, full-catalogue metrics of items."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gr.data.split import EvaluationUser, Split
from gr.llm.decode import rank_titles
from gr.llm.titles import TitleTrie
from gr.metrics import ranking_metrics, within
from gr.sid.decode import rank_sids
from gr.sid.decoder_only import SidSequences, load_decoder_only, sid_titles
from gr.sid.recommender import SidBatcher, load_t5
from gr.sid.sids import SidTable
from gr.sid.t5_weights import T5Weights
from jobs.config import EvaluateSidConfig
from jobs.evaluation import Ranked, device, evaluate
from jobs.runtime import Context, main
from jobs.sid_config import TrainSidConfig
from jobs.sid_recipes import reads_of

Users = list[EvaluationUser]
Ranker = Callable[[Users], tuple[NDArray[np.int32], float]]
"""Users with their histories to (users, beams) numbers of SIDs, best first and -1 where there are fewer, and the FLOPs spent."""


def body(context: Context[EvaluateSidConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    split = Split(context.input("split"))
    sids = SidTable.read(context.input_file("sids", "sids.parquet"))
    if sids.shared:
        sids = replace(sids, popularity=split.popularity)
        context.facts.update(sids.tie_facts())
    trained = TrainSidConfig.model_validate(context.trained_config())
    make = _decoder_only if trained.architecture == "decoder-only" else _encoder_decoder
    ranker = make(context, trained, sids, device())
    ranked = np.empty((0, config.beams), dtype=np.int32)

    def rank(users: Users) -> Ranked:
        nonlocal ranked
        ranked, spent = ranker(users)
        return Ranked(sids.ranked_items(ranked, config.beams), spent, int((ranked < 0).sum()))

    def observe(targets: NDArray[np.int64]) -> dict[str, NDArray[np.int32]]:
        return {"code_rank": sids.code_ranks(ranked, targets)}

    done = evaluate(context, split, config.which, config.users, config.batch, rank, observe=observe, returned=config.beams)
    if done is None:
        return
    of_codes = ranking_metrics(done.table["code_rank"].to_numpy())
    context.facts.update(
        beams=config.beams,
        invalid_beams=done.missing / (config.beams * done.table.num_rows),
        # A hit is the right codes, whichever item of theirs: what is called recall where no digit tells items apart.
        **{f"sid_{name}": value for name, value in within(of_codes, config.beams).items()},
    )


def _encoder_decoder(context: Context[EvaluateSidConfig], trained: TrainSidConfig, sids: SidTable, device: str) -> Ranker:
    model = load_t5(context.input("model")).eval().to(device)
    batcher = SidBatcher(sids, trained.max_history, reads_of(trained))
    trie = TitleTrie(sid_titles(sids), trained.normalize).to(device)
    weights = T5Weights(model, trie)

    def rank(users: Users) -> tuple[NDArray[np.int32], float]:
        inputs = batcher.encoder_inputs([u.history for u in users], [u.user for u in users])
        found, _, flops = rank_sids(weights, {k: v.to(device) for k, v in inputs.items()}, context.config.beams)
        return found.astype(np.int32), flops

    return rank


def _decoder_only(context: Context[EvaluateSidConfig], trained: TrainSidConfig, sids: SidTable, device: str) -> Ranker:
    model = load_decoder_only(context.input("model")).eval().to(device)
    sequences = SidSequences(sids, trained.max_history, reads_of(trained))
    trie = TitleTrie(sequences.titles, trained.normalize).to(device)

    def rank(users: Users) -> tuple[NDArray[np.int32], float]:
        some, shift = sequences.prompts([u.user for u in users], [u.history for u in users])
        found, _, flops = rank_titles(model, trie, some, context.config.beams, shift=shift)
        return found.astype(np.int32), flops

    return rank


if __name__ == "__main__":
    main("evaluate_sid", body)
