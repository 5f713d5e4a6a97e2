"""The catalogue as text: what an encoder reads of an item, and the tokenizer of a fresh model."""

from collections.abc import Iterable

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<pad>", "<bos>", "<end>"


def item_texts(items: pa.Table) -> list[str]:
    """Title and attributes of every item, in the catalogue's order: `title; attribute, attribute`.

    An item without both reads as `item <key>`, so that no text is empty.
    """
    texts = []
    for row in items.select(["key", "title", "attributes"]).to_pylist():
        parts = [row["title"] or "", ", ".join(row["attributes"] or [])]
        texts.append("; ".join(part for part in parts if part) or f"item {row['key']}")
    return texts


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens (256 bytes and three specials among them), for any script.

    Special tokens: `<pad>` 0, `<bos>` 1, `<end>` 2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END)
