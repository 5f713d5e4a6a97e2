"""Item text to embeddings: the views a fresh encoder is trained on, pooling, and limits of length."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM, RobertaConfig, RobertaModel, T5Config, T5Model

from gr.errors import UserError
from gr.sid.encoder import NO_WORD, TextViews, encode_texts, last_pool, load_encoder, mean_pool, most_tokens
from gr.sid.references import random_vectors, templated, tfidf_vectors
from gr.text import train_tokenizer
from jobs.sid_config import EncodeConfig

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


def saved(tokenizer: Any, model: Any, folder: Path) -> tuple[Any, Any]:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_encoder(str(folder))


def test_a_decoder_is_pooled_at_its_last_token_whatever_stands_beside_it(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    lm = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), intermediate_size=64, **sizes))
    model, again = saved(tokenizer, lm, tmp_path)
    together = encode_texts(model, again, TEXTS, 64, 4, pooling="last")
    for text, vector in zip(TEXTS, together, strict=True):
        ids = torch.tensor([again(text)["input_ids"]])
        with torch.no_grad():
            alone = lm.eval().model(input_ids=ids).last_hidden_state[0, -1]
        assert np.allclose(vector, alone.numpy(), atol=1e-5)
    assert not np.allclose(together, encode_texts(model, again, TEXTS, 64, 4))
    hidden, mask = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert last_pool(hidden, mask).tolist() == [[2.0, 3.0], [10.0, 11.0]]


def test_of_an_encoder_decoder_the_encoder_is_counted_and_run(tokenizer: Any, tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    whole = T5Model(T5Config(vocab_size=len(tokenizer), **sizes))
    model, again = saved(tokenizer, whole, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.encoder.parameters())
    assert encode_texts(model, again, TEXTS, 64, 2).shape == (4, 32)


@pytest.fixture
def items() -> pa.Table:
    rows = [("a", "Red {lamp}", ["Acme", "Home"]), ("b", None, []), ("c", "Desk", [])]
    return pa.Table.from_pylist([dict(zip(("key", "title", "attributes"), row, strict=True)) for row in rows])


def test_a_template_says_what_is_encoded_of_an_item(items: pa.Table) -> None:
    assert templated(items, EncodeConfig().template) == ["Red {lamp}; Acme, Home", "item b", "Desk"]
    assert templated(items, "passage: {title} by {attributes}")[0] == "passage: Red {lamp} by Acme, Home"
    for template, words in (
        ("passage", "has nothing of the item"),
        ("{titel}", "has {titel}; an item has {text}, {title}, {attributes}, {key}"),
        ("{title.__class__}", "has {title.__class__}"),
        ("{title", "a brace that is meant as one is written twice"),
    ):
        with pytest.raises(ValidationError, match=words.replace("{", r"\{").replace("}", r"\}")):
            EncodeConfig(template=template)


def test_references_are_repeatable_and_only_one_knows_the_text() -> None:
    texts = [f"{kind} number{i}" for i in range(30) for kind in ("lamp bulb light", "chair seat wood")]
    vectors = tfidf_vectors(texts, 3, seed=0)
    assert vectors.shape == (60, 3) and np.array_equal(vectors, tfidf_vectors(texts, 3, seed=0))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = unit @ unit.T
    assert alike[0, 2::2].min() > 0.8 > 0.5 > alike[0, 1::2].max(), "the same kind, and the other"
    random = random_vectors(4000, 3, seed=0)
    assert np.array_equal(random, random_vectors(4000, 3, seed=0)) and not np.array_equal(random, random_vectors(4000, 3, seed=1))
    assert np.allclose(np.cov(random.T), np.eye(3), atol=0.1)
    with pytest.raises(UserError, match="dims is 61; 60 texts of 36 words have at most 36"):
        tfidf_vectors(texts, 61, seed=0)
    with pytest.raises(UserError, match="no words"):
        tfidf_vectors(["!", "?"], 1, seed=0)
