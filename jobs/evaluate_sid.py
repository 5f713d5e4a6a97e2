"""Evaluates a trained SID recommender: beam search over existing SIDs, full-catalogue metrics of items."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gr.beam import beam_search
from gr.data.split import Split
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.metrics import ranking_metrics
from gr.sid.decode import T5Stepper
from gr.sid.decoder_only import load_decoder_only, most_tokens, sid_titles
from gr.sid.recommender import SidBatcher, load_t5, t5_flops
from gr.sid.sids import SidTable
from gr.trie import Trie
from jobs.config import EvaluateSidConfig
from jobs.evaluation import Histories, Ranked, device, evaluate
from jobs.runtime import Context, main
from jobs.sid_config import TrainSidConfig

Ranker = Callable[[Histories], tuple[NDArray[np.int32], float]]
"""Histories to (users, beams) numbers of SIDs, best first and -1 where there are fewer, and the FLOPs spent."""


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

    def rank(histories: Histories) -> Ranked:
        nonlocal ranked
        ranked, spent = ranker(histories)
        return Ranked(sids.ranked_items(ranked, config.beams), spent, int((ranked < 0).sum()))

    def observe(targets: NDArray[np.int64]) -> dict[str, NDArray[np.int32]]:
        return {"code_rank": sids.code_ranks(ranked, targets)}

    done = evaluate(context, split, config.which, config.users, config.batch, rank, observe=observe)
    if done is None:
        return
    of_codes = ranking_metrics(done.table["code_rank"].to_numpy())
    context.facts.update(
        beams=config.beams,
        invalid_beams=done.missing / (config.beams * done.table.num_rows),
        # A hit is the right codes, whichever item of theirs: what is called recall where no digit tells items apart.
        **{f"sid_{name}": value for name, value in of_codes.items()},
    )


def _encoder_decoder(context: Context[EvaluateSidConfig], trained: TrainSidConfig, sids: SidTable, device: str) -> Ranker:
    model = load_t5(context.input("model")).eval().to(device)
    batcher = SidBatcher(sids, trained.max_history)
    trie = Trie.build(sids.distinct.tolist()).to(device)
    beams, digits = context.config.beams, sids.tokens.shape[1]

    @torch.no_grad()
    def rank(histories: Histories) -> tuple[NDArray[np.int32], float]:
        inputs = batcher.encoder_inputs(histories)
        flops = t5_flops(model.config, inputs["attention_mask"].sum(1).numpy(), digits, beams)
        stepper = T5Stepper(model, **{k: v.to(device) for k, v in inputs.items()})
        found, _ = beam_search(stepper, trie, beams, normalize=trained.normalize == "catalogue")
        return found.cpu().numpy().astype(np.int32), flops

    return rank


def _decoder_only(context: Context[EvaluateSidConfig], trained: TrainSidConfig, sids: SidTable, device: str) -> Ranker:
    model = load_decoder_only(context.input("model")).eval().to(device)
    titles, longest = sid_titles(sids), most_tokens(sids, trained.max_history)
    trie = TitleTrie(titles, trained.normalize).to(device)

    def rank(histories: Histories) -> tuple[NDArray[np.int32], float]:
        some = prompts(titles, histories, trained.max_history, longest)
        found, _, flops = rank_titles(model, trie, some, context.config.beams)
        return found.astype(np.int32), flops

    return rank


if __name__ == "__main__":
    main("evaluate_sid", body)
