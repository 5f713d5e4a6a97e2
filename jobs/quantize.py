"""Quantizes item embeddings into semantic IDs, and measures what the IDs still tell of an item."""

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from gr.data.planted import Oracle
from gr.errors import UserError
from gr.sid.collisions import balance
from gr.sid.probe import probe_embedding, probe_factors, sample
from gr.sid.quantizers import Quantized, product_kmeans, residual_kmeans, standardize
from gr.sid.rqvae import rqvae
from gr.sid.sids import collision_rate, disambiguate, sid_facts, write_sids
from jobs.prepare import dataset_folder
from jobs.runtime import Context, RunFailed, main
from jobs.sid_config import QuantizeConfig

Ints = NDArray[np.int64]


def body(context: Context[QuantizeConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    column = pq.read_table(context.input_file("embeddings", "embeddings.parquet"))["embedding"].combine_chunks()
    vectors = np.asarray(column.flatten()).reshape(len(column), -1)
    factors = _known_factors(context, len(vectors))
    x = standardize(torch.from_numpy(vectors.copy()))
    result = _quantize(context, x)
    context.facts.update(
        n_qt=result.n_parameters,
        quantizer=config.method,
        reconstruction_error=_error(result, x),
        **sid_facts(result.codes.numpy(), config.width),
    )
    codes = _write(context, result, x)
    save_file({name: w.contiguous() for name, w in result.weights.items()}, context.out / "quantizer.safetensors")
    rows = sample(len(codes), config.seed)
    embedding = x[torch.from_numpy(rows)].double().numpy()
    context.facts["probe_embedding_r2"] = probe_embedding(codes[rows], embedding, config.seed)
    if factors:
        some = {name: classes[rows] for name, classes in factors.items()}
        context.facts["probe_factors"] = probe_factors(codes[rows], embedding, some, config.seed)


def _write(context: Context[QuantizeConfig], result: Quantized, x: torch.Tensor) -> Ints:
    """Writes the SIDs, with ``config.collisions`` for items of the same codes; returns the codes without an extra digit."""
    policy, codes = context.config.collisions, result.codes.numpy()
    if policy == "sinkhorn":
        balanced = balance(codes, result.last_points, result.last_book)
        moved = result.with_codes(torch.from_numpy(balanced))
        context.facts.update(
            moved_items=float((balanced != codes).any(axis=1).mean()), reconstruction_error_moved=_error(moved, x)
        )
        codes = balanced
    unlike = collision_rate(codes)
    # A last level that can't hold all items of the same first codes leaves some for a digit more.
    digit = policy == "extra-digit" or (policy == "sinkhorn" and unlike > 0)
    sids = disambiguate(codes) if digit else codes
    write_sids(context.out / "sids.parquet", sids, levels=codes.shape[1], shared=policy == "allow")
    context.facts.update(
        collisions=policy,
        digits=sids.shape[1],
        collision_rate_before_digit=unlike,
        collision_rate_after=collision_rate(sids),
    )
    return codes


def _error(result: Quantized, x: torch.Tensor) -> float:
    """Squared error of the reconstruction, as a share of the embeddings' squared length."""
    return float((result.reconstruction - x).square().sum(1).mean() / x.square().sum(1).mean())


def _known_factors(context: Context[QuantizeConfig], items: int) -> dict[str, Ints]:
    """Of a planted world the classes of its items: two that their titles tell, and one (``community``) that no text does."""
    if "dataset" not in context.run.inputs:
        return {}
    folder = dataset_folder(context.input("dataset"))
    catalogue = Oracle.load(folder).catalogue
    if len(catalogue.topic) != items:
        raise UserError(f"run.yaml: inputs.dataset: {folder} has {len(catalogue.topic)} items, the embeddings have {items}")
    return {"topic": catalogue.topic, "subtopic": catalogue.subtopic, "community": catalogue.community}


def _quantize(context: Context[QuantizeConfig], x: torch.Tensor) -> Quantized:
    config = context.config
    shape: dict[str, Any] = {"levels": config.levels, "width": config.width, "seed": config.seed}
    if config.method == "product":
        if config.levels > x.shape[1]:
            raise UserError(f"config.levels is {config.levels}; the embedding's {x.shape[1]} dimensions make no more parts")
        return product_kmeans(x, **shape, batch=config.kmeans_batch)
    if config.method == "residual-kmeans":
        return residual_kmeans(
            x, **shape, normalize_residuals=config.normalize_residuals, batch=config.kmeans_batch, beam=config.assignment_beam
        )
    try:
        return rqvae(
            x,
            **shape,
            **config.model_dump(include={"hidden", "latent", "beta", "steps", "batch", "lr", "gradient", "codebooks"}),
            kmeans_batch=config.kmeans_batch,
            progress=lambda step, loss: context.log(step=step, steps=config.steps, loss=round(loss, 6)),
        )
    except FloatingPointError as error:
        raise RunFailed(str(error)) from None


if __name__ == "__main__":
    main("quantize", body)
