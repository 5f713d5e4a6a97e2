"""The SID recommender: a T5 encoder-decoder that reads the SIDs of a history and generates the next item's (TIGER)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from gr.errors import UserError
from gr.sid.sids import SidTable
from gr.terms import Normalize
from gr.trie import Trie


def t5(vocab: int, layers: int, d_model: int, heads: int, d_kv: int, d_ff: int, dropout: float) -> T5ForConditionalGeneration:
    """A fresh T5 with ``layers`` in the encoder and as many in the decoder."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab,
            d_model=d_model,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=heads,
            dropout_rate=dropout,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            pad_token_id=0,
            eos_token_id=None,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


def load_t5(folder: Path) -> T5ForConditionalGeneration:
    """A trained recommender; UserError when it can't be loaded."""
    try:
        return T5ForConditionalGeneration.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded as a SID recommender: {' '.join(str(error).split())}") from None


class SidBatcher:
    """Histories and targets to padded token tensors."""

    def __init__(self, sids: SidTable, max_history: int) -> None:
        self.sids, self.max_history = sids, max_history

    def encoder_inputs(self, histories: Sequence[NDArray[np.int32]]) -> dict[str, Tensor]:
        """(users, longest x digits) `input_ids` and `attention_mask`; the newest ``max_history`` items of each history."""
        histories = [h[-self.max_history :] for h in histories]
        lengths = np.array([len(h) for h in histories])
        longest = max(1, int(lengths.max()))
        present = np.arange(longest)[None, :] < lengths[:, None]
        digits = self.sids.tokens.shape[1]
        tokens = np.zeros((len(histories), longest, digits), dtype=np.int64)
        tokens[present] = self.sids.tokens[np.concatenate(histories)]
        return {
            "input_ids": torch.from_numpy(tokens.reshape(len(histories), -1)),
            "attention_mask": torch.from_numpy(np.repeat(present, digits, axis=1).astype(np.int64)),
        }

    def labels(self, targets: Sequence[int]) -> Tensor:
        """(users, digits) tokens of the target items."""
        return torch.from_numpy(self.sids.tokens[np.asarray(targets)])


class SidLoss:
    """Sum over targets of the negative log-likelihood of the target's whole SID, in nats; in fp64, for how a batch is cut must
    not show.

    ``normalize``: over the whole "vocabulary" at every digit, as TIGER does; or over the "catalogue", that is, over the digits
    that continue the prefix to an existing SID. The latter makes the product of the digits' probabilities a distribution over
    the items themselves, and spares the model from learning by heart which SIDs exist. `gr.beam.beam_search` must do alike.
    """

    def __init__(self, sids: SidTable, normalize: Normalize) -> None:
        self.normalize = normalize
        self.trie = Trie.build(sids.distinct.tolist())

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs["labels"]
        start = torch.zeros_like(labels[:, :1])
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
        ).logits.float()
        if self.normalize == "vocabulary":
            return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").double().sum()
        if self.trie.first_edge.device != labels.device:
            self.trie = self.trie.to(labels.device)
        return self._over_catalogue(logits, labels)

    def _over_catalogue(self, logits: Tensor, labels: Tensor) -> Tensor:
        node = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
        loss = torch.zeros((), dtype=torch.float64, device=labels.device)
        for digit in range(labels.shape[1]):
            token, child, exists = self.trie.children(node, digit)
            scores = logits[:, digit].gather(1, token).masked_fill(~exists, float("-inf"))
            chosen = (token == labels[:, digit, None]) & exists
            loss = loss + (scores.logsumexp(1) - scores[chosen]).double().sum()
            node = child[chosen]
        return loss


def t5_flops(config: T5Config, lengths: NDArray[np.integer], digits: int, beams: int = 1) -> float:
    """Floating point operations of one forward pass over real tokens, padding left out.

    ``lengths``: (users,) tokens of each history; ``digits`` of a SID, decoded by teacher forcing (``beams`` 1) or by beam search.
    2 per weight and token, and 4 x heads x d_kv per layer and pair of query and key (Kaplan et al. 2020, section 2.1, with the
    two stacks counted apart; a user's cross-attention keys are computed once, whatever the beams).
    """
    inner = config.num_heads * config.d_kv
    projection, feed_forward = 2 * config.d_model * inner, 4 * config.d_model * config.d_ff
    length = lengths.astype(np.float64)
    tokens, users = length.sum(), len(length)
    decoded = 1 + beams * (digits - 1)  # per user; the first digit has one beam
    seen = 1 + beams * (digits * (digits + 1) / 2 - 1)  # positions of its own prefix that they attend to
    encoder = config.num_layers * (tokens * (4 * projection + feed_forward) + 4 * inner * np.square(length).sum())
    keys = config.num_decoder_layers * tokens * 2 * projection
    decoder = config.num_decoder_layers * (
        users * decoded * (6 * projection + feed_forward) + 4 * inner * (users * seen + decoded * tokens)
    )
    return float(encoder + keys + decoder + users * decoded * 2 * config.d_model * config.vocab_size)
