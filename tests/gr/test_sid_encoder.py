"""Item text to embeddings: the views a fresh encoder is trained on, pooling, and limits of length."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from gr.sid.encoder import NO_WORD, TextViews, encode_texts, load_encoder, mean_pool, most_tokens
from gr.text import train_tokenizer

TEXTS = ["red lamp; acme", "blue chair", "green desk", "tall lamp shade"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@pytest.mark.parametrize(("text", "word"), [(",", ","), ("; ;,", ";"), (" \t", NO_WORD)])
def test_a_text_of_punctuation_has_views_too(tokenizer: Any, text: str, word: str) -> None:
    views = TextViews(tokenizer, [*TEXTS, text], 24, seed=0)
    for step in range(4):
        tokens, mask = views.batch(step, 5)
        assert tokens.shape[0] == 10 and (mask.sum(1) > 0).all()
    pieces = {tuple(views.pieces[w]) for w in views.words[-1]}
    assert tuple(tokenizer([word], add_special_tokens=False)["input_ids"][0]) in pieces


def test_a_bf16_encoder_is_pooled_in_fp32(tokenizer: Any, tmp_path: Path) -> None:
    hidden = (1 + torch.rand(2, 400, 8, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    mask = torch.ones(2, 400, dtype=torch.int64)
    assert torch.equal(mean_pool(hidden, mask), mean_pool(hidden.float(), mask)), "the mean of the very same numbers"
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SIZES), add_pooling_layer=False).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, again = load_encoder(str(tmp_path))
    assert model.dtype == torch.bfloat16
    vectors = encode_texts(model, again, [" ".join(TEXTS) * 4], 128, 4)
    assert not np.array_equal(vectors, torch.from_numpy(vectors).bfloat16().float().numpy()), "a mean, finer than bf16"


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        (BertModel(BertConfig(vocab_size=300, max_position_embeddings=16, **SIZES), add_pooling_layer=False), 16),
        (RobertaModel(RobertaConfig(vocab_size=300, max_position_embeddings=16, **SIZES), add_pooling_layer=False), 14),
    ],
)
def test_texts_are_cut_to_the_positions_a_model_has(tokenizer: Any, model: Any, limit: int) -> None:
    assert tokenizer.model_max_length > 10**9, "a tokenizer that states no limit"
    assert most_tokens(model, tokenizer) == limit
    vectors = encode_texts(model.eval(), tokenizer, ["lamp " * 60], most_tokens(model, tokenizer), 4)
    assert vectors.shape == (1, 32)
    with pytest.raises((IndexError, RuntimeError)):
        encode_texts(model, tokenizer, ["lamp " * 60], limit + 1, 4)
