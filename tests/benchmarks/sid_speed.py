"""Training and constrained beam search of the SID recommenders beside transformers' T5 and cornac's TIGER, on Amazon Beauty.

    pip install --no-deps --target FOLDER cornac==3.0.1 powerlaw==1.5
    python tests/benchmarks/sid_speed.py --cornac FOLDER [--threads 2] [--rounds 7] [--beams 10 20 50]

Without `--cornac` its rows are skipped. All have the same training targets (leave-one-out, every prefix), SIDs (TF-IDF and SVD to
64 dimensions, residual k-means 3 x 256, an extra digit), d 128, 2 + 2 layers, batches of 64, dropout .1, and AdamW. A step counts
whole, with making its batch. The peers pad every history to 20 items, as their users do; the decoder-only model, of as many
parameters as the T5, takes 64 users a step and trains all of their targets in one pass. Decoding: transformers' `generate` with a
dict trie as `prefix_allowed_tokens_fn`, and cornac's own beam search, one user at a time. The contenders take turns, and each
one's best turn counts: what else runs on the machine can only slow a turn down. In brackets the median of the rounds' ratios, for
a best turn may be luck. Rates per second of processor time stand beside those per second: they can be compared on a machine that
has no core free.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator
from beauty import DATA, leave_one_out
from numpy.typing import NDArray
from torch import Tensor, nn

from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.sid.decode import rank_sids
from gr.sid.decoder_only import most_tokens, sid_titles
from gr.sid.quantizers import residual_kmeans, standardize
from gr.sid.recommender import SidBatcher, t5
from gr.sid.references import tfidf_vectors
from gr.sid.sids import SidTable, disambiguate
from gr.sid.t5_weights import T5Weights
from gr.terms import Normalize
from jobs.options import Optimizer
from jobs.sid_config import T5Size, TrainSidConfig
from jobs.sid_recipes import Recipe, recipe
from jobs.trainer import Micro

SIZE = T5Size(layers=2, d_model=128, heads=4, d_kv=32, d_ff=512)
CAUSAL = T5Size(layers=4, d_model=128, heads=4, d_kv=32, d_ff=428)  # of as many parameters
BATCH, HISTORY, WIDTH, BEAMS = 64, 20, 256, (10, 20, 50)
STEPS, USERS = 5, 256  # of a pass: training steps, and users for whom items are ranked, in batches
SECONDS = 1.0  # of a turn, at least: what ran before it has left the caches cold
Histories = Sequence[NDArray[np.int32]]
Turn = Callable[[int], float]
"""A pass of the turn of a number; returns how many targets it trained or users it served."""


def turns(title: str, contenders: dict[str, Turn], rounds: int) -> None:
    """Prints each contender's best rates over ``rounds``, per second and per second of processor, and the median of the rounds'
    ratios to the fastest peer; a turn before them warms up."""
    wall, processor = ({name: np.zeros(rounds) for name in contenders} for _ in range(2))
    for number in range(rounds + 1):
        for name, turn in contenders.items():
            began, spent, done = time.perf_counter(), time.process_time(), 0.0
            while time.perf_counter() - began < SECONDS:
                done += turn(number)
            if number:
                wall[name][number - 1] = done / (time.perf_counter() - began)
                processor[name][number - 1] = done / (time.process_time() - spent)
    peers = [name for name in contenders if not name.startswith("grscale")]
    print(f"\n{title:46}   per s  x fastest peer  (median)   per CPU s  x fastest peer  (median)")
    for name in contenders:
        shown = []
        for rates in (wall, processor):
            fastest = np.max([rates[peer] for peer in peers], axis=0)
            best, median = rates[name].max() / fastest.max(), np.median(rates[name] / fastest)
            shown.append(f"{rates[name].max():7.1f}  {best:14.2f}  {f'({median:.2f})':>8}")
        print(f"  {name:44} {'     '.join(shown)}", flush=True)


def semantic_ids(vectors: NDArray[np.float32]) -> SidTable:
    x = standardize(torch.from_numpy(vectors))
    codes = disambiguate(residual_kmeans(x, 3, WIDTH, seed=0).codes.numpy())
    widths = np.array([WIDTH, WIDTH, WIDTH, codes[:, -1].max() + 1])
    return SidTable(1 + np.concatenate([[0], np.cumsum(widths)[:-1]]) + codes, int(1 + widths.sum()))


def made(split: Split, sids: SidTable, architecture: Any, normalize: Normalize) -> Recipe:
    size = CAUSAL if architecture == "decoder-only" else SIZE
    optimizer = Optimizer(steps=1, global_batch=BATCH, lr=1e-3)
    config = TrainSidConfig(
        size=size, architecture=architecture, normalize=normalize, max_history=HISTORY, optimizer=optimizer, seed=0
    )
    return recipe(config, Accelerator(cpu=True), split, sids)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)


def ours(recipe: Recipe) -> Turn:
    adam = optimizer_of(recipe.model)

    def turn(number: int) -> float:
        return sum(m.weight for m in trained(recipe, adam, number))

    return turn


def trained(recipe: Recipe, adam: torch.optim.Optimizer, number: int) -> list[Micro]:
    """Trains the `STEPS` steps of a pass; returns what they were trained on."""
    recipe.model.train()
    done: list[Micro] = []
    for step in range(number * STEPS, (number + 1) * STEPS):
        micros = recipe.batches(step, 1)
        total = sum(m.weight for m in micros)
        adam.zero_grad()
        for micro in micros:
            (recipe.loss(recipe.model, micro.inputs) / total).backward()
        adam.step()
        done += micros
    return done


def theirs(model: nn.Module, split: Split, loss: Callable[[Histories, Sequence[int]], Tensor]) -> Turn:
    """The same targets in the same order, each history padded by ``loss``."""
    adam = optimizer_of(model)
    stream = TrainStream(split, unit="targets", seed=0, global_batch=BATCH, max_history=HISTORY)

    def turn(number: int) -> float:
        model.train()
        for step in range(number * STEPS, (number + 1) * STEPS):
            examples = stream.batch(step)
            adam.zero_grad()
            loss([e.history for e in examples], [e.target for e in examples]).backward()
            adam.step()
        return STEPS * BATCH

    return turn


def padded(batcher: SidBatcher, histories: Histories) -> dict[str, Tensor]:
    inputs = batcher.encoder_inputs(histories)
    more = HISTORY * batcher.sids.tokens.shape[1] - inputs["input_ids"].shape[1]
    return {name: nn.functional.pad(x, (0, more)) for name, x in inputs.items()}


class Cornac:
    """cornac's TIGER, its batches and loss as its `fit` makes them and its search as its `score` runs it."""

    def __init__(self, folder: Path, sids: SidTable) -> None:
        sys.path.append(str(folder))
        module = import_module("cornac.models.tiger.tiger")
        digits = sids.tokens.shape[1]
        first = sids.tokens.min(axis=0)
        self.codes = sids.tokens - first
        sizes = self.codes.max(axis=0) + 1
        torch.manual_seed(0)
        self.model: Any = module.TIGERSeq2Seq(sizes, SIZE.d_model, SIZE.d_ff, SIZE.heads, SIZE.d_kv, SIZE.layers, SIZE.layers)
        tokens = self.codes + self.model.offsets.numpy()
        self.table = np.concatenate([tokens, np.zeros((1, digits), np.int64)])
        sets: list[dict[tuple[int, ...], set[int]]] = [{} for _ in range(digits)]
        for row in self.codes.tolist():
            for level, code in enumerate(row):
                sets[level].setdefault(tuple(row[:level]), set()).add(code)
        self.children = [{prefix: np.array(sorted(codes)) for prefix, codes in level.items()} for level in sets]

    def encoder_inputs(self, histories: Histories) -> tuple[Tensor, Tensor]:
        items = np.full((len(histories), HISTORY), len(self.table) - 1)
        for row, history in enumerate(histories):
            history = history[-HISTORY:]
            items[row, HISTORY - len(history) :] = history
        tokens = torch.from_numpy(self.table[items].reshape(len(items), -1))
        return tokens, (tokens != 0).float()

    def loss(self, histories: Histories, targets: Sequence[int]) -> Tensor:
        result: Tensor = self.model(*self.encoder_inputs(histories), torch.from_numpy(self.codes[np.asarray(targets)]))
        return result

    def rank(self, histories: Histories, beams: int) -> None:
        for history in histories:
            self.model.generate_beam(*self.encoder_inputs([history]), beams, self.children)


def rank_t5(weights: T5Weights, batcher: SidBatcher, histories: Histories, beams: int) -> NDArray[np.int64]:
    return rank_sids(weights, batcher.encoder_inputs(histories), beams)[0]


class Generate:
    """transformers' constrained beam search."""

    def __init__(self, model: Any, batcher: SidBatcher) -> None:
        self.model, self.batcher = model, batcher
        self.children: dict[tuple[int, ...], list[int]] = {}
        for row in batcher.sids.tokens.tolist():
            for level, token in enumerate(row):
                below = self.children.setdefault(tuple(row[:level]), [])
                if token not in below:
                    below.append(token)
        self.item = {tuple(row): i for i, row in enumerate(batcher.sids.tokens.tolist())}

    def __call__(self, histories: Histories, beams: int) -> Tensor:
        """(users, beams, digits) tokens, best first."""
        digits = self.batcher.sids.tokens.shape[1]
        found: Tensor = self.model.generate(
            **padded(self.batcher, histories),
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=digits,
            min_new_tokens=digits,
            do_sample=False,
            length_penalty=0.0,
            use_cache=True,
            prefix_allowed_tokens_fn=lambda _, prefix: self.children[tuple(prefix[1:].tolist())],
        )
        return found[:, 1:].view(len(histories), beams, digits)

    def items(self, histories: Histories, beams: int) -> list[list[int]]:
        return [[self.item[tuple(sid)] for sid in user] for user in self(histories, beams).tolist()]


def same_lists(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of users with the same items; where scores all but tie, two may stand the other way round."""
    same = [set(x) == set(y) and sum(p != q for p, q in zip(x, y, strict=True)) <= 2 for x, y in zip(a, b, strict=True)]
    return float(np.mean(same))


def compare(split: Split, cornac: Path | None, widths: Sequence[int], rounds: int) -> bool:
    """Prints all, the search with so many beams as each of ``widths``; returns whether the lists are those of transformers."""
    sids = semantic_ids(tfidf_vectors(split.titles(), 64, seed=0))
    batcher = SidBatcher(sids, HISTORY)
    recipes = {
        f"grscale {architecture}, {normalize}": made(split, sids, architecture, normalize)
        for architecture in ("encoder-decoder", "decoder-only")
        for normalize in ("catalogue", "vocabulary")
    }
    torch.manual_seed(0)
    peer = t5(sids.vocab, **SIZE.model_dump(), dropout=0.1)
    tiger = Cornac(cornac, sids) if cornac else None

    def peer_loss(histories: Histories, targets: Sequence[int]) -> Tensor:
        loss: Tensor = peer(**padded(batcher, histories), labels=batcher.labels(targets)).loss
        return loss

    training = {name: ours(r) for name, r in recipes.items()} | {"transformers T5, padded": theirs(peer, split, peer_loss)}
    models = {name: r.recommender for name, r in recipes.items()} | {"transformers T5, padded": peer}
    if tiger:
        training["cornac TIGER"] = theirs(tiger.model, split, tiger.loss)
        models["cornac TIGER"] = tiger.model
    for name, model in models.items():
        print(f"  {name:44} {sum(p.numel() for p in model.parameters()):9,} parameters")
    turns("training, targets", training, rounds)
    for model in models.values():
        model.eval()
    users = [u.history for u in split.evaluation_users("test", limit=USERS)]
    decoding = decoders(recipes, sids, batcher, tiger)
    for beams in widths:
        each = {name: serve(rank, users, beams, 8 if name.startswith("cornac") else USERS) for name, rank in decoding.items()}
        turns(f"constrained beam search, {beams} beams, users", each, rounds)
    shared = recipes["grscale encoder-decoder, vocabulary"].recommender
    mine = rank_t5(T5Weights(shared, TitleTrie(sid_titles(sids), "vocabulary")), batcher, users, 10).tolist()
    share = same_lists(mine, Generate(shared, batcher).items(users, 10))
    print(f"\nsame 10 items as transformers on the same weights: {share:.1%} of {len(users)} users (expected: more than 99%)")
    return share > 0.99


def decoders(
    recipes: dict[str, Recipe], sids: SidTable, batcher: SidBatcher, tiger: Cornac | None
) -> dict[str, Callable[[Histories, int], Any]]:
    """By name, what ranks items for a batch of users; transformers has the weights of the T5 over the vocabulary."""
    result: dict[str, Callable[[Histories, int], Any]] = {}
    titles = sid_titles(sids)
    tries = {normalize: TitleTrie(titles, normalize) for normalize in get_args(Normalize)}
    for normalize, trie in tries.items():
        weights = T5Weights(recipes[f"grscale encoder-decoder, {normalize}"].recommender, trie)
        result[f"grscale encoder-decoder, {normalize}"] = lambda h, b, w=weights: rank_t5(w, batcher, h, b)
    for normalize, trie in tries.items():
        lm = recipes[f"grscale decoder-only, {normalize}"].recommender
        result[f"grscale decoder-only, {normalize}"] = lambda h, b, m=lm, t=trie: rank_titles(
            m, t, prompts(titles, h, HISTORY, most_tokens(sids, HISTORY)), b
        )
    result["transformers generate, dict trie"] = Generate(recipes["grscale encoder-decoder, vocabulary"].recommender, batcher)
    if tiger:
        result["cornac TIGER"] = tiger.rank
    return result


def serve(rank: Callable[[Histories, int], Any], users: Histories, beams: int, served: int) -> Turn:
    def turn(_: int) -> float:
        with torch.no_grad():
            for start in range(0, served, BATCH):
                rank(users[start : min(start + BATCH, served)], beams)
        return served

    return turn


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--beams", type=int, nargs="+", default=BEAMS)
    return with_cornac(arguments, lambda split, o: compare(split, o.cornac, o.beams, o.rounds))


def with_cornac(arguments: argparse.ArgumentParser, run: Callable[[Split, argparse.Namespace], bool]) -> int:
    """Runs a comparison on Beauty, with ``--cornac`` among the arguments; the exit code."""
    arguments.add_argument("--cornac", type=Path, help="the folder that cornac 3.0.1 was installed into")
    options = arguments.parse_args()
    if not DATA.is_dir():
        print(f"skipped: it needs {DATA}")
        return 0
    if options.cornac is None:
        print("skipped: cornac's rows, for --cornac is not given")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run(leave_one_out(Path(folder)), options) else 1


if __name__ == "__main__":
    sys.exit(main())
