"""Quantizes item embeddings into semantic IDs."""

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from gr.sid.quantizers import Quantized, residual_kmeans, rqvae, standardize
from gr.sid.sids import disambiguate, sid_facts, write_sids
from jobs.config import QuantizeConfig
from jobs.runtime import Context, RunFailed, main


def body(context: Context[QuantizeConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    column = pq.read_table(context.input_file("embeddings", "embeddings.parquet"))["embedding"].combine_chunks()
    vectors = np.asarray(column.flatten()).reshape(len(column), -1)
    x = standardize(torch.from_numpy(vectors.copy()))
    result = _quantize(context, x)
    codes = result.codes.numpy()
    write_sids(context.out / "sids.parquet", disambiguate(codes))
    save_file({name: w.contiguous() for name, w in result.weights.items()}, context.out / "quantizer.safetensors")
    error = (result.reconstruction - x).square().sum(1).mean() / x.square().sum(1).mean()
    context.facts.update(
        n_qt=result.n_parameters,
        quantizer=config.method,
        reconstruction_error=float(error),
        **sid_facts(codes, config.width),
    )


def _quantize(context: Context[QuantizeConfig], x: torch.Tensor) -> Quantized:
    config = context.config
    if config.method == "residual-kmeans":
        return residual_kmeans(x, config.levels, config.width, config.seed, config.normalize_residuals)
    try:
        return rqvae(
            x,
            config.levels,
            config.width,
            config.seed,
            config.hidden,
            config.latent,
            config.beta,
            config.steps,
            config.batch,
            config.lr,
            progress=lambda step, loss: context.log(step=step, steps=config.steps, loss=round(loss, 6)),
        )
    except FloatingPointError as error:
        raise RunFailed(str(error)) from None


if __name__ == "__main__":
    main("quantize", body)
