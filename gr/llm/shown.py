"""How items appear in a history: by their titles alone, with attributes, with their semantic IDs, or by these alone.

What is shown of an item is again a `Titles`, whose ``of_item`` says where it stands: it begins with what is generated of the
item, so that one packed pass predicts it (`gr.llm.sequences`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken

from gr.llm.titles import MAX_TITLE_TOKENS, Titles
from gr.llm.tokenizer import Frame, encode_titles
from gr.sid.decoder_only import sid_titles
from gr.sid.references import templated
from gr.sid.sids import SidTable

Ints = NDArray[np.int64]
TITLE = "{title}"
LETTERS = "abcdefghi"  # of the levels, an extra digit included: `<a_0>`, `<b_17>`, as in LC-Rec (arXiv 2311.09049)


def sids_of(tokenizer: Any, sids: SidTable) -> SidTable:
    """``sids`` in the tokens of ``tokenizer``, which learns one token for each code of each level where it has none yet."""
    ends = sids.tokens.max(axis=0).tolist()  # token numbers rise from level to level, from 1
    names = [
        f"<{letter}_{token - before - 1}>"
        for letter, before, last in zip(LETTERS, [0, *ends], ends, strict=False)
        for token in range(before + 1, last + 1)
    ]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    numbers = np.array(tokenizer.convert_tokens_to_ids(names), dtype=np.int64)
    return replace(sids, tokens=numbers[sids.tokens - 1])


def grow(model: Any, tokenizer: Any, tokens: Sequence[int] = ()) -> None:
    """Gives ``model`` a row for every token of ``tokenizer``, and draws those of ``tokens`` anew, as the other rows are spread:
    normal, with the mean and the deviation of each column. Seed torch before."""
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if not len(tokens):
        return
    tables = {id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)}
    with torch.no_grad():
        for table in tables.values():
            old = table[: min(tokens)].float()
            drawn = old.mean(0) + old.std(0) * torch.randn(len(tokens), old.shape[1], device=old.device)
            table[torch.as_tensor(tokens, device=table.device)] = drawn.to(table.dtype)


def generated_sids(sids: SidTable, frame: Frame) -> Titles:
    """The SIDs (in the tokens of the model) as what is generated; an item's SID ends by its length.

    Counted, where the items of one SID are ranked: `gr.sid.sids.SidTable.tie_facts`.
    """
    counts = sids.tie_facts() if sids.shared and sids.popularity is not None else {}
    return replace(sid_titles(sids), frame=frame, counts=counts)


def shown_items(titles: Titles, items: pa.Table, tokenizer: Any, template: str, sids: SidTable | None) -> Titles:
    """Each item's title, what ``template`` says after it, and its SID where ``sids`` (in the tokens of the model) is given.

    Counted as ``cut_attributes``: items whose text after the title is longer than `MAX_TITLE_TOKENS`, and cut.
    """
    if template == TITLE and sids is None:
        return titles
    texts = [_one_line(text) for text in templated(items, template.removeprefix(TITLE))]
    after = encode_titles(tokenizer, texts, titles.frame.end)
    end = np.array([titles.frame.end])
    parts = []
    for item, title in enumerate(titles.of_item):
        own = titles.tokens[titles.offsets[title] : titles.offsets[title + 1] - 1]
        digits = sids.tokens[item] if sids else end[:0]
        parts.append(np.concatenate([own, after[item][:MAX_TITLE_TOKENS], digits, end]))
    return replace(
        titles,
        tokens=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
        of_item=np.arange(len(parts)),
        counts={"cut_attributes": sum(len(tokens) > MAX_TITLE_TOKENS for tokens in after)},
    )


def _one_line(text: str) -> str:
    """White space as single spaces, one before the first word kept."""
    words = " ".join(text.split())
    return f" {words}" if words and text[0].isspace() else words
