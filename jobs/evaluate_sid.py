"""Evaluates a trained SID recommender: beam search over existing SIDs, full-catalogue metrics of items."""

import numpy as np
import torch
from numpy.typing import NDArray

from gr.beam import beam_search
from gr.data.split import Split
from gr.sid.decode import T5Stepper
from gr.sid.recommender import SidBatcher, load_t5, t5_flops
from gr.sid.sids import SidTable
from gr.trie import Trie
from jobs.config import EvaluateSidConfig, TrainSidConfig
from jobs.evaluation import evaluate
from jobs.runtime import Context, main


def body(context: Context[EvaluateSidConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split = Split(context.input("split"))
    sids = SidTable.read(context.input_file("sids", "sids.parquet"))
    trained = TrainSidConfig.model_validate(context.trained_config())
    model = load_t5(context.input("model")).eval().to(device)
    batcher = SidBatcher(sids, trained.max_history)
    trie = Trie.build(sids.tokens.tolist()).to(device)
    digits = sids.tokens.shape[1]
    flops, missing = 0.0, 0

    def rank(histories: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        nonlocal flops, missing
        inputs = batcher.encoder_inputs(histories)
        flops += t5_flops(model.config, inputs["attention_mask"].sum(1).numpy(), digits, config.beams)
        with torch.no_grad():
            stepper = T5Stepper(model, **{k: v.to(device) for k, v in inputs.items()})
            items, _ = beam_search(stepper, trie, config.beams, normalize=trained.normalize == "catalogue")
        missing += int((items < 0).sum())
        return items.cpu().numpy().astype(np.int32)

    evaluate(context, split, config.which, config.users, config.batch, rank)
    users = context.facts["evaluated_users"]
    context.facts.update(
        beams=config.beams,
        invalid_beams=missing / (config.beams * users),
        infer_flops_per_user=flops / users,
    )


if __name__ == "__main__":
    main("evaluate_sid", body)
