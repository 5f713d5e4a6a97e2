"""What `tests/benchmarks/gpu.py sid` measures."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from gr.data.split import EvaluationUser, Split
from gr.sid.quantizers import residual_kmeans, standardize
from gr.sid.references import tfidf_vectors
from gr.sid.sids import SidTable, disambiguate
from jobs import evaluate_sid
from jobs.options import Optimizer
from jobs.sid_config import T5Size, TrainSidConfig
from jobs.sid_recipes import recipe
from tests.benchmarks.gpu import Contender

LEVELS, WIDTH, HISTORY = 3, 256, 20
LADDER = {
    "336K": (1, 64, 3, 512),
    "778K": (2, 64, 3, 512),
    "1.9M": (5, 64, 3, 512),
    "3.3M": (9, 64, 3, 512),
    "6.7M": (3, 128, 6, 1024),
    "13M": (4, 128, 6, 1024),
    "21M": (7, 128, 6, 1024),
    "43M": (8, 192, 9, 1536),
    "88M": (9, 320, 15, 2560),
    "192M": (20, 384, 18, 3072),
}
"""The paper's labels and sizes: layers of each stack, width, heads of 64, feed-forward. What they count to is printed."""
TINY_SIZE = T5Size(layers=1, d_model=16, heads=2, d_kv=8, d_ff=32)
ARCHITECTURES = ("encoder-decoder", "decoder-only")


def contenders(
    split: Split, accelerator: Accelerator, batch: int, beams: int, tiny: bool, only: list[str] | None
) -> Iterator[tuple[dict[str, str], Callable[[], Contender]]]:
    """The leading cells of each row, and what makes its contender."""
    sids = semantic_ids(split, 4 if tiny else WIDTH)
    sizes = {"tiny": TINY_SIZE} if tiny else {n: size_of(*s) for n, s in LADDER.items()}
    for name in only or sizes:
        if name not in sizes:
            raise SystemExit(f"--only {name}: not one of {', '.join(sizes)}")
        for architecture in ARCHITECTURES:
            size = sizes[name] if architecture == "encoder-decoder" else causal(sizes[name])
            yield (
                {"size": name, "architecture": architecture},
                lambda s=size, a=architecture: contender(s, a, split, sids, accelerator, batch, beams),
            )


def causal(size: T5Size) -> T5Size:
    """Of a decoder-only model of as many parameters: twice the layers of 4 d i + 3 d f where a pair of T5's has 12 d i + 4 d f (d
    the width, i heads x d_kv, f the feed-forward)."""
    d_ff = round(2 / 3 * (size.heads * size.d_kv + size.d_ff))
    return T5Size(layers=2 * size.layers, d_model=size.d_model, heads=size.heads, d_kv=size.d_kv, d_ff=d_ff)


def size_of(layers: int, d_model: int, heads: int, d_ff: int) -> T5Size:
    return T5Size(layers=layers, d_model=d_model, heads=heads, d_kv=64, d_ff=d_ff)


def semantic_ids(split: Split, width: int) -> SidTable:
    vectors = standardize(torch.from_numpy(tfidf_vectors(split.titles(), min(64, split.n_items - 1), seed=0)))
    codes = disambiguate(residual_kmeans(vectors, LEVELS, width, seed=0).codes.numpy())
    widths = codes.max(axis=0) + 1
    return SidTable(1 + np.concatenate([[0], np.cumsum(widths)[:-1]]) + codes, int(1 + widths.sum()))


def contender(
    size: T5Size, architecture: Any, split: Split, sids: SidTable, accelerator: Accelerator, batch: int, beams: int
) -> Contender:
    """``batch``: users of a step for the decoder-only model, all of whose items are its targets, else targets."""
    optimizer = Optimizer(steps=1, global_batch=batch, lr=1e-4)
    config = TrainSidConfig(size=size, architecture=architecture, max_history=HISTORY, optimizer=optimizer, seed=0)
    made = recipe(config, accelerator, split, sids)

    def decoder() -> Callable[[list[EvaluationUser]], object]:
        """The evaluation's own, of the model as it is saved and loaded."""
        with tempfile.TemporaryDirectory() as folder:
            made.recommender.cpu().save_pretrained(folder)
            context: Any = SimpleNamespace(input=lambda _: Path(folder), config=SimpleNamespace(beams=beams))
            rankers = {"encoder-decoder": evaluate_sid._encoder_decoder, "decoder-only": evaluate_sid._decoder_only}
            return rankers[architecture](context, config, sids, str(accelerator.device))

    return Contender(
        made.facts["n_rs"],
        "targets",
        made.model,
        lambda step: made.batches(step, 1),
        made.loss,
        decoder,
        made.recordable,
    )
