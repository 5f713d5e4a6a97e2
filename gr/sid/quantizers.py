"""Residual quantization of item embeddings: residual k-means, and the RQ-VAE.

Level l codes what levels 1..l-1 left over (residual quantization: Chen, Guan and Wang 2010; the RQ-VAE for recommendation:
Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gr.sid.kmeans import kmeans, squared_distances


@dataclass(frozen=True)
class Quantized:
    """``codes``: (items, levels) int64; ``reconstruction``: (items, d) in the embedding's space; ``weights``: what was learnt."""

    codes: Tensor
    reconstruction: Tensor
    weights: dict[str, Tensor]

    @property
    def n_parameters(self) -> int:
        return sum(w.numel() for w in self.weights.values())


def standardize(x: Tensor) -> Tensor:
    """Centred embeddings of mean squared norm 1: a common direction would waste the first codebook."""
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt().clamp(min=1e-12)


def assign(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) and (levels, width, d) -> (n, levels) codes, nearest centre level by level, and the (n, d) sum of the centres."""
    residual, codes = x, []
    for book in codebooks:
        code = squared_distances(residual, book).argmin(1)
        codes.append(code)
        residual = residual - book[code]
    return torch.stack(codes, 1), x - residual


def residual_kmeans(x: Tensor, levels: int, width: int, seed: int, normalize_residuals: bool = False) -> Quantized:
    """Residual k-means of (items, d) embeddings; deterministic by ``seed``.

    ``normalize_residuals`` scales each item's residual to unit length before the next level (GRID's recipe); the codes then no
    longer sum to a reconstruction, so the scale of each residual is taken as known when the reconstruction is computed.
    """
    generator = torch.Generator().manual_seed(seed)
    residual, scale = x, torch.ones(len(x), 1)
    codes, books = [], []
    for level in range(levels):
        if normalize_residuals and level > 0:
            length = residual.norm(dim=1, keepdim=True).clamp(min=1e-12)
            residual, scale = residual / length, scale * length
        book = kmeans(residual, width, generator)
        code = squared_distances(residual, book).argmin(1)
        residual = residual - book[code]
        codes.append(code)
        books.append(book)
    return Quantized(torch.stack(codes, 1), x - residual * scale, {"codebooks": torch.stack(books)})


class RQVAE(nn.Module):
    """MLP encoder, residual codebooks in the latent space, MLP decoder."""

    def __init__(self, d: int, hidden: tuple[int, ...], latent: int, levels: int, width: int) -> None:
        super().__init__()
        sizes = (d, *hidden, latent)
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        self.codebooks = nn.Parameter(torch.zeros(levels, width, latent))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(n, d) -> codes (n, levels), reconstruction (n, d), and the codebook and commitment losses (per item, mean)."""
        residual = self.encoder(x)
        z, codes = residual, []
        total = torch.zeros_like(z)
        codebook_loss = commitment = torch.zeros((), device=x.device)
        for book in self.codebooks:
            code = squared_distances(residual.detach(), book.detach()).argmin(1)
            vector = book[code]
            codebook_loss = codebook_loss + (residual.detach() - vector).square().sum(1).mean()
            commitment = commitment + (residual - vector.detach()).square().sum(1).mean()
            codes.append(code)
            total = total + vector
            residual = residual - vector.detach()
        straight_through = z + (total - z).detach()
        return torch.stack(codes, 1), self.decoder(straight_through), codebook_loss, commitment

    @torch.no_grad()
    def start_codebooks(self, x: Tensor, generator: torch.Generator) -> None:
        """Residual k-means of the latents, so that no code starts far from all data."""
        residual = self.encoder(x)
        for level in range(len(self.codebooks)):
            book = kmeans(residual, self.codebooks.shape[1], generator, iterations=10)
            self.codebooks[level] = book
            residual = residual - book[squared_distances(residual, book).argmin(1)]

    @torch.no_grad()
    def restart_dead(self, x: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """Moves every code that no row of ``codes`` uses to the residual of a random item; returns how many."""
        moved = 0
        residual = self.encoder(x)
        for level, book in enumerate(self.codebooks):
            used = torch.bincount(codes[:, level], minlength=len(book)) > 0
            dead = torch.nonzero(~used).flatten()[: len(x)]
            pick = torch.randperm(len(x), generator=generator)[: len(dead)]
            self.codebooks[level, dead] = residual[pick]
            residual = residual - book[codes[:, level]]
            moved += len(dead)
        return moved


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rqvae(
    x: Tensor,
    levels: int,
    width: int,
    seed: int,
    hidden: tuple[int, ...],
    latent: int,
    beta: float,
    steps: int,
    batch: int,
    lr: float,
    progress: Callable[[int, float], None] | None = None,
) -> Quantized:
    """Trains an RQ-VAE on (items, d) embeddings and codes them; deterministic by ``seed``.

    Loss: reconstruction + codebook + ``beta`` x commitment, straight-through gradients (van den Oord et al. 2017, eq. 3). Codes
    that a tenth of the run never used are restarted, in its first half. ``progress(step, loss)`` is called now and then.
    Raises FloatingPointError when the loss is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RQVAE(x.shape[1], hidden, latent, levels, width)
    model.start_codebooks(x, generator)
    adam = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    every = max(1, steps // 10)
    for step in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        _, reconstruction, codebook_loss, commitment = model(x[rows])
        loss = (reconstruction - x[rows]).square().sum(1).mean() + codebook_loss + beta * commitment
        if not torch.isfinite(loss):
            raise FloatingPointError(f"RQ-VAE loss is {loss.item()} at step {step + 1} of {steps}")
        adam.zero_grad()
        loss.backward()
        adam.step()
        if (step + 1) % every == 0:
            if progress is not None:
                progress(step + 1, loss.item())
            if step + 1 <= steps // 2:
                with torch.no_grad():
                    model.restart_dead(x, model(x)[0], generator)
    with torch.no_grad():
        codes, reconstruction, _, _ = model.eval()(x)
    return Quantized(codes, reconstruction, {name: p.detach().clone() for name, p in model.named_parameters()})
