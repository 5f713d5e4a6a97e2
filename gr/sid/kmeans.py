"""k-means with a k-means++ start, in torch: the step that residual k-means, product quantization and the RQ-VAE's start share."""

import torch
from torch import Tensor

DISTANCES_AT_ONCE = 2**27
"""Distances held in memory together: half a GB in fp32."""
MINI_BATCH_PASSES = 10


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """(n, d), (k, d) -> (n, k) squared Euclidean distances."""
    return (x.square().sum(1, keepdim=True) - 2 * x @ centers.T + centers.square().sum(1)).clamp(min=0)


def nearest(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d), (k, d) -> (n,) squared distances to the nearest centre, and (n,) which it is."""
    rows = max(1, DISTANCES_AT_ONCE // len(centers))
    parts = [squared_distances(part, centers).min(1) for part in torch.split(x, rows)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def kmeans(x: Tensor, k: int, generator: torch.Generator, iterations: int = 50, batch: int | None = None) -> Tensor:
    """(n, d) -> (k, d) centres by Lloyd's iterations from a k-means++ start (Arthur and Vassilvitskii 2007).

    A centre that loses its last point moves to the point farthest from its own centre. With fewer distinct points than ``k``
    some centres coincide and are never chosen. ``batch``: mini-batches of so many points instead of Lloyd's iterations over all.
    """
    if batch is not None and batch < len(x):
        return _mini_batches(x, k, generator, batch)
    centers = _plus_plus(x, k, generator)
    assigned = torch.full((len(x),), -1)
    for _ in range(iterations):
        distance, index = nearest(x, centers)
        if torch.equal(index, assigned):
            break
        assigned = index
        centers, empty = _means(x, index, centers)
        centers[empty] = x[distance.argsort(descending=True)[: len(empty)]] if len(empty) <= len(x) else centers[empty]
    return centers


def _mini_batches(x: Tensor, k: int, generator: torch.Generator, batch: int) -> Tensor:
    """Sculley (2010), "Web-scale k-means clustering", algorithm 1: a centre is the mean of all points that it ever won.

    The start is k-means++ of a sample; after each pass a centre that won nothing moves to the farthest point of the last batch;
    the end is one of Lloyd's iterations over all points, which takes out the memory of early, bad assignments.
    """
    sample = torch.randperm(len(x), generator=generator)[: 3 * max(batch, k)]
    centers = _plus_plus(x[sample], k, generator)
    won = torch.zeros(k, dtype=torch.int64)
    for _ in range(MINI_BATCH_PASSES):
        before = won.clone()
        for rows in torch.split(torch.randperm(len(x), generator=generator), batch):
            points = x[rows]
            distance, index = nearest(points, centers)
            won += torch.bincount(index, minlength=k)
            centers = centers.index_add(0, index, (points - centers[index]) / won[index, None])
        empty = torch.nonzero(won == before).flatten()[: len(points)]
        centers[empty] = points[distance.argsort(descending=True)[: len(empty)]]
        won[empty] = 0
    return _means(x, nearest(x, centers)[1], centers)[0]


def _means(x: Tensor, index: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each centre's points, or the centre where it has none; and which have none."""
    count = torch.bincount(index, minlength=len(centers))
    total = torch.zeros_like(centers).index_add_(0, index, x)
    return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centers), torch.nonzero(count == 0).flatten()


def _plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    first = torch.randint(len(x), (1,), generator=generator)
    chosen = [first]
    distance = squared_distances(x, x[first]).flatten()
    for _ in range(1, k):
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        pick = torch.multinomial(weights, 1, generator=generator)
        chosen.append(pick)
        distance = torch.minimum(distance, squared_distances(x, x[pick]).flatten())
    return x[torch.cat(chosen)].clone()
