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
from gr.sid.inputs import SIDS_ALONE, Reads, input_embedding
from gr.sid.sids import SidTable
from gr.terms import Normalize
from gr.trie import Trie


class T5Recommender(T5ForConditionalGeneration):  # type: ignore[misc]
    """A T5 whose encoder reads what its configuration's ``input_tables`` say beside the SIDs (`gr.sid.inputs`), if anything."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.encoder.embed_tokens = input_embedding(self.encoder.embed_tokens, config, config.initializer_factor)


def t5(
    vocab: int, layers: int, d_model: int, heads: int, d_kv: int, d_ff: int, dropout: float, more: int = 0, places: int = 0
) -> T5ForConditionalGeneration:
    """A fresh T5 with ``layers`` in the encoder and as many in the decoder; ``more`` tokens and ``places`` of items that it only
    reads (`gr.sid.inputs.Reads.tables`)."""
    tables = {"input_tables": {"more": more, "places": places}} if more or places else {}
    return (T5Recommender if tables else T5ForConditionalGeneration)(
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
            **tables,
        )
    )


def load_t5(folder: Path) -> T5ForConditionalGeneration:
    """A trained recommender; UserError when it can't be loaded."""
    try:
        return T5Recommender.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded as a SID recommender: {' '.join(str(error).split())}") from None


class SidBatcher:
    """Histories and targets to padded token tensors; ``reads``: what is read beside the SIDs.

    Places of items count from the newest, which is 1 whatever the history's length: what was bought last tells most, and the
    decoder's attention to the history knows no distance.
    """

    def __init__(self, sids: SidTable, max_history: int, reads: Reads = SIDS_ALONE) -> None:
        self.sids, self.max_history, self.reads = sids, max_history, reads
        self._tokens = reads.item_tokens(sids.tokens, sids.vocab)

    def encoder_inputs(self, histories: Sequence[NDArray[np.int32]], users: Sequence[int] = ()) -> dict[str, Tensor]:
        """(users, longest) `input_ids` and `attention_mask`: the newest ``max_history`` items of each history, oldest first; with
        user tokens those of ``users``, numbers in the split, before them."""
        histories = [h[-self.max_history :] for h in histories]
        lengths = np.array([len(h) for h in histories])
        longest = max(1, int(lengths.max()))
        place = np.maximum(lengths[:, None] - np.arange(longest), 0)  # 1 at the newest item, 0 at padding
        present = place > 0
        tokens = np.zeros((len(histories), longest, self._tokens.shape[1]), dtype=np.int64)
        tokens[present] = self._tokens[np.concatenate(histories)]
        tokens += self.reads.at(place, self.sids.vocab)[..., None]
        ids, mask = tokens.reshape(len(histories), -1), np.repeat(present, tokens.shape[2], axis=1)
        if self.reads.user_tokens:
            ids = np.concatenate([self.reads.user(users, self.sids.vocab)[:, None], ids], axis=1)
            mask = np.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}

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
            token, child, exists = self.trie.children(node, None if node.device.type == "cpu" else self.trie.widest[digit])
            scores = logits[:, digit].gather(1, token).masked_fill(~exists, float("-inf"))
            chosen = ((token == labels[:, digit, None]) & exists).to(torch.int8).argmax(dim=1, keepdim=True)
            loss = loss + (scores.logsumexp(1) - scores.gather(1, chosen)[:, 0]).double().sum()
            node = child.gather(1, chosen)[:, 0]
        return loss


def t5_flops(config: T5Config, lengths: NDArray[np.integer], digits: int) -> float:
    """Floating point operations of one forward pass that is told the target (teacher forcing), padding left out.

    ``lengths``: (users,) tokens of each history; ``digits`` of a SID.
    """
    decoded = len(lengths) * digits
    pairs = len(lengths) * digits * (digits + 1) / 2 + digits * float(lengths.sum())
    return encoder_flops(config, lengths) + decoder_flops(config, decoded, pairs, decoded * config.vocab_size)


def encoder_flops(config: T5Config, lengths: NDArray[np.integer]) -> float:
    """Of the encoder, and of the keys and values that the decoder attends to: once per user, however many beams there are.

    2 per weight and token, and 4 x heads x d_kv per layer and pair of query and key (Kaplan et al. 2020, section 2.1, with the
    two stacks counted apart).
    """
    inner = config.num_heads * config.d_kv
    projection, length = 2 * config.d_model * inner, lengths.astype(np.float64)
    tokens = length.sum()
    encoder = config.num_layers * (
        tokens * (4 * projection + 4 * config.d_model * config.d_ff) + 4 * inner * np.square(length).sum()
    )
    return float(encoder + config.num_decoder_layers * tokens * 2 * projection)


def decoder_flops(config: T5Config, tokens: int, pairs: float, scores: int) -> float:
    """Of ``tokens`` run through the decoder, ``pairs`` of a query and a key that it attends to (of its own prefix and of the
    history), and ``scores`` of vocabulary entries."""
    inner = config.num_heads * config.d_kv
    weights = 12 * config.d_model * inner + 4 * config.d_model * config.d_ff
    return float(config.num_decoder_layers * (tokens * weights + 4 * inner * pairs) + scores * 2 * config.d_model)
