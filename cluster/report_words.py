"""The report's sentences: who was evaluated, how the best rungs stand against the floors, what LLM rows share."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from cluster.figures import NAMES, OPTIMUM, Floats, Floor
from fit.paired import Difference, paired_difference
from gr.errors import UserError

Row = dict[str, Any]

PAIRED_NOTE = (
    "Intervals: 95%, paired bootstrap over users (1,000 draws); the seeds' variance is not in them. The best rung was chosen on "
    "these same users by this same metric, which favours it a little."
)


def evaluated(rows: list[Row]) -> list[str]:
    """Whose targets the rows of a section were measured on, and a warning where that makes them less than comparable."""
    parts = sorted({str(row["evaluated_part"]) for row in rows if row.get("evaluated_part") is not None})
    counts = sorted({int(row["evaluated_users"]) for row in rows if row.get("evaluated_users") is not None})
    if not counts:
        return []
    users = " or ".join(f"{count:,}" for count in counts)
    if parts:
        words = " or ".join({"val": "validation"}.get(part, part) for part in parts)
        out = [f"Evaluated on the {users} {words} users."]
    else:
        out = [f"Evaluated on {users} users; the rows do not say of which part."]
    if "val" in parts:
        out.append("Warning: training was stopped by validation users, so results on them look better than on test users.")
    if len(counts) > 1 or len(parts) > 1:
        out.append("Warning: not all points were evaluated on the same users; do not compare those that were not.")
    return out


def floors(rows: list[Row], metric: str) -> list[Floor]:
    """Every recommender that is not on a ladder, best last: the mean of its rows, and the planted optimum's expectation."""
    models: dict[str, list[Row]] = {}
    for row in rows:
        if row["paradigm"] not in NAMES:
            models.setdefault(str(row["model"]), []).append(row)
    out = []
    for model, own in models.items():
        realised = float(np.mean([row[metric] for row in own]))
        expected = expectation(own, metric) if model == OPTIMUM else None
        out.append(Floor(model, realised, expected))
    return sorted(out, key=lambda floor: (floor.value, floor.model))


def expectation(rows: list[Row], metric: str) -> float | None:
    """The mean of ``expected_<metric>``; None where the rows have none (NDCG, or rows of older versions)."""
    values = [row.get(f"expected_{metric}") for row in rows]
    found = [float(value) for value in values if isinstance(value, int | float) and np.isfinite(value)]
    return float(np.mean(found)) if found else None


def best(rows: list[Row], metric: str, study_dir: Path) -> list[str]:
    """Where each ladder's best rung stands against the floors, in a sentence each, and what the intervals hold."""
    out, told = [], False
    against = [(floor, *user_gains([r for r in rows if _is(r, floor)], metric, study_dir)) for floor in floors(rows, metric)]
    for paradigm, name in NAMES.items():
        rungs: dict[str, list[Row]] = {}
        for row in rows:
            if row["paradigm"] == paradigm:
                rungs.setdefault(str(row["model"]), []).append(row)
        if not rungs:
            continue
        means = {model: float(np.mean([row[metric] for row in own])) for model, own in rungs.items()}
        model = max(means, key=lambda m: (means[m], m))
        users, gains = user_gains(rungs[model], metric, study_dir)
        phrases = []
        for floor, their_users, theirs in against:
            paired = None
            if users is not None and their_users is not None and gains is not None and theirs is not None:
                paired = paired_difference(gains, theirs) if np.array_equal(users, their_users) else None
            told |= paired is not None
            phrases.append(_standing(means[model], floor, paired))
        sentence = f"{name}: the best rung, {model}, reaches {metric} {means[model]:.4f}"
        out.append(sentence + (f"; {', '.join(phrases)}." if phrases else "."))
    return [*out, PAIRED_NOTE] if told else out


def _is(row: Row, floor: Floor) -> bool:
    return row["paradigm"] not in NAMES and str(row["model"]) == floor.model


def _standing(value: float, floor: Floor, paired: Difference | None) -> str:
    amount = f"{floor.realised:.4f}"
    if floor.model == OPTIMUM:
        amount += " realised" + (f", {floor.expected:.4f} expected" if floor.expected is not None else "")
    if paired is None:
        return f"{'above' if value > floor.value else 'below'} {floor.name} ({amount}) (no interval)"
    if not paired.told_apart:
        return f"not told apart from {floor.name} ({amount}): {paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]"
    side, sign = ("above", 1) if paired.low > 0 else ("below", -1)
    low, high = sorted((sign * paired.low, sign * paired.high))
    return f"{side} {floor.name} ({amount}) by {sign * paired.mean:.4f} [{low:.4f}, {high:.4f}]"


def user_gains(rows: list[Row], metric: str, study_dir: Path) -> tuple[Floats | None, Floats | None]:
    """(users,) numbers and (users,) gains of a recommender, averaged over its rows (seeds), from their rankings.

    None where a row's ranking is not in the study folder, where the rows have different users, and for other metrics.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    named = re.fullmatch(r"(recall|ndcg)@(\d+)", metric)
    users, gains = None, []
    for row in rows:
        path = study_dir / str(row.get("evaluation")) / "hits.parquet"
        if named is None or row.get("evaluation") is None or not path.is_file():
            return None, None
        try:
            hits = pq.read_table(path, columns=["user", "rank"])
            own, ranks = (hits[name].to_numpy() for name in ("user", "rank"))
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read ({reason}); delete it to have the report without its interval") from None
        order = np.argsort(own, kind="stable")
        own, ranks = own[order], ranks[order]
        if not len(own) or (users is not None and not np.array_equal(users, own)):
            return None, None
        users = own
        within = (ranks > 0) & (ranks <= int(named[2]))
        gain = np.ones(len(ranks)) if named[1] == "recall" else 1 / np.log2(1.0 + np.maximum(ranks, 1))
        gains.append(np.where(within, gain, 0.0))
    return (users, np.mean(gains, axis=0)) if gains else (None, None)


def asides(rows: list[Row], paradigm: str, lack_of_fit: bool) -> list[str]:
    """What belongs under an LLM ladder's verdict: what its intervals do not hold, and what its titles are."""
    if paradigm != "llm":
        return []
    out = []
    if any(row.get("init") == "pretrained" for row in rows):
        # a verdict under lack of fit is judged by the scatter between rungs, which has the backbones' variance in it
        which = "the laws' intervals" if lack_of_fit else "the intervals"
        out.append(f"A pretrained backbone is shared by its rung's seeds: {which} do not hold its variance.")
    rungs: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        if row.get("items_with_shared_title") is not None:
            names = ("shared_titles_policy", "items_with_shared_title", "empty_titles", "truncated_titles")
            rungs.setdefault(tuple(row.get(name) for name in names), []).append(str(row["model"]))
    for (policy, shared, empty, cut), models in rungs.items():
        where = "" if len(rungs) == 1 else f"Rungs {', '.join(dict.fromkeys(models))}: "
        out.append(
            f"{where}{shared:,} item{' shares' if shared == 1 else 's share'} a title with another (policy {policy}), "
            f"{empty or 0:,} {'has' if empty == 1 else 'have'} none, {cut or 0:,} {'was' if cut == 1 else 'were'} cut."
        )
    if any(key[0] == "merge" for key in rungs):
        out.append("Under merge, items that share a title count as one: an easier task than one of items.")
    return out


def bands(groups: list[dict[str, Any]]) -> str:
    """How the laws' bands were drawn, from what their fits say; empty without laws."""
    words = {
        "seeds": "bootstrap of the seeds within each size",
        "residuals": "one seed at each size, so bootstrap of the residuals about the law",
        "rows": "bootstrap of the rows",
    }
    methods = {NAMES[g["paradigm"]]: law["bootstrap"]["method"] for g in groups for law in g["laws"] if "bootstrap" in law}
    if len(set(methods.values())) > 1:
        return "; ".join(f"{name}: {words[method]}" for name, method in methods.items())
    return words[next(iter(methods.values()))] if methods else ""
