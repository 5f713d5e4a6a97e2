"""Quality of the SID recommenders beside cornac's TIGER and SASRec at equal training time, on Amazon Beauty.

    pip install --no-deps --target FOLDER cornac==3.0.1 powerlaw==1.5
    python tests/benchmarks/sid_quality.py --cornac FOLDER [--minutes 10] [--users N] [--only NAME ...] [--out FOLDER]

Leave-one-out, the full catalogue, the items of the history among it, the same users and `gr.metrics` for all. Each contender
trains for ``--minutes`` of processor time on one thread, its batches included; `VALIDATIONS` times in it NDCG@10 of the same
`VALIDATION_USERS` is measured, in time that does not count, and the best of these weights are tested. What is made once (SIDs,
the data's split) does not count either. Learning-rate schedules are functions of the share of the time that is over.

SIDs, the same for all that have any: TF-IDF and SVD to 128 dimensions, residual k-means 3 x 256, an extra digit. Beams: 20 for
all. TIGER's are searched by its own code, one user at a time, with the padding on the left of a history cut off, which changes
no score (`padding_changes`). TIGER's training targets come in random order, as ours do; SASRec's batches are cornac's own.

Each contender's ranks go into ``--out`` when it is done. One whose ranks lie there is not trained again, and the table is of all
that lie there: with ``--only`` contenders can be shared among processes, and a broken-off run goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from sid_speed import SIZE, Cornac, Histories, rank_t5, semantic_ids, with_cornac
from torch import Tensor, nn

from gr.baselines import METHODS, fit_baseline
from gr.data.split import EvaluationUser, Split, training_part
from gr.data.stream import TrainStream
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.metrics import TOP_K, ranking_metrics, target_ranks
from gr.sid.decoder_only import most_tokens, sid_titles
from gr.sid.recommender import SidBatcher
from gr.sid.references import templated, tfidf_vectors
from gr.sid.sids import SidTable
from gr.sid.t5_weights import T5Weights
from jobs.options import Optimizer
from jobs.sid_config import T5Size, TrainSidConfig
from jobs.sid_recipes import recipe
from jobs.trainer import learning_rate

VALIDATIONS, VALIDATION_USERS = 5, 500
BATCH = 256  # users ranked at once, by what ranks several
BEAMS = TOP_K
HISTORY = 20
PARTS = 10_000  # of the time: the "steps" of a schedule
SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")
DRAWS = 1000  # of the bootstrap over users
Ranks = NDArray[np.int32]

DECODER_ONLY = T5Size(layers=2, d_model=128, heads=4, d_kv=32, d_ff=256)
"""With `OF_STUDY` and dropout .2, as cluster/studies/beauty-decoder-only.yaml once was."""
OF_STUDY = Optimizer(steps=PARTS, global_batch=128, lr=3e-3, weight_decay=0.05)
T5_SETTINGS = Optimizer(steps=PARTS, global_batch=64, lr=2e-3, weight_decay=0.01)


@dataclass
class Contender:
    """``step(number, share)``: one optimizer step when ``share`` of the time is over, returns its training targets; ``rank``: the
    `TOP_K` items (users, k) of histories, best first."""

    model: nn.Module
    step: Callable[[int, float], float]
    rank: Callable[[Histories], NDArray[np.integer]]


def set_rate(adam: torch.optim.Optimizer, settings: Optimizer, share: float) -> None:
    for group in adam.param_groups:
        group["lr"] = learning_rate(settings, int(share * PARTS))


def ours(config: TrainSidConfig, split: Split, sids: SidTable) -> Contender:
    """Trained as `jobs.trainer` does."""
    made, settings = recipe(config, Accelerator(cpu=True), split, sids), config.optimizer
    adam = torch.optim.AdamW(made.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))

    def step(number: int, share: float) -> float:
        set_rate(adam, settings, share)
        micros = made.batches(number, 1)
        weight = sum(m.weight for m in micros)
        adam.zero_grad()
        for micro in micros:
            (made.loss(made.model, micro.inputs) / weight).backward()
        nn.utils.clip_grad_norm_(made.model.parameters(), settings.clip)
        adam.step()
        return weight

    titles = sid_titles(sids)
    trie = TitleTrie(titles, "catalogue")
    if config.architecture == "encoder-decoder":
        batcher = SidBatcher(sids, HISTORY)
        return Contender(made.model, step, lambda h: rank_t5(T5Weights(made.recommender, trie), batcher, h, BEAMS))
    longest = most_tokens(sids, HISTORY)
    return Contender(
        made.model, step, lambda h: rank_titles(made.recommender, trie, prompts(titles, h, HISTORY, longest), BEAMS)[0]
    )


def tiger(folder: Path, split: Split, sids: SidTable, settings: Optimizer | None) -> Contender:
    """cornac's TIGER of the encoder-decoder's size; ``settings`` None: trained as its `fit` does by default, with AdamW at a
    constant 1e-3, a weight decay of 1e-4 and batches of 256."""
    peer = Cornac(folder, sids)
    batch = settings.global_batch if settings else 256
    stream = TrainStream(split, unit="targets", seed=0, global_batch=batch, max_history=HISTORY)
    if settings:
        adam = torch.optim.AdamW(peer.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    else:
        adam = torch.optim.AdamW(peer.model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step(number: int, share: float) -> float:
        if settings:
            set_rate(adam, settings, share)
        examples = stream.batch(number)
        adam.zero_grad()
        peer.loss([e.history for e in examples], [e.target for e in examples]).backward()
        if settings:
            nn.utils.clip_grad_norm_(peer.model.parameters(), settings.clip)
        adam.step()
        return batch

    item = {tuple(codes): i for i, codes in enumerate(peer.codes.tolist())}

    def rank(histories: Histories) -> NDArray[np.integer]:
        ranked = np.full((len(histories), TOP_K), -1)
        for row, history in enumerate(histories):
            tokens, mask = unpadded(peer, history)
            found = peer.model.generate_beam(tokens, mask, BEAMS, peer.children)[0]
            ranked[row, : len(found)] = [item[sid] for sid in found]
        return ranked

    return Contender(peer.model, step, rank)


def unpadded(peer: Cornac, history: NDArray[np.int32]) -> tuple[Tensor, Tensor]:
    tokens, mask = peer.encoder_inputs([history])
    first = int((tokens[0] != 0).to(torch.int8).argmax())
    return tokens[:, first:], mask[:, first:]


def padding_changes(peer: Cornac, histories: Histories) -> float:
    """The largest difference that padding makes to a score of the beams of ``histories``."""
    peer.model.eval()
    pairs = [
        (
            peer.model.generate_beam(*peer.encoder_inputs([history]), BEAMS, peer.children),
            peer.model.generate_beam(*unpadded(peer, history), BEAMS, peer.children),
        )
        for history in histories
    ]
    return max(float(np.abs(a[1] - b[1]).max()) for a, b in pairs)


def train_set(split: Split) -> SimpleNamespace:
    """The training part as cornac's batches read it: interactions, and of each user the places of their own."""
    users, items, known = [], [], 0
    for shard in split.users(["items", "n_train"]):
        user, item = training_part(shard)
        users.append(user + known)
        items.append(item)
        known += shard.num_rows
    user, item = np.concatenate(users), np.concatenate(items)
    edges = np.flatnonzero(np.diff(user)) + 1
    sessions = {int(user[rows[0]]): rows for rows in np.split(np.arange(len(user)), edges)}
    return SimpleNamespace(uir_tuple=(user, item, np.ones(len(user))), sessions=sessions)


@dataclass(frozen=True)
class SasRec:
    """cornac's settings, and by default its own: 2 blocks, 1 head, dropout .2, 2048 negatives, batches of 512."""

    loss: str = "ce"
    dims: int = 100
    lr: float = 1e-3
    max_len: int = 50

    def contender(self, folder: Path, split: Split) -> Contender:
        sys.path.append(str(folder))
        torch.manual_seed(0)
        items, rng = split.n_items, np.random.RandomState(0)
        model: Any = import_module("cornac.models.sasrec.sasrec").SASRecModel(
            items, self.dims, self.max_len, n_layers=2, n_heads=1, use_biases=False, dropout=0.2, pad_idx=items
        )
        loss = import_module("cornac.models.seq_utils.losses").get_loss_function(self.loss)
        epoch = import_module("cornac.models.seq_utils").session_seq_iter
        interactions = train_set(split)
        adam = torch.optim.Adam(model.parameters(), lr=self.lr, betas=(0.9, 0.98))

        def batches() -> Iterator[tuple[Any, Any, Any]]:
            while True:
                yield from epoch(
                    interactions, pad_index=items, batch_size=512, max_len=self.max_len, n_sample=2048, sample_alpha=0.5, rng=rng
                )

        stream = batches()

        def step(_: int, __: float) -> float:
            _, history, out = next(stream)
            adam.zero_grad()
            scores = model(None, torch.from_numpy(history), torch.from_numpy(out))
            loss(scores, out_iids=torch.from_numpy(out), batch_size=len(history), n_sample=2048).backward()
            adam.step()
            return len(history)

        def rank(histories: Histories) -> NDArray[np.integer]:
            padded = np.full((len(histories), self.max_len), items)
            for row, history in enumerate(histories):
                some = history[-self.max_len :]
                padded[row, self.max_len - len(some) :] = some
            scores = model._encode(torch.from_numpy(padded)) @ model.item_emb.weight[:items].T
            best: NDArray[np.int64] = scores.topk(TOP_K).indices.numpy()
            return best

        return Contender(model, step, rank)


def contenders(split: Split, sids: SidTable, folder: Path | None) -> dict[str, Callable[[], Contender]]:
    """By name, what makes it."""

    def config(architecture: Any, size: T5Size, settings: Optimizer, dropout: float) -> TrainSidConfig:
        return TrainSidConfig(
            size=size, architecture=architecture, dropout=dropout, max_history=HISTORY, optimizer=settings, seed=0
        )

    result: dict[str, Callable[[], Contender]] = {
        "decoder-only": lambda: ours(config("decoder-only", DECODER_ONLY, OF_STUDY, 0.2), split, sids),
        "encoder-decoder": lambda: ours(config("encoder-decoder", SIZE, T5_SETTINGS, 0.1), split, sids),
    }
    if folder:
        result |= {
            "cornac-sasrec": lambda: SasRec().contender(folder, split),
            "cornac-tiger": lambda: tiger(folder, split, sids, None),
            "cornac-tiger-our-settings": lambda: tiger(folder, split, sids, T5_SETTINGS),
            # What cornac's README found best on Beauty, in 2455 s of training
            "cornac-sasrec-tuned": lambda: SasRec("bce", 128, 5e-4).contender(folder, split),
            "cornac-sasrec-20-items": lambda: SasRec(max_len=HISTORY).contender(folder, split),
        }
    return result


@torch.no_grad()
def ranks_of(contender: Contender, users: Sequence[EvaluationUser]) -> Ranks:
    contender.model.eval()
    parts = [users[start : start + BATCH] for start in range(0, len(users), BATCH)]
    return np.concatenate(
        [target_ranks(np.asarray(contender.rank([u.history for u in p])), np.array([u.target for u in p])) for p in parts]
    )


def train(contender: Contender, seconds: float, validation: Sequence[EvaluationUser]) -> dict[str, Any]:
    """Trains for ``seconds`` of processor time, and leaves the weights of the best validation."""
    spent, number, targets, found = 0.0, 0, 0.0, list[tuple[float, float]]()
    best: dict[str, Tensor] = {}
    while len(found) < VALIDATIONS:
        contender.model.train()
        began = time.process_time()
        targets += contender.step(number, min(1.0, spent / seconds))
        spent += time.process_time() - began
        number += 1
        if spent >= seconds * (len(found) + 1) / VALIDATIONS:
            score = ranking_metrics(ranks_of(contender, validation))["ndcg@10"]
            if not found or score > max(s for _, s in found):
                best = {name: w.clone() for name, w in contender.model.state_dict().items()}
            found.append((round(spent / seconds, 3), score))
            print(f"    {spent:6.0f} s, step {number}: ndcg@10 of validation {score:.4f}", flush=True)
    contender.model.load_state_dict(best)
    return {"seconds": spent, "steps": number, "targets": targets, "validations": found}


def table(folder: Path, names: Sequence[str], test: Sequence[EvaluationUser]) -> None:
    """Prints those of ``names`` whose ranks lie in ``folder``, on the users that all of them have, with 95% intervals by
    bootstrap over these users. The difference to the first is paired: the same draws of users."""
    files = {name: np.load(folder / f"{name}.npz") for name in names if (folder / f"{name}.npz").exists()}
    ranks = {name: dict(zip(f["users"].tolist(), f["ranks"].tolist(), strict=True)) for name, f in files.items()}
    users = [u.user for u in test if all(u.user in known for known in ranks.values())]
    draws = np.random.default_rng(0).integers(len(users), size=(DRAWS, len(users)))
    print(f"\n{len(users)} users\n  {'':28}" + "".join(f"{name:>25}" for name in SHOWN) + "   recall@10 less the first's")
    first: NDArray[np.float64] | None = None
    for name, known in ranks.items():
        own = np.array([known[u] for u in users])
        drawn = [ranking_metrics(own[rows]) for rows in draws]
        cells = ""
        for metric in SHOWN:
            low, high = np.quantile([d[metric] for d in drawn], [0.025, 0.975])
            cells += f"  {ranking_metrics(own)[metric]:.4f} ({low:.4f}-{high:.4f})"
        recall = np.array([d["recall@10"] for d in drawn])
        first = recall if first is None else first
        low, high = np.quantile(recall - first, [0.025, 0.975])
        print(f"  {name:28}{cells}   {low:+.4f} to {high:+.4f}", flush=True)


def save(folder: Path, name: str, users: Sequence[EvaluationUser], ranks: Ranks, facts: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(facts))
    np.savez(folder / f"{name}.npz", users=np.array([u.user for u in users]), ranks=ranks)


def compete(split: Split, options: argparse.Namespace) -> bool:
    test = list(split.evaluation_users("test", limit=options.users))
    validation = list(split.evaluation_users("val", limit=VALIDATION_USERS))
    sids = semantic_ids(tfidf_vectors(templated(split.items(), "{text}"), 128, seed=0))
    entries = contenders(split, sids, options.cornac)
    if unknown := set(options.only or ()) - set(entries):
        print(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(entries)}", file=sys.stderr)
        raise SystemExit(2)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cornac:
        change = padding_changes(Cornac(options.cornac, sids), [u.history for u in test[:20]])
        print(f"scores of TIGER's beams with and without padding differ by {change:.1e} (expected: below 1e-4)", flush=True)
    for name in options.only or entries:
        if (options.out / f"{name}.npz").exists():
            continue
        contender = entries[name]()
        size = sum(p.numel() for p in contender.model.parameters())
        print(f"{name}, {size:,} parameters", flush=True)
        facts = train(contender, 60 * options.minutes, validation) | {"parameters": size}
        epochs = facts["targets"] / split.counts["train_targets"]
        print(f"    {facts['targets'] / facts['seconds']:.0f} targets/s, {epochs:.2f} epochs")
        began = time.process_time()
        ranks = ranks_of(contender, test)
        print(f"    {len(test) / (time.process_time() - began):.0f} users/s ranked", flush=True)
        save(options.out, name, test, ranks, facts)
    for method in METHODS:
        ranked = fit_baseline(method, split).rank([u.history for u in test], TOP_K)
        save(options.out, method, test, target_ranks(ranked, np.array([u.target for u in test])), {})
    table(options.out, [*entries, *METHODS], test)
    return True


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--minutes", type=float, default=10)
    arguments.add_argument("--users", type=int, help="test that many, always the same ones (default: all)")
    arguments.add_argument("--only", nargs="+", metavar="NAME")
    arguments.add_argument("--out", type=Path, default=Path("runs/sid-quality"))
    arguments.set_defaults(threads=1)
    return with_cornac(arguments, compete)


if __name__ == "__main__":
    sys.exit(main())
