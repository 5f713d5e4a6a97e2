"""k-means with a k-means++ start, in torch: the step that residual k-means and the RQ-VAE's start share."""

import torch
from torch import Tensor


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """(n, d), (k, d) -> (n, k) squared Euclidean distances."""
    return (x.square().sum(1, keepdim=True) - 2 * x @ centers.T + centers.square().sum(1)).clamp(min=0)


def kmeans(x: Tensor, k: int, generator: torch.Generator, iterations: int = 50) -> Tensor:
    """(n, d) -> (k, d) centres by Lloyd's iterations from a k-means++ start (Arthur and Vassilvitskii 2007).

    A centre that loses its last point moves to the point farthest from its own centre. With fewer distinct points than ``k``
    some centres coincide and are never chosen.
    """
    centers = _plus_plus(x, k, generator)
    assigned = torch.full((len(x),), -1)
    for _ in range(iterations):
        distance, nearest = squared_distances(x, centers).min(1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        count = torch.bincount(nearest, minlength=k)
        total = torch.zeros_like(centers).index_add_(0, nearest, x)
        centers = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centers)
        empty = torch.nonzero(count == 0).flatten()
        centers[empty] = x[distance.argsort(descending=True)[: len(empty)]] if len(empty) <= len(x) else centers[empty]
    return centers


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
