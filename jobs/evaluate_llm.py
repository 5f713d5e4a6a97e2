"""Evaluates LLM-as-RS: beam search over the catalogue's titles, full-catalogue metrics of items."""

import numpy as np
import torch
from numpy.typing import NDArray

from gr.data.split import Split
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import Titles, TitleTrie, training_popularity
from gr.llm.tokenizer import frame_of
from gr.llm.tuning import load_trained
from gr.metrics import TOP_K
from jobs.config import EvaluateLlmConfig, TrainLlmConfig
from jobs.evaluation import evaluate
from jobs.runtime import Context, main
from jobs.train_llm import backbone_source


def body(context: Context[EvaluateLlmConfig]) -> None:
    config = context.config
    torch.set_num_threads(context.run.launch.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    split = Split(context.input("split"))
    trained = TrainLlmConfig.model_validate(context.trained_config())
    source = backbone_source(context, trained.model)
    model, tokenizer = load_trained(source, context.input("model"), trained.tune, trained.max_tokens)
    model = model.eval().to(device)
    titles = Titles.build(split.items(), tokenizer, frame_of(tokenizer), trained.shared_titles, training_popularity(split))
    trie = TitleTrie(titles, trained.normalize).to(device)
    flops, missing = 0.0, 0

    def rank(histories: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        nonlocal flops, missing
        some = prompts(titles, histories, trained.max_history, trained.max_tokens)
        ranked, _, spent = rank_titles(model, trie, some, config.beams)
        flops += spent
        missing += int((ranked < 0).sum())
        return titles.ranked_items(ranked, TOP_K).astype(np.int32)

    evaluate(context, split, config.which, config.users, config.batch, rank, titles.stand_in)
    users = context.facts["evaluated_users"]
    context.facts.update(
        titles.counts,
        beams=config.beams,
        invalid_beams=missing / (config.beams * users),
        infer_flops_per_user=flops / users,
        shared_titles_policy=trained.shared_titles,
        title_score=f"sum of log-probabilities over the {trained.normalize}",
    )


if __name__ == "__main__":
    main("evaluate_llm", body)
