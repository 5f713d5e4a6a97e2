"""LLM-as-RS trained in one packed pass over a user's items beside one pass per target, on Amazon Beauty.

    python tests/benchmarks/llm_training.py [--threads 2] [--rounds 5]

Both train the same targets with the same histories: every item of a user (leave-one-out, at most 20 items before it) but the
first, on a fresh backbone with LoRA of rank 32. Packed is what `jobs.train_llm` does; per example is the usual way, a prompt and
one target title per sequence. Both run through the same batching (sequences of like length together, at most 4,096 tokens), the
same loss and the same AdamW; the packed pass also with recomputed activations. First the sums of their losses are compared, then
they take turns, each turn the same users; printed are the median rates over the rounds, the ratio of each round, and what can be
counted: tokens run, of them real ones, and FLOPs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from beauty import DATA, leave_one_out

from gr.data.stream import TrainStream
from gr.llm.backbone import NextTitle, checkpoint_activations, count, fresh_backbone
from gr.llm.sequences import Batch, Items, Packed, micro_batches, target_sequence, training_sequences, windows
from gr.llm.titles import Titles, TitleTrie, title_texts
from gr.llm.tokenizer import frame_of
from gr.llm.tuning import made_trainable, trained_facts, tuning_flops
from gr.text import train_tokenizer

VOCAB, HISTORY, TOKENS, USERS = 2000, 20, 1024, 64
SIZES = {
    "2 x 96": {"layers": 2, "d_model": 96, "heads": 4, "d_ff": 384},  # the largest rung of cluster/studies/beauty-cpu.yaml
    "4 x 256": {"layers": 4, "d_model": 256, "heads": 4, "d_ff": 1024},
}
LORA = {"rank": 32, "share": None, "alpha_per_rank": 2.0, "dropout": 0.0}
Sequences = Callable[[list[Items]], list[Packed]]


class Trained:
    """One way to train one backbone."""

    def __init__(self, titles: Titles, trie: TitleTrie, size: dict[str, int], sequences: Sequences) -> None:
        torch.manual_seed(0)
        backbone = fresh_backbone(VOCAB, **size)
        self.counts, self.titles, self.trie, self.sequences = count(backbone), titles, trie, sequences
        self.model = NextTitle(made_trainable(backbone, "lora", LORA), trie.trie)
        self.n_lora = trained_facts(self.model.lm, "lora", self.counts)["n_lora"]
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def batches(self, histories: list[Items]) -> list[Batch]:
        return micro_batches(self.sequences(histories), self.titles.frame.pad, self.trie, VOCAB)

    def loss(self, histories: list[Items]) -> float:
        with torch.no_grad():
            return sum(self.model(**b.inputs).item() for b in self.batches(histories))

    def step(self, histories: list[Items]) -> None:
        batches = self.batches(histories)
        total = sum(b.target_tokens for b in batches)
        self.adam.zero_grad()
        for b in batches:
            (self.model(**b.inputs) / total).backward()
        self.adam.step()

    def flops(self, b: Batch) -> float:
        return tuning_flops(self.model.lm, "lora", self.counts, b.tokens, len(b.targets), b.pairs, self.n_lora)


def per_example(titles: Titles, histories: list[Items]) -> list[Packed]:
    """Every target of `training_sequences` as a sequence of its own, with the history that it has there."""
    found = []
    for items in histories:
        for start, stop in windows(titles.lengths[titles.of_item[items]], HISTORY, TOKENS - len(titles.frame.bos)):
            found += [target_sequence(titles, items[start:at], int(items[at]), HISTORY, TOKENS) for at in range(start + 1, stop)]
    return found


def compare(titles: Titles, trie: TitleTrie, users: list[list[Items]], size: dict[str, int], rounds: int) -> None:
    ways = {
        "packed": Trained(titles, trie, size, lambda h: training_sequences(titles, h, HISTORY, TOKENS)),
        "per example": Trained(titles, trie, size, lambda h: per_example(titles, h)),
        "packed, recomputed": Trained(titles, trie, size, lambda h: training_sequences(titles, h, HISTORY, TOKENS)),
    }
    checkpoint_activations(ways["packed, recomputed"].model.lm)
    targets = sum(len(items) - 1 for items in users[0])
    losses = [way.loss(users[0]) for way in ways.values()]
    print(f"  summed loss of {targets} targets: {', '.join(f'{x:.4f} {name}' for x, name in zip(losses, ways, strict=True))}")
    if max(losses) - min(losses) > 1e-5 * abs(losses[0]):
        sys.exit("they do not train the same")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        histories = users[number % len(users)]
        for name, way in ways.items():
            began = time.perf_counter()
            way.step(histories)
            if number:  # the first one warms up
                rates[name].append(sum(len(items) - 1 for items in histories) / (time.perf_counter() - began))
    for name, way in ways.items():
        batches = [b for histories in users for b in way.batches(histories)]
        each = sum(len(items) - 1 for histories in users for items in histories)
        run, real = (sum(n(b) for b in batches) / each for n in (lambda b: b.input_ids.numel(), lambda b: b.tokens))
        flops = sum(way.flops(b) for b in batches) / each
        print(
            f"  {name:18} {statistics.median(rates[name]):9.1f} targets/s; per target {run:6.1f} tokens run, {real:6.1f} real,"
            f" {flops / 1e6:8.1f} MFLOP"
        )
    for name in list(ways)[1:]:
        ratios = sorted(a / b for a, b in zip(rates["packed"], rates[name], strict=True))
        print(f"  packed over {name}: {statistics.median(ratios):.2f} (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not DATA.is_dir():
        print(f"skipped: it needs {DATA}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        split = leave_one_out(Path(folder))
        items = split.items()
        stream = TrainStream(split, unit="users", seed=0, global_batch=USERS, max_history=10**6)
        users = [[e.history for e in stream.batch(step)] for step in range(arguments.rounds + 1)]
    tokenizer = train_tokenizer(title_texts(items)[0], VOCAB)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer))
    trie = TitleTrie(titles, "catalogue")
    for name, size in SIZES.items():
        print(f"{name}, {arguments.threads} threads, batches of {USERS} users:", flush=True)
        compare(titles, trie, users, size, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
