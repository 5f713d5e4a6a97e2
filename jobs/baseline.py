"""Fits and evaluates a baseline without a neural net, or the planted world's Bayes-optimal recommender."""

import time

import numpy as np

from gr.baselines import fit_baseline
from gr.data.dataset import Dataset
from gr.data.planted import Oracle, bayes_recall
from gr.data.split import Split
from gr.errors import UserError
from gr.metrics import TOP_K
from jobs.config import BaselineConfig
from jobs.evaluation import Ranked, evaluate
from jobs.prepare import dataset_folder
from jobs.runtime import Context, main, peak_memory


def body(context: Context[BaselineConfig]) -> None:
    config = context.config
    split = Split(context.input("split"))
    began = time.monotonic()
    if config.method == "bayes-optimal":
        folder = dataset_folder(context.input("dataset"))
        if Dataset(folder).fingerprint != split.manifest["dataset"]["fingerprint"]:
            raise UserError(f"run.yaml: inputs.dataset: {folder} is not the data set that inputs.split was made from; name that")
        oracle = Oracle.load(folder)
        rank = oracle.rank
        users = list(split.evaluation_users(config.which, limit=config.users))
        best = bayes_recall(oracle, [u.history for u in users], np.array([u.target for u in users]))
        context.facts.update({name: value for name, value in best.items() if name.startswith("expected")})
    else:
        baseline = fit_baseline(config.method, split)
        rank = baseline.rank
        context.facts["n_cf"] = baseline.n_cf
    context.facts["device"] = "cpu"
    context.facts["train_seconds"] = round(time.monotonic() - began, 3)
    evaluate(context, split, config.which, config.users, 512, lambda users: Ranked(rank([u.history for u in users], TOP_K)))
    context.facts["peak_memory_bytes"] = peak_memory()


if __name__ == "__main__":
    main("baseline", body)
