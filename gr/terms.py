"""Choices that modules of both paradigms and the configurations name alike."""

from typing import Literal

Normalize = Literal["vocabulary", "catalogue"]
"""What a token's probabilities sum to one over: all tokens, or those that continue the prefix to an existing item."""

Length = Literal["sum", "mean"]
"""What ranks sequences of different lengths: the sum of their tokens' log-probabilities, or its mean per token."""

SharedTitles = Literal["merge", "expand", "disambiguate"]
"""What a title that several items have stands for: one item, or all of them in turn; or each gets a title of its own
(`gr.llm.titles`)."""

Gradient = Literal["straight-through", "rotation", "gumbel"]
"""How the gradient of an RQ-VAE's decoder reaches its encoder through the codes (`gr.sid.rqvae`)."""

Codebooks = Literal["loss", "ema"]
"""How an RQ-VAE's codebooks are learnt: by a loss, or as moving averages of what chose them (`gr.sid.rqvae`)."""

Collisions = Literal["extra-digit", "sinkhorn", "allow"]
"""What becomes of items with the same codes: a digit more, a balanced last level (`gr.sid.collisions`), or one SID for all."""

Pooling = Literal["mean", "last"]
"""How the vectors of a text's tokens become one: their mean, or the last token's (`gr.sid.encoder`)."""
