"""Linear probes: how much of a vector a linear function of other numbers predicts, measured on items that it was not fitted to.

One-hot codes tell by it how much of the embedding a semantic ID still holds, level by level; on a planted world, codes and
embedding tell how much of the known factors of an item they hold. It is the probing of representations (Alain and Bengio 2016,
arXiv 1610.01644) by ridge regression (Hoerl and Kennard 1970), in folds over items.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sparse
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
FOLDS = 5
RIDGE = 1.0  # one unit of weight decay: a code that one item has is predicted at half of that item's vector
DIRECT = 2048  # features up to which the normal equations are solved by Cholesky, beyond by conjugate gradients
TOLERANCE = 1e-4  # of the residual, relative: far below what the figures show
TARGETS_AT_ONCE = 64
MOST_ITEMS = 100_000  # of a larger catalogue so many are drawn: a probe must not cost more than the quantizer


def sample(items: int, seed: int) -> Ints:
    """The items to probe: all, or `MOST_ITEMS` of them drawn by ``seed``, in order."""
    return np.sort(np.random.default_rng(seed).permutation(items)[:MOST_ITEMS])


def one_hot(codes: Ints) -> sparse.csr_matrix:
    """(items, levels) codes -> (items, sum of widths): a one for each level's code."""
    widths = codes.max(axis=0) + 1
    columns = codes + np.concatenate([[0], np.cumsum(widths)[:-1]])
    rows = np.repeat(np.arange(len(codes)), codes.shape[1])
    return sparse.csr_matrix((np.ones(columns.size), (rows, columns.ravel())), shape=(len(codes), int(widths.sum())))


def ridge(features: Any, targets: Floats) -> Floats:
    """(n, p) features, dense or sparse, and (n, t) targets -> (p, t) weights W that minimise |XW - Y|^2 + `RIDGE` |W|^2."""
    right = np.asarray(features.T @ targets)
    if features.shape[1] <= DIRECT:
        gram = features.T @ features
        gram = gram.toarray() if sparse.issparse(gram) else gram
        gram[np.diag_indices_from(gram)] += RIDGE
        return np.asarray(cho_solve(cho_factor(gram), right))
    diagonal = np.asarray(features.multiply(features).sum(axis=0)).reshape(-1, 1) + RIDGE
    blocks = np.array_split(right, -(-right.shape[1] // TARGETS_AT_ONCE), axis=1)
    return np.concatenate([_gradients(lambda v: features.T @ (features @ v) + RIDGE * v, b, diagonal) for b in blocks], axis=1)


def _gradients(apply: Callable[[Floats], Floats], right: Floats, diagonal: Floats) -> Floats:
    """Conjugate gradients for all columns at once, preconditioned by the diagonal (Hestenes and Stiefel 1952; Saad 2003, alg.
    9.1)."""
    solution, residual = np.zeros_like(right), right.copy()
    aimed = residual / diagonal
    direction, energy = aimed.copy(), (residual * aimed).sum(axis=0)
    least = TOLERANCE**2 * energy
    for _ in range(10 * len(right)):
        live = energy > least
        if not live.any():
            break
        image = apply(direction)
        step = np.where(live, energy / np.where(live, (direction * image).sum(axis=0), 1.0), 0.0)
        solution += step * direction
        residual -= step * image
        aimed = residual / diagonal
        before, energy = energy, (residual * aimed).sum(axis=0)
        direction = aimed + np.where(live, energy / np.where(live, before, 1.0), 0.0) * direction
    return solution


def predicted(features: Any, targets: Floats, seed: int) -> Floats:
    """(n, t) out-of-fold predictions: each item's by weights, and a mean of the targets, that did not see it."""
    n = features.shape[0]
    folds = np.random.default_rng(seed).permutation(n) % min(FOLDS, n)
    out = np.empty_like(targets)
    for fold in range(min(FOLDS, n)):
        held, fitted = folds == fold, folds != fold
        mean = targets[fitted].mean(axis=0) if fitted.any() else 0.0
        weights = ridge(features[fitted], targets[fitted] - mean)
        out[held] = features[held] @ weights + mean
    return out


def r2(targets: Floats, guess: Floats) -> float | None:
    """1 - squared error / squared deviation from the mean, over all columns together; None where nothing deviates."""
    whole = np.square(targets - targets.mean(axis=0)).sum()
    return float(1 - np.square(targets - guess).sum() / whole) if whole > 1e-12 * max(1.0, np.square(targets).sum()) else None


def probe_embedding(codes: Ints, embedding: Floats, seed: int) -> list[float | None]:
    """R^2 of the (items, d) ``embedding`` from the one-hot codes of the first level, of the first two, ... of all."""
    levels = range(1, codes.shape[1] + 1)
    return [r2(embedding, predicted(one_hot(codes[:, :level]), embedding, seed)) for level in levels]


def probe_factors(codes: Ints, embedding: Floats, factors: Mapping[str, Ints], seed: int) -> dict[str, dict[str, float]]:
    """For each factor, (items,) class numbers: the share of items whose class the probe names, from all ``codes`` (``sid``), from
    the ``embedding`` (which is the most that its quantizer could keep), and by the most frequent class (``chance``)."""
    scaled = embedding - embedding.mean(axis=0)
    scaled /= np.sqrt(np.square(scaled).mean()).clip(min=1e-12)
    found = {}
    for name, classes in factors.items():
        truth = np.eye(int(classes.max()) + 1)[classes]
        named = {
            source: float((predicted(features, truth, seed).argmax(axis=1) == classes).mean())
            for source, features in (("sid", one_hot(codes)), ("embedding", scaled))
        }
        found[name] = named | {"chance": float(np.bincount(classes).max() / len(classes))}
    return found
