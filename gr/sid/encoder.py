"""Item text to item embedding: a frozen `AutoModel`, pooled; and a fresh one, trained on the catalogue's own text.

The fresh encoder is BERT-shaped and trained by contrast: two random halves of the same item's words are to lie closer than
halves of different items (InfoNCE, van den Oord et al. 2018, eq. 4; the views are the word deletion of CLEAR, Wu et al. 2020). It
sees titles and attributes only, never an interaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from gr.errors import UserError
from gr.terms import Pooling

TEMPERATURE = 0.1
KEPT_WORDS = 0.5
NO_WORD = "item"  # stands for a text of spaces, so that none is without a word to view


def fresh_encoder(vocab: int, layers: int, d_model: int, heads: int, d_ff: int, max_tokens: int) -> BertModel:
    """A BERT-shaped encoder with random weights."""
    return BertModel(
        BertConfig(
            vocab_size=vocab,
            hidden_size=d_model,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=d_ff,
            max_position_embeddings=max_tokens,
            type_vocab_size=1,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    )


def load_encoder(name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any `AutoModel` by hub name or path, encoder or decoder, frozen; of an encoder-decoder the encoder alone.

    UserError when it can't be loaded, or when its file lacks weights that would then be random. A pooler that the file lacks is
    dropped: nothing here uses it, and it would be counted.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            name_or_path,
            trust_remote_code=False,
            use_safetensors=True,  # a .bin is a pickle
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        safe = "; weights are read from safetensors only" if "safetensors" in str(error) else ""
        words = " ".join(str(error).split())
        raise UserError(f"model {name_or_path!r} can't be loaded as an encoder: {words}{safe}") from None
    if lacking := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise UserError(f"model {name_or_path!r} is no whole encoder: {len(lacking)} weights are missing, such as {lacking[0]}")
    if info["missing_keys"]:
        model.pooler = None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval().requires_grad_(False), tokenizer


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(items, tokens, d) and (items, tokens) to (items, d): the mean over the tokens that are no padding, in fp32."""
    hidden = hidden.float()  # in bf16 a sum of many tokens loses what tells items apart
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def last_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(items, tokens, d) and (items, tokens) to (items, d): the last token that is no padding, in fp32; a decoder has read all
    there."""
    last = mask.sum(1).clamp(min=1) - 1  # padding is on the right
    return hidden[torch.arange(len(hidden), device=hidden.device), last].float()


POOL = {"mean": mean_pool, "last": last_pool}


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the encoder can take; absurdly many where neither it nor its tokenizer has a limit.

    Where positions are numbered from the padding's on, as in RoBERTa, so many fewer are left.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    first = getattr(table, "padding_idx", None)
    limits = (tokenizer.model_max_length, positions and positions - (0 if first is None else first + 1))
    return int(min(limit for limit in limits if limit and limit > 0))


@dataclass(frozen=True)
class TextBatch:
    """``rows``: which texts, of like length; ``ids``: their token numbers."""

    rows: list[int]
    ids: list[list[int]]


def text_batches(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, batch: int) -> list[TextBatch]:
    """All texts in batches by length, so that little of a batch is padding; the same ones whoever embeds them."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [TextBatch(rows, [ids[i] for i in rows]) for rows in groups]


@torch.no_grad()
def embed(model: PreTrainedModel, batch: TextBatch, padding: int, pooling: Pooling = "mean") -> NDArray[np.float32]:
    """(texts of the batch, d) pooled embeddings."""
    tokens, mask = (t.to(model.device) for t in pad(batch.ids, padding))
    pooled: Tensor = POOL[pooling](model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)
    return pooled.cpu().numpy()


def encode_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int,
    batch: int,
    pooling: Pooling = "mean",
) -> NDArray[np.float32]:
    """(texts, d) pooled embeddings."""
    batches = text_batches(tokenizer, texts, max_tokens, batch)
    return in_order(batches, [embed(model, b, tokenizer.pad_token_id, pooling) for b in batches])


def in_order(batches: Sequence[TextBatch], parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The batches' embeddings in the order of the texts."""
    vectors = np.concatenate(parts)
    out = np.empty_like(vectors)
    out[np.concatenate([np.array(b.rows) for b in batches])] = vectors
    return out


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows of token numbers to (rows, longest) tokens, padded on the right, and the mask of what is no padding."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(max(1, lengths.max()))[None, :] < lengths[:, None]
    tokens = np.full(mask.shape, value, dtype=np.int64)
    tokens[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(tokens), torch.from_numpy(mask.astype(np.int64))


class TextViews:
    """Batches of two random views per item, as a pure function of (seed, step)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, seed: int) -> None:
        self.seed, self.max_tokens = seed, max_tokens
        words = [text.replace(";", " ").replace(",", " ").split() or text.split() or [NO_WORD] for text in texts]
        vocabulary = sorted({word for row in words for word in row})
        number = {word: i for i, word in enumerate(vocabulary)}
        self.pieces = tokenizer(vocabulary, add_special_tokens=False)["input_ids"]
        self.words = [np.array([number[w] for w in row]) for row in words]

    def batch(self, step: int, items: int) -> tuple[Tensor, Tensor]:
        """``items`` different items (or all) as (2 x items, tokens) tokens and mask: a view of each, then another of each."""
        items = min(items, len(self.words))
        per_epoch = len(self.words) // items
        order = np.random.default_rng((self.seed, step // per_epoch)).permutation(len(self.words))
        chosen = order[step % per_epoch * items :][:items]
        rng = np.random.default_rng((self.seed, step))
        views = [self._view(self.words[i], rng) for _ in range(2) for i in chosen]
        return pad(views, 0)

    def _view(self, words: NDArray[np.int64], rng: np.random.Generator) -> list[int]:
        keep = rng.random(len(words)) < KEPT_WORDS
        keep[rng.integers(len(words))] = True
        return [t for w in words[keep] for t in self.pieces[w]][: self.max_tokens]


def contrastive_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Sum over items of InfoNCE between an item's two views, both ways averaged."""
    hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    views = nn.functional.normalize(mean_pool(hidden, inputs["attention_mask"]), dim=1)
    a, b = views.chunk(2)
    similarity = a @ b.T / TEMPERATURE
    target = torch.arange(len(a), device=similarity.device)
    loss = nn.functional.cross_entropy
    return (loss(similarity, target, reduction="sum") + loss(similarity.T, target, reduction="sum")) / 2
