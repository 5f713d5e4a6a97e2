"""Embeds the catalogue's text by a frozen encoder."""

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gr.data.split import Split
from gr.errors import UserError
from gr.sid.encoder import encode_texts, load_encoder, most_tokens
from gr.text import item_texts
from jobs.config import EncodeConfig
from jobs.runtime import Context, main


def body(context: Context[EncodeConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    fresh = "encoder" in context.run.inputs
    if fresh == (config.model is not None):
        raise UserError("run.yaml: an encoder is either inputs.encoder or config.model; give one of them")
    model, tokenizer = load_encoder(str(context.input("encoder")) if fresh else context.model(str(config.model)))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = item_texts(Split(context.input("split")).items())
    vectors = encode_texts(model, tokenizer, texts, min(config.max_tokens, most_tokens(model, tokenizer)), config.batch)
    flat = pa.array(vectors.ravel(), pa.float32())
    table = pa.table(
        {
            "item": pa.array(range(len(vectors)), pa.int32()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    pq.write_table(table, context.out / "embeddings.parquet")
    context.facts.update(
        n_llm=sum(p.numel() for p in model.parameters()),
        encoder="fresh" if fresh else config.model,
        encoder_init="fresh" if fresh else "pretrained",
        d_embedding=vectors.shape[1],
    )


if __name__ == "__main__":
    main("encode", body)
