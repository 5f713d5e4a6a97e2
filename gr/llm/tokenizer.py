"""Which tokens stand around titles, for the tokenizer of a fresh backbone (`gr.text.train_tokenizer`) or any pretrained one's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr.errors import UserError
from gr.text import END


@dataclass(frozen=True)
class Frame:
    """What stands around titles: ``<bos> title <end> title <end> ...``. ``bos``: with the prompt's text after it, and () where
    the tokenizer has none and there is no text."""

    bos: tuple[int, ...]
    end: int
    pad: int


def frame_of(tokenizer: Any, prompt: str = "") -> Frame:
    """A fresh tokenizer ends titles with its own token, a pretrained one with the line break that its model knows.

    Where the line break is no single token, the end-of-text token serves. UserError when there is neither. ``prompt``: text that
    every sequence begins with.
    """
    bos: tuple[int, ...] = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
    if prompt:
        bos += tuple(int(token) for token in tokenizer.encode(prompt, add_special_tokens=False))
    line = tokenizer.encode("\n", add_special_tokens=False)
    if tokenizer.eos_token == END:
        end = int(tokenizer.eos_token_id)
    elif len(line) == 1:
        end = int(line[0])
    elif tokenizer.eos_token_id is not None:
        end = int(tokenizer.eos_token_id)
    else:
        raise UserError("the tokenizer has neither a single token for a line break nor an end-of-text token to end a title with")
    # Padding stands after the tokens and is seen by none of them, so any token will do.
    return Frame(bos, end, end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id))


def encode_titles(tokenizer: Any, texts: Sequence[str], end: int) -> list[NDArray[np.int64]]:
    """Each title's tokens without frame. A title's own line breaks are spaces by now, so ``end`` occurs in none but by accident
    (a title that spells out a special token); there it is left out."""
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [np.array([t for t in ids if t != end], dtype=np.int64) for ids in encoded]
