"""Item embeddings to codes: residual k-means, and product quantization as its contrast. The RQ-VAE is in `gr.sid.rqvae`.

In residual quantization level l codes what levels 1..l-1 left over (Chen, Guan and Wang 2010, "Approximate nearest neighbor
search by residual vector quantization"), so that the first codes say most. In product quantization (Jégou, Douze and Schmid 2011)
level l codes a part of the dimensions of its own, so that no level comes before another.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gr.sid.kmeans import DISTANCES_AT_ONCE, kmeans, nearest, squared_distances


@dataclass(frozen=True)
class Quantized:
    """``codes``: (items, levels) int64; ``reconstruction``: (items, d) in the embedding's space; ``weights``: what was learnt.

    For another choice at the last level (`gr.sid.collisions`): ``last_points`` (items, d') is what that level codes,
    ``last_book`` (width, d') its codebook, and ``rebuild`` makes (items, levels) codes that differ there only into a
    reconstruction.
    """

    codes: Tensor
    reconstruction: Tensor
    weights: dict[str, Tensor]
    last_points: Tensor
    last_book: Tensor
    rebuild: Callable[[Tensor], Tensor]

    @property
    def n_parameters(self) -> int:
        return sum(w.numel() for w in self.weights.values())

    def with_codes(self, codes: Tensor) -> "Quantized":
        """The same quantizer's other codes, which may differ at the last level."""
        return replace(self, codes=codes, reconstruction=self.rebuild(codes))


def standardize(x: Tensor) -> Tensor:
    """Centred embeddings of mean squared norm 1: a common direction would waste the first codebook."""
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt().clamp(min=1e-12)


def assign(x: Tensor, codebooks: Tensor, beam: int = 1) -> tuple[Tensor, Tensor]:
    """(n, d) and (levels, width, d) -> (n, levels) codes, and the (n, d) sum of the centres.

    ``beam`` 1: nearest centre, level by level. More: of the ``beam`` best choices for the levels so far all are carried on, and
    the best of the last level's is taken (Babenko and Lempitsky 2014, "Additive quantization", section 3.2; faiss'
    `max_beam_size`).
    """
    parts = []
    for part in torch.split(x, _rows_at_once(codebooks.shape[1], beam)):
        kept, codes = part[:, None, :], torch.zeros(len(part), 1, 0, dtype=torch.int64)
        for book in codebooks:
            kept, codes = _extend(kept, codes, book, beam)
        parts.append((codes[:, 0], part - kept[:, 0]))
    return torch.cat([codes for codes, _ in parts]), torch.cat([centres for _, centres in parts])


def _rows_at_once(width: int, beam: int) -> int:
    return max(1, DISTANCES_AT_ONCE // (width * beam))


def _extend(kept: Tensor, codes: Tensor, book: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """One level more: (n, b, d) residuals and (n, b, levels) codes to the at most ``beam`` best of all b x width, best first."""
    n, _, d = kept.shape
    distance = squared_distances(kept.reshape(-1, d), book).reshape(n, -1)
    if beam == 1:
        choice = distance.argmin(1, keepdim=True)
    else:
        choice = distance.topk(min(beam, distance.shape[1]), dim=1, largest=False).indices
    parent, code = choice // len(book), choice % len(book)
    rows = torch.arange(n)[:, None]
    return kept[rows, parent] - book[code], torch.cat([codes[rows, parent], code[..., None]], dim=2)


def residual_kmeans(
    x: Tensor,
    levels: int,
    width: int,
    seed: int,
    normalize_residuals: bool = False,
    batch: int | None = None,
    beam: int = 1,
) -> Quantized:
    """Residual k-means of (items, d) embeddings; deterministic by ``seed``.

    ``normalize_residuals`` scales each item's residual to unit length before the next level (GRID's recipe); the codes then no
    longer sum to a reconstruction, so the scale of each residual is taken as known when the reconstruction is computed.
    ``batch``: mini-batches for the k-means. ``beam``: of the assignment after the fit, see `assign`; not with
    ``normalize_residuals``.
    """
    generator = torch.Generator().manual_seed(seed)
    points, scale = x, torch.ones(len(x), 1)
    codes, books, scales = [], [], []
    for level in range(levels):
        if normalize_residuals and level > 0:
            length = points.norm(dim=1, keepdim=True).clamp(min=1e-12)
            points, scale = points / length, scale * length
        book = kmeans(points, width, generator, batch=batch)
        code = nearest(points, book)[1]
        codes.append(code)
        books.append(book)
        scales.append(scale)
        last, points = points, points - book[code]

    def rebuild(codes: Tensor) -> Tensor:
        return torch.stack([s * book[c] for s, book, c in zip(scales, books, codes.T, strict=True)]).sum(0)

    weights = {"codebooks": torch.stack(books)}
    if beam > 1:
        best, centres = assign(x, weights["codebooks"], beam)
        return Quantized(best, centres, weights, x - centres + books[-1][best[:, -1]], books[-1], rebuild)
    return Quantized(torch.stack(codes, 1), x - points * scale, weights, last, books[-1], rebuild)


def product_kmeans(x: Tensor, levels: int, width: int, seed: int, batch: int | None = None) -> Quantized:
    """Product quantization of (items, d) embeddings: the dimensions in ``levels`` runs of as equal length as can be, and k-means
    of each. ``levels`` may be at most d. Deterministic by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    parts = [part.contiguous() for part in x.tensor_split(levels, dim=1)]
    books = [kmeans(part, width, generator, batch=batch) for part in parts]

    def rebuild(codes: Tensor) -> Tensor:
        return torch.cat([book[c] for book, c in zip(books, codes.T, strict=True)], dim=1)

    codes = torch.stack([nearest(part, book)[1] for part, book in zip(parts, books, strict=True)], 1)
    weights = {f"codebook.{level}": book for level, book in enumerate(books)}
    return Quantized(codes, rebuild(codes), weights, parts[-1], books[-1], rebuild)
