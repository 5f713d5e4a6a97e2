"""Evaluates LLM-as-RS: beam search over the catalogue's titles, full-catalogue metrics of items."""

import numpy as np
import torch

from gr.data.split import EvaluationUser, Split
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.llm.tuning import load_trained
from gr.metrics import TOP_K
from jobs.config import EvaluateLlmConfig
from jobs.evaluation import Ranked, device, evaluate
from jobs.llm_config import TrainLlmConfig
from jobs.llm_items import llm_items
from jobs.runtime import Context, main
from jobs.train_llm import backbone_source


def body(context: Context[EvaluateLlmConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    split = Split(context.input("split"))
    trained = TrainLlmConfig.model_validate(context.trained_config())
    source = backbone_source(context, trained.model)
    model, tokenizer = load_trained(source, context.input("model"), trained.tune, trained.max_tokens)
    model = model.eval().to(device())
    titles, shown, _ = llm_items(context, split, tokenizer, trained, split.popularity)
    trie = TitleTrie(titles, trained.normalize).to(device())

    def rank(users: list[EvaluationUser]) -> Ranked:
        some = prompts(titles, [u.history for u in users], trained.max_history, trained.max_tokens, shown)
        ranked, _, spent = rank_titles(model, trie, some, config.beams, config.length)
        return Ranked(titles.ranked_items(ranked, TOP_K).astype(np.int32), spent, int((ranked < 0).sum()))

    done = evaluate(context, split, config.which, config.users, config.batch, rank, titles.stand_in, returned=config.beams)
    if done is None:
        return
    context.facts.update(
        titles.counts,
        beams=config.beams,
        invalid_beams=done.missing / (config.beams * done.table.num_rows),
        shared_titles_policy=titles.policy,
        title_score=f"{config.length} of tokens' log-probabilities over the {trained.normalize}",
    )


if __name__ == "__main__":
    main("evaluate_llm", body)
