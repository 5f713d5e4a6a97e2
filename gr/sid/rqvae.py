"""The RQ-VAE: an MLP encoder, residual codebooks of its latents, an MLP decoder, trained together.

For recommendation: Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3.1.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from gr.sid.kmeans import kmeans, nearest, squared_distances
from gr.sid.quantizers import Quantized
from gr.terms import Codebooks, Gradient

DECAY = 0.99  # of the moving averages (van den Oord et al. 2017, appendix A.1)
LEAST_COUNT = 1e-6
HOT, COLD = 4.0, 0.5
"""Temperatures of `soft_codes`, at the start and at the end of a training."""


class RQVAE(nn.Module):
    """MLP encoder, residual codebooks in the latent space, MLP decoder."""

    def __init__(
        self, d: int, hidden: tuple[int, ...], latent: int, levels: int, width: int, gradient: Gradient = "straight-through"
    ) -> None:
        super().__init__()
        sizes = (d, *hidden, latent)
        self.gradient = gradient
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        self.codebooks = nn.Parameter(torch.zeros(levels, width, latent))

    def forward(
        self, x: Tensor, temperature: float | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """(n, d) -> codes (n, levels), reconstruction (n, d), the codebook and commitment losses (per item, mean), and the
        (n, latent) residual that each level codes.

        With a ``temperature`` the decoder sees `soft_codes` instead of the codes.
        """
        z = self.encoder(x)
        residual, codes, points = z, [], []
        total = torch.zeros_like(z)
        codebook_loss = commitment = torch.zeros((), device=x.device)
        for book in self.codebooks:
            code = nearest(residual.detach(), book.detach())[1]
            vector = book[code]
            codebook_loss = codebook_loss + (residual.detach() - vector).square().sum(1).mean()
            commitment = commitment + (residual - vector.detach()).square().sum(1).mean()
            codes.append(code)
            points.append(residual.detach())
            taken = vector.detach() if temperature is None else soft_codes(residual, book, temperature, generator)
            total = total + taken
            residual = residual - taken.detach()
        if temperature is not None:
            passed = total
        else:
            passed = rotate(z, total) if self.gradient == "rotation" else z + (total - z).detach()
        return torch.stack(codes, 1), self.decoder(passed), codebook_loss, commitment, points

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(n, levels) codes -> (n, d)."""
        total = torch.stack([book[code] for book, code in zip(self.codebooks, codes.T, strict=True)]).sum(0)
        out: Tensor = self.decoder(total)
        return out

    @torch.no_grad()
    def start_codebooks(self, x: Tensor, generator: torch.Generator, batch: int | None = None) -> None:
        """Residual k-means of the latents, so that no code starts far from all data."""
        residual = self.encoder(x)
        for level in range(len(self.codebooks)):
            book = kmeans(residual, self.codebooks.shape[1], generator, iterations=10, batch=batch)
            self.codebooks[level] = book
            residual = residual - book[nearest(residual, book)[1]]

    @torch.no_grad()
    def restart_dead(self, x: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
        """Moves every code that no row of ``codes`` uses to the residual of a random item; returns (levels, width) which
        moved."""
        moved = torch.zeros(self.codebooks.shape[:2], dtype=torch.bool)
        residual = self.encoder(x)
        for level, book in enumerate(self.codebooks):
            used = torch.bincount(codes[:, level], minlength=len(book)) > 0
            dead = torch.nonzero(~used).flatten()[: len(x)]
            pick = torch.randperm(len(x), generator=generator)[: len(dead)]
            self.codebooks[level, dead] = residual[pick]
            residual = residual - book[codes[:, level]]
            moved[level, dead] = True
        return moved


def rotate(z: Tensor, quantized: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2): equals ``quantized``, both (n, d); its gradient
    reaches ``z`` by the rotation and the stretch that take z there, which are held constant.

    It is applied to the sum of a residual quantizer's codes, which is one vector quantizer of z with width^levels centres. Level
    by level the stretch |code| / |residual| has no bound: a residual may be zero while its nearest code is not.
    """
    q = quantized.detach()
    length, aim = (v.norm(dim=1, keepdim=True).clamp(min=1e-12) for v in (z.detach(), q))
    a, b = z.detach() / length, q / aim
    between = nn.functional.normalize(a + b, dim=1)
    turned = z - 2 * between * (between * z).sum(1, keepdim=True) + 2 * b * (a * z).sum(1, keepdim=True)
    out: Tensor = aim / length * turned
    return out


def soft_codes(points: Tensor, book: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """(n, d) points and (k, d) codes -> (n, d) means of the codes by softmax(-distance² / (2 v temperature) + Gumbel noise).

    The Gumbel-softmax relaxation (Jang, Gu and Poole 2017, arXiv 1611.01144, eq. 2) of a draw from the posterior of a mixture of
    equal Gaussians around the codes. v is the mean squared distance to the nearest code, per dimension: the latents' scale
    plays no part. Unlike in the paper the noise fades with the temperature: what is left is the nearest code, which coding takes.
    """
    distance = squared_distances(points, book)
    variance = distance.detach().min(1).values.mean().clamp(min=1e-12) / points.shape[1]
    noise = -torch.empty_like(distance).exponential_(generator=generator).clamp(min=1e-12).log()
    out: Tensor = torch.softmax(noise - distance / (2 * variance * temperature), 1) @ book
    return out


class MovingAverages:
    """Codebooks as moving averages of the residuals that chose them, instead of by a loss (van den Oord et al. 2017, app.
    A.1)."""

    def __init__(self, codebooks: Tensor) -> None:
        self.count = torch.ones(codebooks.shape[:2])
        self.sum = codebooks.detach().clone()

    @torch.no_grad()
    def update(self, codebooks: Tensor, codes: Tensor, points: list[Tensor]) -> None:
        """``codes``: (n, levels), ``points``: (n, latent) for each level, of one batch; changes ``codebooks`` in place."""
        for level, residual in enumerate(points):
            won = torch.bincount(codes[:, level], minlength=codebooks.shape[1])
            added = torch.zeros_like(self.sum[level]).index_add_(0, codes[:, level], residual)
            # A code that wins nothing keeps its place while both averages shrink alike: not so far that they end as 0 / 0.
            share = torch.where((won > 0) | (self.count[level] > LEAST_COUNT), 1 - DECAY, 0.0)
            self.count[level] += share * (won - self.count[level])
            self.sum[level] += share[:, None] * (added - self.sum[level])
            codebooks[level] = self.sum[level] / self.count[level, :, None]

    def restart(self, codebooks: Tensor, moved: Tensor) -> None:
        self.count[moved] = 1.0
        self.sum[moved] = codebooks.detach()[moved]


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
    gradient: Gradient = "straight-through",
    codebooks: Codebooks = "loss",
    kmeans_batch: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Quantized:
    """Trains an RQ-VAE on (items, d) embeddings and codes them; deterministic by ``seed``.

    Loss: reconstruction + codebook + ``beta`` x commitment (van den Oord et al. 2017, eq. 3); without the codebook's where moving
    averages (``codebooks`` "ema") do its work. The decoder's gradient passes the codes ``straight-through``, or by `rotate`; with
    ``gumbel`` it reaches encoder and codebooks through `soft_codes`, whose temperature falls geometrically from `HOT` to `COLD`.
    Codes that nothing chooses are restarted after every tenth of the run, in its first half. ``kmeans_batch``: of the start.
    ``progress(step, loss)`` is called now and then. Raises FloatingPointError when the loss is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = RQVAE(x.shape[1], hidden, latent, levels, width, gradient)
    model.start_codebooks(x, generator, kmeans_batch)
    averages = MovingAverages(model.codebooks) if codebooks == "ema" else None
    model.codebooks.requires_grad_(averages is None)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    every = max(1, steps // 10)
    for step in range(steps):
        rows = torch.randint(len(x), (min(batch, len(x)),), generator=generator)
        temperature = HOT * (COLD / HOT) ** (step / steps) if gradient == "gumbel" else None
        codes, reconstruction, codebook_loss, commitment, points = model(x[rows], temperature, generator)
        loss = (reconstruction - x[rows]).square().sum(1).mean() + beta * commitment
        if averages is None:
            loss = loss + codebook_loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"RQ-VAE loss is {loss.item()} at step {step + 1} of {steps}")
        adam.zero_grad()
        loss.backward()
        adam.step()
        if averages is not None:
            averages.update(model.codebooks, codes, points)
        if (step + 1) % every == 0:
            if progress is not None:
                progress(step + 1, loss.item())
            if step + 1 <= steps // 2:
                with torch.no_grad():
                    moved = model.restart_dead(x, model(x)[0], generator)
                if averages is not None:
                    averages.restart(model.codebooks, moved)
    with torch.no_grad():
        codes, reconstruction, _, _, points = model.eval()(x)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Quantized(codes, reconstruction, weights, points[-1], weights["codebooks"][-1], model.decode)
