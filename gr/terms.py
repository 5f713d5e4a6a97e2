"""Choices that modules of both paradigms and the configurations name alike."""

from typing import Literal

Normalize = Literal["vocabulary", "catalogue"]
"""What a token's probabilities sum to one over: all tokens, or those that continue the prefix to an existing item."""

SharedTitles = Literal["merge", "expand"]
"""What a title that several items have stands for: one item, or all of them in turn (`gr.llm.titles`)."""
