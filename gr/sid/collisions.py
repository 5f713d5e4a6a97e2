"""Items with the same codes, told apart by the last level itself: a balanced choice of its codes by optimal transport.

After LC-Rec (Zheng et al. 2024, arXiv 2311.09049, section 3.2.2), which gives colliding items their last code by Sinkhorn's
algorithm.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gr.sid.kmeans import squared_distances

Ints = NDArray[np.int64]
BLUR = 0.02  # the transport's entropic weight, as a share of the mean squared distance
ITERATIONS = 100
ELEMENTS_AT_ONCE = 2**24  # of (groups, items, codes): 64 MB in fp32


def balance(codes: Ints, points: Tensor, book: Tensor) -> Ints:
    """(items, levels) codes -> the same, but for the last level of items whose other codes lead a collision.

    ``points``: (items, d) what the last level codes; ``book``: (width, d). Of m items with the same first levels no code gets
    more than ceil(m / width), so up to ``width`` of them are all told apart. Groups without a collision keep their codes.
    """
    prefix = np.unique(codes[:, :-1], axis=0, return_inverse=True)[1].ravel() if codes.shape[1] > 1 else np.zeros(len(codes), int)
    _, whole, shared = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    colliding = np.unique(prefix[shared[whole.ravel()] > 1])
    order = np.argsort(prefix, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(prefix))[:-1])
    by_size: dict[int, list[Ints]] = {}
    for number in colliding:
        by_size.setdefault(len(groups[number]), []).append(groups[number])
    out = codes.copy()
    for size, members in sorted(by_size.items()):
        at_once = max(1, ELEMENTS_AT_ONCE // (size * len(book)))
        for start in range(0, len(members), at_once):
            rows = np.stack(members[start : start + at_once])
            distance = torch.stack([squared_distances(points[torch.from_numpy(r)], book) for r in rows])
            out[rows, -1] = _rounded(transport(distance), -(-size // len(book))).numpy()
    return out


def transport(distance: Tensor) -> Tensor:
    """(groups, m, width) costs -> the logarithm of the entropic transport plan, by Sinkhorn's iterations (Cuturi 2013, alg. 1).

    Every item sends 1 and no code receives more than ceil(m / width): one row more takes, at no cost, what the codes have left.
    """
    n, m, width = distance.shape
    capacity = -(-m // width)
    blur = BLUR * distance.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    score = torch.cat([-distance / blur, torch.zeros(n, 1, width)], dim=1)
    send = torch.ones(m + 1)
    send[m] = width * capacity - m
    rows, columns = torch.zeros(n, m + 1, 1), torch.zeros(n, 1, width)
    for _ in range(ITERATIONS):
        rows = send.log()[:, None] - (score + columns).logsumexp(2, keepdim=True)
        columns = float(np.log(capacity)) - (score + rows).logsumexp(1, keepdim=True)
    return (score + rows + columns)[:, :m]


def _rounded(plan: Tensor, capacity: int) -> Tensor:
    """(groups, m, width) log plan -> (groups, m) codes: every item asks for its likeliest code that has room, the likeliest of
    those who ask get it, and the others ask again."""
    n, m, width = plan.shape
    code = torch.full((n, m), -1)
    room = torch.full((n, width), capacity)
    while bool((code < 0).any()):
        group, item = torch.nonzero(code < 0, as_tuple=True)
        wish, choice = plan[group, item].masked_fill(room[group] == 0, float("-inf")).max(1)
        desk = (group * width + choice).numpy()
        order = np.lexsort((item.numpy(), -wish.numpy(), desk))
        sizes = np.bincount(desk)
        sizes = sizes[sizes > 0]
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        got = torch.from_numpy(order)[torch.from_numpy(place) < room.flatten()[torch.from_numpy(desk[order])]]
        code[group[got], item[got]] = choice[got]
        room.view(-1).index_add_(0, torch.from_numpy(desk)[got], torch.full((len(got),), -1))
    return code
