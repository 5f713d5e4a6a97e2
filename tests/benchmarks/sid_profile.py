"""Where the time of SID training and decoding goes, and how far it is from what the machine's matrix products reach.

    python tests/benchmarks/sid_profile.py [--threads 2]

The models, batches and users are those of `sid_speed.py`. The limit is the rate of products of two 1024 x 1024 matrices,
measured right before. Beside it stand the rate at which a whole turn does its counted FLOPs (padding left out), and how its
time is shared among kinds of operations (torch's profiler).
"""

import argparse
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from beauty import DATA, leave_one_out
from sid_speed import BATCH, HISTORY, USERS, made, optimizer_of, semantic_ids, trained
from torch.profiler import ProfilerActivity, profile

from gr.data.split import Split
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.sid.decode import rank_sids
from gr.sid.decoder_only import most_tokens, sid_titles
from gr.sid.recommender import SidBatcher
from gr.sid.references import tfidf_vectors
from gr.sid.t5_weights import T5Weights
from jobs.sid_recipes import Recipe

KINDS = {
    "products of matrices": r"(add|b|)mm|_?scaled_dot_product_.*",
    "dropout and its random numbers": r"random_|_?Dropout.*",
    "norms, softmax, activations, sums": r"pow|rsqrt|mean|sum|_?(log_)?softmax.*|_softmax_backward.*|silu.*|clamp_min_?"
    r"|threshold_backward|logsumexp|exp_?|(add|mul|div|sub|neg|sqrt)_?|_fused_rms_norm.*|where|masked_fill_?|topk|sort|lt|gt|ge|eq",
    "optimizer": r"Optimizer.*|_foreach.*|_fused_adam.*|add?c(div|mul)_|lerp_",
    "copies and gathers": r"copy_|cat|index.*|_index.*|gather|scatter.*|embedding.*|fill_|slice_backward|new_.*|zero.*",
}
BEAMS, ROUNDS = 10, 5


def best(work: Callable[[], float], rounds: int = ROUNDS) -> float:
    """The highest of FLOPs per second of processor time; what else runs on the machine can only slow a turn down."""
    work()
    rates = []
    for _ in range(rounds):
        began = time.process_time()
        flops = work()
        rates.append(flops / (time.process_time() - began))
    return max(rates)


def limit() -> float:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)

    def products() -> float:
        for _ in range(20):
            a @ b
        return 20 * 2 * 1024.0**3

    return best(products)


def shares(work: Callable[[], float]) -> dict[str, float]:
    """Of the time within torch's operations, by kind; what is left is mostly the cost of starting them."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        name = event.key.removeprefix("aten::").split("#")[0]
        kind = next((kind for kind, names in KINDS.items() if re.fullmatch(names, name)), "all else, mostly starting operations")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: part / total for kind, part in sorted(spent.items(), key=lambda x: -x[1])}


def works(split: Split) -> dict[str, Callable[[], float]]:
    """By name, a turn that returns the FLOPs it spent."""
    sids = semantic_ids(tfidf_vectors(split.titles(), 64, seed=0))
    users = [u.history for u in split.evaluation_users("test", limit=USERS)]
    t5, causal = (made(split, sids, architecture, "catalogue") for architecture in ("encoder-decoder", "decoder-only"))
    titles, batcher, longest = sid_titles(sids), SidBatcher(sids, HISTORY), most_tokens(sids, HISTORY)
    trie = TitleTrie(titles, "catalogue")
    weights = T5Weights(t5.recommender, trie)
    adams = {id(recipe): optimizer_of(recipe.model) for recipe in (t5, causal)}
    some = [users[start : start + BATCH] for start in range(0, USERS, BATCH)]

    def train(recipe: Recipe) -> float:
        return sum(m.flops for m in trained(recipe, adams[id(recipe)], 0))

    def search_t5() -> float:
        t5.model.eval()
        return sum(rank_sids(weights, batcher.encoder_inputs(histories), BEAMS)[2] for histories in some)

    def search_causal() -> float:
        causal.model.eval()
        return sum(rank_titles(causal.recommender, trie, prompts(titles, h, HISTORY, longest), BEAMS)[2] for h in some)

    return {
        "training, encoder-decoder": lambda: train(t5),
        "training, decoder-only": lambda: train(causal),
        f"beam search of {BEAMS}, encoder-decoder": search_t5,
        f"beam search of {BEAMS}, decoder-only": search_causal,
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2)
    if not DATA.is_dir():
        print(f"skipped: it needs {DATA}")
        return 0
    torch.set_num_threads(arguments.parse_args().threads)
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(leave_one_out(Path(folder))).items():
            most, reached = limit(), best(work)
            print(f"\n{name}: {reached / 1e9:.1f} of {most / 1e9:.1f} GFLOPs per CPU second, {reached / most:.0%} of the limit")
            for kind, share in shares(work).items():
                print(f"  {share:6.1%}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
