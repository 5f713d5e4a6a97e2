"""What an LLM generates and what it is shown of items: the same for its training and its evaluation."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gr.data.split import Split
from gr.errors import UserError
from gr.llm.shown import generated_sids, shown_items, sids_of
from gr.llm.titles import Titles
from gr.llm.tokenizer import frame_of
from gr.sid.sids import SidTable
from jobs.llm_config import LlmTraining, TrainLlmConfig
from jobs.runtime import Context


def llm_items(
    context: Context[Any], split: Split, tokenizer: Any, config: TrainLlmConfig, popularity: NDArray[np.int64] | None = None
) -> tuple[Titles, Titles, list[int]]:
    """(what is generated of each item, what is shown of it in a history, the tokens of semantic IDs).

    ``tokenizer`` learns these tokens if the input has SIDs, which are the run's input ``sids``. ``popularity``: (items,) training
    interactions, by which items of one title or SID are ranked.
    """
    sids, tokens = _sids(context, tokenizer, config)
    if sids is not None:
        sids = replace(sids, popularity=popularity)
    frame = frame_of(tokenizer, config.prompt)
    if sids is not None and config.input == "sids":
        found = generated_sids(sids, frame)
        return found, found, tokens
    items = split.items()
    titles = Titles.build(items, tokenizer, frame, config.shared_titles, popularity)
    return titles, shown_items(titles, items, tokenizer, config.template, sids), tokens


def _sids(context: Context[Any], tokenizer: Any, config: LlmTraining) -> tuple[SidTable | None, list[int]]:
    if config.input == "titles":
        if "sids" in context.run.inputs:
            raise UserError("run.yaml: inputs.sids is given, but config.input is titles; give config.input sids or both")
        return None, []
    sids = sids_of(tokenizer, SidTable.read(context.input_file("sids", "sids.parquet")))
    return sids, np.unique(sids.tokens).tolist()
