"""What `tests/benchmarks/gpu.py llm` measures."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from gr.data.split import EvaluationUser, Split
from gr.data.stream import TrainStream
from gr.errors import UserError
from gr.llm.backbone import NextTitle, attend_by, count, fresh_backbone
from gr.llm.decode import rank_titles
from gr.llm.sequences import at_once, micro_batches, prompts, training_sequences
from gr.llm.titles import Titles, TitleTrie, title_texts
from gr.llm.tokenizer import frame_of
from gr.llm.tuning import made_trainable, trained_facts, tuning_flops
from gr.text import train_tokenizer
from jobs.trainer import Micro
from tests.benchmarks.gpu import Contender

VOCAB, HISTORY, TOKENS = 4000, 20, 512
LADDER = {
    "1M": (3, 128, 4, 384),
    "3M": (5, 192, 6, 576),
    "10M": (7, 320, 5, 960),
    "30M": (8, 512, 8, 1536),
    "100M": (13, 768, 12, 2304),
    "300M": (22, 1024, 16, 3072),
}
"""Layers, width, heads, feed-forward; those of cluster/studies/beauty-gpu.yaml."""
QWEN = "Qwen3-0.6B's shape"
QWEN_VOCAB = 151_936
QWEN_SIZE = {"layers": 28, "d_model": 1024, "heads": 16, "d_ff": 3072, "kv_heads": 8, "head_dim": 128}
LORA = {"rank": None, "share": 0.01, "alpha_per_rank": 2.0, "dropout": 0.0}


def contenders(
    split: Split, accelerator: Accelerator, batch: int, beams: int, tiny: bool, only: list[str] | None
) -> Iterator[tuple[dict[str, str], Callable[[], Contender]]]:
    """The leading cells of each row, and what makes its contender."""
    vocab = 300 if tiny else VOCAB
    items = split.items()
    tokenizer = train_tokenizer(title_texts(items)[0], vocab)
    titles = Titles.build(items, tokenizer, frame_of(tokenizer))
    trie = TitleTrie(titles, "catalogue")
    sizes: dict[str, tuple[int, dict[str, int], str]] = {
        name: (vocab, dict(zip(("layers", "d_model", "heads", "d_ff"), size, strict=True)), "full")
        for name, size in LADDER.items()
    }
    sizes[QWEN] = (QWEN_VOCAB, QWEN_SIZE, "lora")
    if tiny:
        small = {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32}
        sizes = {"tiny": (vocab, small, "full"), "tiny, LoRA": (vocab + 100, small | {"head_dim": 8}, "lora")}
    attentions = list(_attentions())
    for name in only or sizes:
        if name not in sizes:
            raise SystemExit(f"--only {name}: not one of {', '.join(sizes)}")
        own, size, tune = sizes[name]
        for attention in attentions:
            model = _Model(split, accelerator, titles, trie, batch, beams)
            head = {"backbone": name, "trained": tune if tune == "full" else "LoRA 1%", "attention": attention}
            yield head, lambda m=model, o=own, s=size, t=tune, a=attention: m.made(o, s, t, a)


def _attentions() -> Iterator[str]:
    """Those that can be computed here."""
    for attention in ("sdpa", "flash_attention_2"):
        try:
            attend_by(fresh_backbone(300, 1, 16, 2, 32), attention, "bf16")
        except UserError as error:
            print(f"skipped: {attention}: {error}", flush=True)
        else:
            yield attention


class _Model:
    def __init__(self, split: Split, accelerator: Accelerator, titles: Titles, trie: TitleTrie, batch: int, beams: int) -> None:
        self.split, self.device, self.titles, self.trie = split, accelerator.device, titles, trie
        self.batch, self.beams = batch, beams

    def made(self, vocab: int, size: dict[str, int], tune: str, attention: str) -> Contender:
        torch.manual_seed(0)
        with torch.device(self.device):
            backbone = fresh_backbone(vocab, **size)
        if tune == "lora":
            backbone = backbone.to(torch.bfloat16)  # a frozen one, as it comes from the hub
        attend_by(backbone, attention, "bf16")
        counts = count(backbone)
        lm = made_trainable(backbone, tune, LORA if tune == "lora" else None)
        n_lora = trained_facts(lm, tune, counts)["n_lora"]
        stream = TrainStream(self.split, unit="users", seed=0, global_batch=self.batch, max_history=10**6)
        search = TitleTrie(self.titles, "catalogue").to(str(self.device))

        def batches(step: int) -> list[Micro]:
            packed = training_sequences(self.titles, [e.history for e in stream.batch(step)], HISTORY, TOKENS)
            return [
                Micro(b.inputs, b.target_tokens, b.tokens, self._flops(backbone, tune, counts, n_lora, b))
                for b in micro_batches(packed, self.titles.frame.pad, self.trie, vocab, limit=at_once(self.device))
            ]

        def rank(users: list[EvaluationUser]) -> object:
            return rank_titles(lm, search, prompts(self.titles, [u.history for u in users], HISTORY, TOKENS), self.beams)

        model = NextTitle(lm, self.trie.trie)
        decoder = (lambda: rank) if attention == "sdpa" else None  # evaluations decode with no other
        return Contender(counts.total + n_lora, "title tokens", model, batches, lambda m, inputs: m(**inputs), decoder)

    def _flops(self, backbone: Any, tune: str, counts: Any, n_lora: int, b: Any) -> float:
        return tuning_flops(backbone, tune, counts, b.tokens, len(b.targets), b.pairs, n_lora)
