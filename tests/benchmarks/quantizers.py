"""Reconstruction error and time of residual k-means beside faiss's ResidualQuantizer, at equal codes, on Amazon Beauty's titles.

    pip install faiss-cpu && python tests/benchmarks/quantizers.py [--threads 2]

Embeddings: TF-IDF and truncated SVD of the titles, 64 dimensions, standardised as `grscale` does. Error: squared, as a share of
the embeddings' squared length. faiss: its defaults (`max_beam_size` 5), and `max_beam_size` 1; ours: `assignment_beam` 1 and 5.
Also the other tokenizers of grscale at the same codes; the RQ-VAE, 2,000 steps, for the first sizes only.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gr.sid.quantizers import product_kmeans, residual_kmeans, standardize
from gr.sid.references import tfidf_vectors
from gr.sid.rqvae import rqvae
from gr.terms import Codebooks, Gradient

ITEMS = Path(__file__).resolve().parents[3] / "shared" / "data" / "amazon-beauty" / "items.jsonl.gz"
SHAPES = ((3, 8), (4, 6), (2, 10))
"""Levels, and bits per level."""
SEEDS = (0, 1, 2)
RQVAES: tuple[tuple[Gradient, float, Codebooks], ...] = (
    ("straight-through", 0.25, "loss"),
    ("straight-through", 0.25, "ema"),
    ("rotation", 0.25, "loss"),
    ("rotation", 0.25, "ema"),
    ("rotation", 0.0, "loss"),
    ("rotation", 0.0, "ema"),
    ("gumbel", 0.25, "loss"),
)
"""Gradient, weight of the commitment, codebooks."""
BOUND = 1.05


def embeddings() -> Tensor:
    with gzip.open(ITEMS, "rt") as lines:
        titles = [json.loads(line)["title"] or "" for line in lines]
    return standardize(torch.from_numpy(tfidf_vectors(titles, 64, seed=0)))


def measured(name: str, x: Tensor, reconstruct: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    error = float((reconstruct() - x).square().sum(1).mean() / x.square().sum(1).mean())
    print(f"  {name:44} {error:.5f}  {time.perf_counter() - began:6.1f} s", flush=True)
    return error


def theirs(x: Tensor, levels: int, bits: int, beam: int) -> Tensor:
    import faiss

    quantizer = faiss.ResidualQuantizer(x.shape[1], levels, bits)
    quantizer.max_beam_size = beam
    quantizer.train(x.numpy())
    return torch.from_numpy(quantizer.decode(quantizer.compute_codes(x.numpy())))


def compare(x: Tensor, levels: int, bits: int) -> bool:
    """Prints all tokenizers of these sizes; whether ours is within `BOUND` of faiss's error at either beam."""
    width, within = 2**bits, True
    print(f"{levels} levels of {width} codes")
    for beam in (1, 5):

        def ours(seed: int, beam: int = beam) -> Tensor:
            return residual_kmeans(x, levels, width, seed, beam=beam).reconstruction

        peer = measured(f"faiss, max_beam_size {beam}", x, partial(theirs, x, levels, bits, beam))
        errors = [measured(f"ours, assignment_beam {beam}, seed {seed}", x, partial(ours, seed)) for seed in SEEDS]
        ratio = sum(errors) / len(errors) / peer
        print(f"  -> {ratio:.3f} of faiss's error (at most {BOUND})")
        within &= ratio <= BOUND
    measured("mini-batches of 2048", x, lambda: residual_kmeans(x, levels, width, 0, batch=2048).reconstruction)
    measured("product", x, lambda: product_kmeans(x, levels, width, 0).reconstruction)
    for gradient, beta, codebooks in RQVAES if (levels, bits) == SHAPES[0] else ():
        name = f"rqvae, {gradient}, beta {beta:g}, {codebooks}"
        measured(name, x, partial(vae, x, levels, width, gradient, beta, codebooks))
    return within


def vae(x: Tensor, levels: int, width: int, gradient: Gradient, beta: float, codebooks: Codebooks) -> Tensor:
    settings: dict[str, Any] = {"hidden": (256, 128), "latent": 64, "beta": beta, "steps": 2000, "batch": 1024, "lr": 1e-3}
    return rqvae(x, levels, width, 0, **settings, gradient=gradient, codebooks=codebooks).reconstruction


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    threads = options.parse_args().threads
    if not ITEMS.is_file() or find_spec("faiss") is None:
        print(f"skipped: it needs {ITEMS} and faiss-cpu")
        return 0
    import faiss

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    x = embeddings()
    print(f"{len(x)} items, {x.shape[1]} dimensions, faiss {faiss.__version__}, {threads} threads")
    within = [compare(x, levels, bits) for levels, bits in SHAPES]
    return 0 if all(within) else 1


if __name__ == "__main__":
    sys.exit(main())
