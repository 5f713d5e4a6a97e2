"""What a SID recommender reads beside the SIDs of a history: a token of the user, a token after each item, each item's position.

The number of an input token tells all of it, ``token + width * position``: so a batch stays one tensor of numbers, and training,
beam search and what they are timed by see models that are called as ever. Tokens that are only read have a table of their own.
In the one that a T5 or Qwen shares with its output layer they would take part in every softmax, though none is ever generated.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gr.data.split import splitmix64

Ints = NDArray[np.int64]
USER_SEED = 0x5EED
"""Of the users' hash: another than that by which validation users are drawn."""


@dataclass(frozen=True)
class Reads:
    """``user_tokens``: a user has one of so many, by a hash of the user's number, before the history (2,000 in TIGER, Rajput et
    al. 2023, arXiv 2305.05065, section 4; 0: none). ``separator``: a token after every item of a history, the newest too.
    ``item_position``: a learnt vector for each place in the history, added to all tokens of the item there.

    A recommender of a ``vocab`` of SIDs' tokens, from 0, has the users' tokens after these, and then the separator.
    """

    user_tokens: int = 0
    separator: bool = False
    item_position: bool = False

    @property
    def more(self) -> int:
        """Tokens that are read and never generated."""
        return self.user_tokens + self.separator

    def tables(self, places: int) -> dict[str, int]:
        """Rows of the tables of an `InputEmbedding` for items at so many ``places``."""
        return {"more": self.more, "places": places if self.item_position else 0}

    def item_tokens(self, tokens: Ints, vocab: int) -> Ints:
        """(items, digits) tokens of SIDs as they stand in a history: the separator, if there is one, behind each."""
        return np.pad(tokens, ((0, 0), (0, int(self.separator))), constant_values=vocab + self.user_tokens)

    def user(self, users: Any, vocab: int) -> Ints:
        """(n,) token of each of ``users`` (n,), their numbers in the split."""
        hashed = splitmix64(np.asarray(users, dtype=np.int64), USER_SEED) % np.uint64(self.user_tokens)
        return vocab + hashed.astype(np.int64)

    def at(self, places: Any, vocab: int) -> Ints:
        """What the numbers of tokens at ``places`` (from 1; 0: no item's) have added to them."""
        return np.asarray(places, dtype=np.int64) * (vocab + self.more) * self.item_position


SIDS_ALONE = Reads()


class InputEmbedding(nn.Embedding):
    """The token table of a model, whose rows it shares, with one of ``more`` tokens, drawn with ``std``, and one of ``places``.

    Numbers of input tokens are as `Reads` has them; place 0 adds nothing.
    """

    def __init__(self, table: nn.Embedding, more: int, places: int, std: float) -> None:
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.weight = table.weight
        like: dict[str, Any] = {"device": table.weight.device, "dtype": table.weight.dtype}
        self.more = nn.Embedding(more, self.embedding_dim, **like) if more else None
        self.place = nn.Embedding(places, self.embedding_dim, **like) if places else None
        self.width = self.num_embeddings + more
        if self.more is not None:
            nn.init.normal_(self.more.weight, std=std)
        if self.place is not None:  # a model that begins as the one without: random places blur tokens that all items share
            nn.init.zeros_(self.place.weight)

    def forward(self, numbers: Tensor) -> Tensor:
        """(...) numbers -> (..., width) vectors."""
        token = numbers % self.width
        x = super().forward(token.clamp(max=self.num_embeddings - 1))
        if self.more is not None:
            own = self.more((token - self.num_embeddings).clamp(min=0))
            x = torch.where((token < self.num_embeddings)[..., None], x, own)
        if self.place is not None:
            place = numbers // self.width
            x = x + self.place((place - 1).clamp(min=0)) * (place > 0)[..., None]
        return x


def input_embedding(table: nn.Embedding, config: Any, std: float) -> nn.Embedding:
    """``table`` itself, or as the tables that ``config`` (a saved model's, too) has under ``input_tables`` want it."""
    tables = getattr(config, "input_tables", None)
    return InputEmbedding(table, **tables, std=std) if tables and any(tables.values()) else table
