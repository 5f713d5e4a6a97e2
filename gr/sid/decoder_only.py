"""The decoder-only SID recommender: one causal pass over a user's SIDs predicts every item from those before it.

To a causal model a catalogue of SIDs is what a catalogue of titles is, token sequences none of which begins another. So
sequences, loss and decoding are those of LLM-as-RS (`gr.llm`); what differs is the vocabulary, and that there is nothing to
pretrain on.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from gr.dropout import dropout
from gr.errors import UserError
from gr.llm.backbone import fresh_backbone
from gr.llm.sequences import Ints, Items, Packed, prompts, target_sequence, training_sequences
from gr.llm.titles import Titles
from gr.llm.tokenizer import Frame
from gr.sid.inputs import SIDS_ALONE, Reads, input_embedding
from gr.sid.sids import SidTable


def sid_titles(sids: SidTable) -> Titles:
    """The SIDs as `Titles`: SID s is title s, of as many tokens as it has digits; token 0 begins a sequence."""
    count, digits = sids.distinct.shape
    return Titles(
        frame=Frame(bos=(0,), end=0, pad=0),
        tokens=sids.distinct.reshape(-1),
        offsets=np.arange(count + 1) * digits,
        of_item=sids.of_item,
        members=sids.members,
        policy="expand",
        counts={},
    )


def most_tokens(sids: SidTable, max_history: int, reads: Reads = SIDS_ALONE) -> int:
    """Tokens of the longest sequence: its beginning, a whole history, and a target."""
    return 1 + (reads.user_tokens > 0) + (max_history + 1) * (int(sids.tokens.shape[1]) + reads.separator)


class SidSequences:
    """Users' items as token sequences, ``<bos> [user] item [separator] item [separator] ...``; ``reads`` says what is there.

    Places of items count from the oldest in the sequence, which is 1, and a target's own digits have its place. Counted from the
    newest, as the encoder-decoder has it, an item would have another place for every target that one pass predicts.
    """

    def __init__(self, sids: SidTable, max_history: int, reads: Reads = SIDS_ALONE) -> None:
        self.reads, self.vocab, self.max_history = reads, sids.vocab, max_history
        titles = sid_titles(sids)
        if reads.user_tokens:  # each sequence's own stands where this one is
            titles = replace(titles, frame=Frame(bos=(0, sids.vocab), end=0, pad=0))
        shown = reads.item_tokens(sids.distinct, sids.vocab)
        self.longest, self.digits, self.item_tokens = most_tokens(sids, max_history, reads), sids.tokens.shape[1], shown.shape[1]
        self.titles = titles
        self.shown = replace(titles, tokens=shown.reshape(-1), offsets=np.arange(len(shown) + 1) * shown.shape[1])

    def training(self, users: Sequence[int], histories: Sequence[Items], last: bool = False) -> list[Packed]:
        """Users' training sequences; ``last``: of the last item as the only target."""
        if last:
            return [self.target(user, items[:-1], int(items[-1])) for user, items in zip(users, histories, strict=True)]

        packed = training_sequences(self.titles, histories, self.max_history, self.longest, self.shown)
        if not (self.reads.user_tokens or self.reads.item_position):
            return packed
        # Whose each is: every item but a user's first is a target once.
        targets = np.cumsum([self.digits * max(0, len(items) - 1) for items in histories])
        owners = np.searchsorted(targets, np.cumsum([len(p.targets) for p in packed]))
        return [replace(p, tokens=self._told(users[owner], p.tokens)) for owner, p in zip(owners, packed, strict=True)]

    def target(self, user: int, history: Items, target: int) -> Packed:
        """The prompt of ``history`` and one target."""
        packed = target_sequence(self.titles, history, target, self.max_history, self.longest, self.shown)
        return replace(packed, tokens=self._told(user, packed.tokens))

    def prompts(self, users: Sequence[int], histories: Sequence[Items]) -> tuple[list[Ints], Ints]:
        """Each history as a prompt, and (users,) what the place of the item to come adds to the numbers of its tokens."""
        some = prompts(self.titles, histories, self.max_history, self.longest, self.shown)
        places = [(len(p) - len(self.titles.frame.bos)) // self.item_tokens + 1 for p in some]
        return [self._told(user, p) for user, p in zip(users, some, strict=True)], self.reads.at(places, self.vocab)

    def _told(self, user: int, tokens: Ints) -> Ints:
        """``tokens`` with the user's own and with the items' places."""
        first = len(self.titles.frame.bos)
        tokens = tokens.copy()
        if self.reads.user_tokens:
            tokens[1] = self.reads.user([user], self.vocab)[0]
        tokens[first:] += self.reads.at(np.arange(len(tokens) - first) // self.item_tokens + 1, self.vocab)
        return tokens


class CausalRecommender(Qwen3ForCausalLM):  # type: ignore[misc]
    """A causal transformer that reads what its configuration's ``input_tables`` say beside the SIDs (`gr.sid.inputs`), if
    anything."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.set_input_embeddings(input_embedding(self.get_input_embeddings(), config, config.initializer_range))


def decoder_only(
    vocab: int, layers: int, d_model: int, heads: int, d_kv: int, d_ff: int, dropout: float, more: int = 0, places: int = 0
) -> Any:
    """A fresh causal transformer (`gr.llm.backbone.fresh_backbone`) of ``layers``, with ``dropout`` of the embeddings and of what
    each layer adds, as T5 has it; ``more`` tokens and ``places`` of items that it only reads (`gr.sid.inputs.Reads.tables`). Seed
    torch before."""
    model = fresh_backbone(vocab, layers, d_model, heads, d_ff, head_dim=d_kv)
    if more or places:
        model.config.input_tables = {"more": more, "places": places}
        model.set_input_embeddings(input_embedding(model.get_input_embeddings(), model.config, model.config.initializer_range))
    if dropout:
        add_dropout(model, dropout)
    return model


def add_dropout(model: Any, share: float) -> None:
    """The architecture has none of its own but in attention's weights."""

    def dropped(module: nn.Module, _: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return (dropout(out[0], share, module.training), *out[1:])
        return dropout(out, share, module.training)

    model.get_input_embeddings().register_forward_hook(dropped)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(dropped)
        layer.mlp.register_forward_hook(dropped)


def load_decoder_only(folder: Path) -> Any:
    """A trained recommender; UserError when it can't be loaded."""
    try:
        return CausalRecommender.from_pretrained(folder, attn_implementation="sdpa")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: can't be loaded as a decoder-only SID recommender: {' '.join(str(error).split())}") from None
