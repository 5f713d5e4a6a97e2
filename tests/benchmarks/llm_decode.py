"""Catalogue decoding beside transformers' `generate` with a dict trie, on Amazon Beauty: same model, titles, users and beams.

    python tests/benchmarks/llm_decode.py [--threads 1] [--rounds 2] [--users 32] [--peer-batch 8] [--steps 40]

A fresh Qwen3 is first trained for a few steps (a model that knows nothing gives the shortest titles to everybody), once with
probabilities over the vocabulary and once over the catalogue. What had to be matched for the same scores and lists:

- ``length_penalty=0``: a title's score is the sum of its log-probabilities; ``early_stopping=False`` then ends a search when no
  running beam can overtake the worst finished one, which is exact, for sums only fall;
- `generate` takes log-probabilities over the vocabulary before the allowed tokens are chosen; for those over the catalogue it is
  given ``renormalize_logits=True``;
- prompts are padded on the left (ours need no padding there), and every title has its end token in the dict trie.

What remains different: `generate` keeps 20 running beams beside up to 20 finished ones, ours 20 of both kinds together. Both take
turns on the same users, each turn other ones, `generate` in batches of 8, for it is slower in larger ones; compared are the ten
best titles of all users of all turns. Rates are per second and, as a machine may be shared, per second of processor time. Without
Amazon Beauty: the titles of a planted world of as many items.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from beauty import DATA, leave_one_out
from torch import Tensor

from gr.data.planted import World
from gr.data.split import Split
from gr.data.stream import TrainStream
from gr.llm.backbone import NextTitle, fresh_backbone
from gr.llm.decode import rank_titles
from gr.llm.sequences import Ints, micro_batches, prompts, training_sequences
from gr.llm.titles import Titles, TitleTrie, title_texts
from gr.llm.tokenizer import frame_of
from gr.terms import Normalize
from gr.text import train_tokenizer

ITEMS, VOCAB, HISTORY, TOKENS, BEAMS, TOP = 12_101, 2000, 20, 1024, 20, 10
SIZE = {"layers": 2, "d_model": 96, "heads": 4, "d_ff": 384}  # the largest rung of cluster/studies/beauty-cpu.yaml
Lists = list[list[int]]


class Generate:
    """transformers' beam search, constrained to the titles."""

    def __init__(self, lm: Any, titles: Titles, normalize: Normalize) -> None:
        self.lm, self.titles, self.renormalize = lm, titles, normalize == "catalogue"
        self.children: dict[tuple[int, ...], list[int]] = {}
        self.number = {tuple(title): number for number, title in enumerate(titles.sequences())}
        for title in self.number:
            for place, token in enumerate(title):
                below = self.children.setdefault(title[:place], [])
                if token not in below:
                    below.append(token)

    @torch.no_grad()
    def __call__(self, some: list[Ints]) -> Lists:
        """Title numbers of each prompt, best first."""
        width, pad, end = max(map(len, some)), self.titles.frame.pad, self.titles.frame.end
        ids = torch.tensor([[pad] * (width - len(p)) + p.tolist() for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        found: Tensor = self.lm.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            max_new_tokens=self.titles.longest,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            renormalize_logits=self.renormalize,
            eos_token_id=end,
            pad_token_id=pad,
            use_cache=True,
            # A beam that has ended is run on with the least of scores, and asks too.
            prefix_allowed_tokens_fn=lambda _, prefix: self.children.get(tuple(prefix[width:].tolist()), [end]),
        )
        # Padding after a title's end may be the end token again.
        rows = [row[: row.index(end) + 1] if end in row else row for row in found[:, width:].tolist()]
        numbers = [self.number[tuple(row)] for row in rows]
        return [numbers[start : start + BEAMS] for start in range(0, len(numbers), BEAMS)]


def trained(split: Split, titles: Titles, trie: TitleTrie, steps: int) -> Any:
    """A fresh backbone after ``steps`` batches of 32 users."""
    torch.manual_seed(0)
    lm = fresh_backbone(VOCAB, **SIZE)
    model = NextTitle(lm, trie.trie if trie.normalize == "catalogue" else None)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream = TrainStream(split, unit="users", seed=0, global_batch=32, max_history=10**6)
    for step in range(steps):
        histories = [e.history for e in stream.batch(step)]
        batches = micro_batches(training_sequences(titles, histories, HISTORY, TOKENS), titles.frame.pad, trie, VOCAB)
        total = sum(b.target_tokens for b in batches)
        adam.zero_grad()
        for b in batches:
            (model(**b.inputs) / total).backward()
        adam.step()
    return lm.eval()


def timed(rank: Callable[[list[Ints]], Lists], some: list[Ints]) -> tuple[Lists, float, float]:
    """The lists, and users per second and per second of processor time."""
    began, spent = time.perf_counter(), time.process_time()
    found = rank(some)
    return found, len(some) / (time.perf_counter() - began), len(some) / (time.process_time() - spent)


def in_batches(rank: Callable[[list[Ints]], Lists], size: int) -> Callable[[list[Ints]], Lists]:
    return lambda some: [found for start in range(0, len(some), size) for found in rank(some[start : start + size])]


def compare(lm: Any, titles: Titles, trie: TitleTrie, turns: list[list[Ints]], peer_batch: int) -> tuple[float, float]:
    """Prints the rates; returns the median ratio of a turn, and the share of the ten best titles that both find."""
    ways = {
        "grscale": lambda some: rank_titles(lm, trie, some, BEAMS)[0].tolist(),
        "generate": in_batches(Generate(lm, titles, trie.normalize), peer_batch),
    }
    walls: dict[str, list[float]] = {name: [] for name in ways}
    processors: dict[str, list[float]] = {name: [] for name in ways}
    lists: dict[str, Lists] = {name: [] for name in ways}
    for number, some in enumerate(turns):
        for name, way in ways.items():
            found, wall, processor = timed(way, some)
            lists[name] += found
            if number:  # the first turn warms up
                walls[name].append(wall)
                processors[name].append(processor)
    for name in ways:
        print(
            f"  {name:9} {statistics.median(walls[name]):8.2f} users/s, {statistics.median(processors[name]):8.2f} per second of"
            f" processor time (turns: {', '.join(f'{x:.2f}' for x in walls[name])})"
        )
    ours, theirs = lists["grscale"], lists["generate"]
    same = float(np.mean([a[:TOP] == b[:TOP] for a, b in zip(ours, theirs, strict=True)]))
    shared = np.mean([len(set(a[:TOP]) & set(b[:TOP])) / TOP for a, b in zip(ours, theirs, strict=True)])
    ratios = {
        what: statistics.median(a / b for a, b in zip(rates["grscale"], rates["generate"], strict=True))
        for what, rates in (("wall", walls), ("processor", processors))
    }
    print(
        f"  {ratios['wall']:.1f} times as many users per second, {ratios['processor']:.1f} per second of processor time; the same"
        f" ten titles in the same order: {same:.1%} of {len(ours)} users; {shared:.1%} of the ten shared",
        flush=True,
    )
    return ratios["wall"], float(shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--users", type=int, default=32, help="of a turn")
    parser.add_argument("--peer-batch", type=int, default=8, help="users that generate gets at once")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        world = None if DATA.is_dir() else World(users=4000, items=ITEMS)
        split, name = leave_one_out(Path(folder), world), "a planted world" if world else "Amazon Beauty"
        items = split.items()
        tokenizer = train_tokenizer(title_texts(items)[0], VOCAB)
        titles = Titles.build(items, tokenizer, frame_of(tokenizer))
        needed = options.users * (options.rounds + 1)
        users = list(split.evaluation_users("test"))
        chosen = [users[i].history for i in np.random.default_rng(0).permutation(len(users))[:needed]]
        lengths = [len(u.history) for u in users]
        print(
            f"{name}: {split.n_items} items, {len(titles.lengths)} titles of {titles.lengths.mean():.1f} tokens (longest"
            f" {titles.longest}), histories of {np.mean(lengths):.1f} items; {BEAMS} beams, {options.threads} threads, turns of"
            f" {options.users} users, {SIZE}",
            flush=True,
        )
        good = True
        for normalize in ("vocabulary", "catalogue"):
            trie = TitleTrie(titles, normalize)
            lm = trained(split, titles, trie, options.steps)
            some = prompts(titles, chosen, HISTORY, TOKENS)
            print(f"probabilities over the {normalize}, prompts of {np.mean([len(p) for p in some]):.0f} tokens:", flush=True)
            turns = [some[start : start + options.users] for start in range(0, needed, options.users)]
            _, shared = compare(lm, titles, trie, turns, options.peer_batch)
            good = good and shared > 0.98
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
