"""Quantizers against brute force and definitions: beams, mini-batches, product, the rotation trick, moving averages."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gr.sid.kmeans import kmeans, nearest
from gr.sid.quantizers import assign, product_kmeans, residual_kmeans, standardize
from gr.sid.rqvae import DECAY, RQVAE, MovingAverages, rotate, rqvae, soft_codes
from gr.terms import Gradient
from jobs.sid_config import QuantizeConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over such small tensors take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SIZES: dict[str, Any] = {"hidden": (32,), "latent": 8, "beta": 0.25, "batch": 128, "lr": 3e-3}


def normal(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, reconstruction: torch.Tensor) -> float:
    return float((x - reconstruction).square().sum(1).mean())


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 1000))
def test_a_beam_as_wide_as_all_choices_finds_the_best_codes(levels: int, width: int, seed: int) -> None:
    x, books = normal(12, 3, seed), torch.stack([normal(width, 3, seed + 1 + level) for level in range(levels)])
    codes, centres = assign(x, books, beam=width**levels)
    sums = torch.stack([sum(books[level, c] for level, c in enumerate(row)) for row in product(range(width), repeat=levels)])
    best = torch.cdist(x.double(), sums.double()).square().min(1).values
    assert torch.allclose((x - centres).square().sum(1).double(), best, atol=1e-5)
    assert torch.allclose(torch.stack([books[level][codes[:, level]] for level in range(levels)]).sum(0), centres, atol=1e-5)


def test_a_beam_codes_better_than_the_nearest_centres_and_all_say_what_they_reconstruct() -> None:
    x = standardize(normal(1500, 16))
    greedy, beam = (residual_kmeans(x, 3, 16, seed=0, beam=b) for b in (1, 5))
    assert torch.equal(greedy.weights["codebooks"], beam.weights["codebooks"])
    assert error(x, beam.reconstruction) < 0.98 * error(x, greedy.reconstruction)
    normalised = residual_kmeans(x, 3, 16, seed=0, normalize_residuals=True)
    parts = product_kmeans(x, 3, 16, seed=0)
    vae = rqvae(x, 2, 16, seed=0, steps=20, **SIZES)
    for result in (greedy, beam, normalised, parts, vae):
        assert torch.allclose(result.rebuild(result.codes), result.reconstruction, atol=1e-5)
        chosen = result.last_book[result.codes[:, -1]]
        assert error(result.last_points, chosen) <= error(result.last_points, result.last_book.roll(1, 0)[result.codes[:, -1]])
    for result in (greedy, normalised, parts, vae):
        assert torch.equal(nearest(result.last_points, result.last_book)[1], result.codes[:, -1])


def test_mini_batches_come_near_lloyds_algorithm_and_leave_no_centre_dead() -> None:
    x = torch.cat([normal(300, 4, 1) * 0.1 + 5 * normal(1, 4, seed) for seed in range(2, 14)])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    errors = {}
    for batch in (None, 256, len(x)):
        centres = kmeans(x, 16, torch.Generator().manual_seed(0), batch=batch)
        distance, index = nearest(x, centres)
        errors[batch] = float(distance.mean())
        assert len(index.unique()) == 16
    assert errors[256] < 1.3 * errors[None]
    assert errors[len(x)] == errors[None], "one batch of everything is no mini-batch"


def test_product_quantization_codes_each_part_by_itself() -> None:
    x = normal(400, 7)
    result = product_kmeans(x, 3, 8, seed=0)
    assert [tuple(w.shape) for w in result.weights.values()] == [(8, 3), (8, 2), (8, 2)]
    assert result.n_parameters == 8 * 7
    changed = x.clone()
    changed[:, 3:] = normal(400, 4, seed=9)
    again = product_kmeans(changed, 3, 8, seed=0)
    assert torch.equal(again.codes[:, 0], result.codes[:, 0]), "the first part knows nothing of the others"


@settings(max_examples=50)
@given(st.integers(2, 6), st.integers(0, 10_000))
def test_the_rotation_trick_is_exact_forward_and_keeps_angles_backward(d: int, seed: int) -> None:
    z = normal(5, d, seed).double().requires_grad_()
    q = normal(5, d, seed + 1).double()
    out = rotate(z, q)
    assert torch.allclose(out, q)
    gradient = normal(5, d, seed + 2).double()
    out.backward(gradient)
    assert z.grad is not None
    scale = q.norm(dim=1) / z.detach().norm(dim=1)
    assert torch.allclose(z.grad.norm(dim=1), scale * gradient.norm(dim=1)), "a rotation and a stretch change no length otherwise"
    at_z = (z.grad * z.detach()).sum(1) / (z.grad.norm(dim=1) * z.detach().norm(dim=1))
    at_q = (gradient * q).sum(1) / (gradient.norm(dim=1) * q.norm(dim=1))
    assert torch.allclose(at_z, at_q), "the angle of gradient and vector is that of the paper's figure 1"
    assert torch.allclose((z.grad * z.detach()).sum(1), (gradient * q).sum(1)), "z is drawn out as far as its code is"


@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_the_rotation_trick_is_the_papers_matrix(d: int, seed: int) -> None:
    z, q = normal(1, d, seed).double()[0], normal(1, d, seed + 1).double()[0]
    jacobian = torch.autograd.functional.jacobian(lambda e: rotate(e[None], q[None])[0], z)
    a, b = z / z.norm(), q / q.norm()
    r = (a + b) / (a + b).norm()
    stretch = q.norm() / z.norm()
    paper = stretch * (torch.eye(d).double() - 2 * torch.outer(r, r) + 2 * torch.outer(b, a))
    assert torch.allclose(jacobian, paper)
    assert torch.allclose(jacobian @ jacobian.T, stretch**2 * torch.eye(d).double()), "a rotation, stretched"


@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(1, 4), st.floats(0.1, 100), st.integers(0, 10_000))
def test_soft_codes_follow_scale_and_place_and_end_as_the_nearest_code(width: int, d: int, scale: float, seed: int) -> None:
    points, book, shift = (normal(n, d, seed + n).double() for n in (8, width, 1))

    def soft(points: torch.Tensor, book: torch.Tensor, temperature: float) -> torch.Tensor:
        return soft_codes(points, book, temperature, torch.Generator().manual_seed(seed))

    once = soft(points, book, 1.0)
    assert torch.equal(once, soft(points, book, 1.0))
    assert torch.allclose(soft(scale * points + shift, scale * book + shift, 1.0), scale * once + shift, rtol=1e-4, atol=1e-4)
    assert (once <= book.max(0).values + 1e-9).all() and (once >= book.min(0).values - 1e-9).all(), "a mean of codes"
    distance = torch.cdist(points, book).sort(1).values
    clear = distance[:, 1] - distance[:, 0] > 0.01
    assert torch.allclose(soft(points, book, 1e-6)[clear], book[nearest(points, book)[1]][clear])


@pytest.mark.parametrize("gradient", ["straight-through", "rotation", "gumbel"])
def test_only_gumbel_lets_the_reconstruction_train_the_codebooks(gradient: Gradient) -> None:
    torch.manual_seed(0)
    x, generator = normal(50, 6), torch.Generator().manual_seed(0)
    model = RQVAE(6, (8,), 4, 2, 5, gradient)
    model.start_codebooks(x, generator)
    reconstruction = model(x, 1.0 if gradient == "gumbel" else None, generator)[1]
    (x - reconstruction).square().sum().backward()
    books, first = model.codebooks.grad, next(model.encoder.parameters()).grad
    assert first is not None and first.abs().sum() > 0
    assert (books is not None and bool((books.abs().sum((1, 2)) > 0).all())) == (gradient == "gumbel")


def test_moving_averages_follow_their_definition_and_never_end_as_no_number() -> None:
    books = normal(2, 3).reshape(1, 2, 3).clone()
    averages = MovingAverages(books)
    count, total = 1.0, books[0, 0].clone()
    for step in range(4000):
        points = normal(6, 3, step)
        averages.update(books, torch.zeros(6, 1, dtype=torch.int64), [points])
        if step < 50:
            count = DECAY * count + (1 - DECAY) * 6
            total = DECAY * total + (1 - DECAY) * points.sum(0)
            assert torch.allclose(books[0, 0], total / count, atol=1e-5)
    assert torch.isfinite(books).all()
    assert torch.allclose(books[0, 1], normal(2, 3)[1], atol=1e-3), "a code that nothing chooses stays where it is"


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "rotation"},
        {"gradient": "gumbel"},
        {"codebooks": "ema"},
        {"gradient": "rotation", "codebooks": "ema"},
    ],
)
def test_every_rqvae_learns_is_repeatable_and_unlike_the_default(options: dict[str, Any]) -> None:
    x = standardize(torch.cat([normal(60, 8, 1) * 0.1 + normal(1, 8, seed) for seed in range(2, 12)]))
    short, long, again = (rqvae(x, 2, 8, 0, steps=steps, **SIZES, **options) for steps in (1, 150, 150))
    assert torch.equal(long.reconstruction, again.reconstruction)
    assert error(x, long.reconstruction) < 0.6 * error(x, short.reconstruction)
    assert not torch.equal(long.reconstruction, rqvae(x, 2, 8, 0, steps=150, **SIZES).reconstruction)
    assert long.n_parameters == rqvae(x, 2, 8, 0, steps=1, **SIZES).n_parameters


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"method": "rqvae", "assignment_beam": 2}, "assignment_beam is an option of method residual-kmeans, not of rqvae"),
        ({"codebooks": "ema"}, "codebooks is an option of method rqvae"),
        ({"normalize_residuals": True, "assignment_beam": 2}, "give one of them"),
        ({"method": "rqvae", "gradient": "gumbel", "codebooks": "ema"}, "trains the codebooks by their loss"),
        ({"method": "product", "gradient": "gumbel"}, "gradient is an option of method rqvae"),
        ({"levels": 9}, "less than or equal to 8"),
    ],
)
def test_options_that_a_method_lacks_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        QuantizeConfig.model_validate(config)
    assert QuantizeConfig(levels=8, width=4096, method="product").levels == 8
