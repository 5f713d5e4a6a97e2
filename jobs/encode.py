"""Embeds the catalogue's text by a frozen encoder, or by a reference without one."""

import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from gr.data.split import Split
from gr.errors import UserError
from gr.files import whole_file
from gr.sid.encoder import embed, in_order, load_encoder, most_tokens, text_batches
from gr.sid.references import random_vectors, templated, tfidf_vectors
from jobs.chunks import chunk_folder
from jobs.runtime import Context, main
from jobs.sid_config import EncodeConfig

Vectors = NDArray[np.float32]
CHUNK = 16
"""Batches whose embeddings are one file: what a killed run does again at most."""


def body(context: Context[EncodeConfig]) -> None:
    config, launch = context.config, context.run.launch
    torch.set_num_threads(launch.threads)
    given = [bool(context.run.inputs.get("encoder")), *(x is not None for x in (config.model, config.tfidf, config.random))]
    if sum(given) != 1:
        raise UserError(
            "run.yaml: an encoder is either inputs.encoder or one of config.model, config.tfidf, config.random; give one of them"
        )
    if launch.zero or launch.accumulation > 1:
        raise UserError("run.yaml: launch: stage encode trains nothing; leave out zero and accumulation")
    texts = templated(Split(context.input("split")).items(), config.template)
    if config.tfidf or config.random:
        vectors, kind = _reference(config, texts), "tfidf" if config.tfidf else "random"
        context.facts.update(n_llm=0, encoder=kind, encoder_init=kind)
    else:
        vectors = _encoded(context, texts)
    if not context.is_main:
        return
    flat = pa.array(vectors.ravel(), pa.float32())
    table = pa.table(
        {
            "item": pa.array(range(len(vectors)), pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    pq.write_table(table, context.out / "embeddings.parquet")
    context.facts["d_embedding"] = vectors.shape[1]


def _reference(config: EncodeConfig, texts: list[str]) -> Vectors:
    if config.tfidf:
        return tfidf_vectors(texts, config.tfidf.dims, config.tfidf.seed)
    assert config.random
    return random_vectors(len(texts), config.random.dims, config.random.seed)


def _encoded(context: Context[EncodeConfig], texts: list[str]) -> Vectors:
    """By a neural net, in chunks that the processes share; all of them on the first process, its own on the others."""
    config, launch = context.config, context.run.launch
    fresh = "encoder" in context.run.inputs
    model, tokenizer = load_encoder(str(context.input("encoder")) if fresh else context.model(str(config.model)))
    model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    if launch.precision == "bf16":
        model.bfloat16()
    batches = text_batches(tokenizer, texts, min(config.max_tokens, most_tokens(model, tokenizer)), config.batch)
    chunks = [batches[start : start + CHUNK] for start in range(0, len(batches), CHUNK)]
    folder = chunk_folder(context)
    files = [folder / f"{number:06d}.npy" for number in range(len(chunks))]
    if found := sum(file.is_file() for file in files):
        context.log(event="resumed", done=found, of=len(files))
    for chunk, file in list(zip(chunks, files, strict=True))[context.rank :: launch.processes]:
        if not file.is_file():
            vectors = np.concatenate([embed(model, b, tokenizer.pad_token_id, config.pooling) for b in chunk])
            with whole_file(file) as aside, aside.open("wb") as opened:  # a name would be given an ending
                np.save(opened, vectors)
        context.log(done=sum(f.is_file() for f in files), of=len(files))
    context.facts.update(
        n_llm=sum(p.numel() for p in model.parameters()),
        encoder="fresh" if fresh else config.model,
        encoder_init="fresh" if fresh else "pretrained",
    )
    if not context.is_main:
        return np.empty((0, 0), dtype=np.float32)
    while not all(file.is_file() for file in files):
        time.sleep(0.1)
    return in_order(batches, [np.load(file) for file in files])


if __name__ == "__main__":
    main("encode", body)
