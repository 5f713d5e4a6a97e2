"""The SID recommenders on a device that is no CPU: a GPU where there is one, and everywhere one that is pretended."""

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gr.llm.backbone import NextTitle
from gr.llm.decode import rank_titles
from gr.llm.sequences import ON_GPU, micro_batches
from gr.llm.titles import TitleTrie
from gr.sid import decode
from gr.sid.decoder_only import SidSequences, decoder_only, sid_titles
from gr.sid.recommender import SidBatcher, SidLoss, t5
from gr.sid.sids import SidTable, disambiguate
from gr.sid.t5 import GroupedT5, Layout
from gr.sid.t5_weights import T5Weights
from jobs.options import Optimizer
from jobs.parallel import Replicated
from jobs.trainer import adam_of, learning_rate
from tests.gr.pretended_device import PRETENDED, pretended_device

HISTORY = 12
SIZE = {"layers": 2, "d_model": 32, "heads": 2, "d_kv": 16, "d_ff": 64, "dropout": 0.0}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with pretended_device() if request.param == "pretended" else nullcontext():
        yield PRETENDED if request.param == "pretended" else torch.device("cuda:0")


@pytest.fixture
def sids() -> SidTable:
    codes = disambiguate(np.random.default_rng(0).integers(0, 8, (200, 2)))
    offsets = np.concatenate([[0], np.cumsum(codes.max(0) + 1)[:-1]])
    return SidTable(1 + offsets + codes, int(1 + (codes.max(0) + 1).sum()))


def spread(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # far from uniform, so that mistakes show
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


HISTORIES = [np.random.default_rng(i).integers(0, 200, 1 + i % HISTORY) for i in range(40)]
TARGETS = list(range(40))


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_same(here: tuple[float, dict[str, Tensor]], there: tuple[float, dict[str, Tensor]]) -> None:
    assert there[0] == pytest.approx(here[0], rel=1e-5)
    assert there[1].keys() == here[1].keys()
    for name, gradient in here[1].items():
        torch.testing.assert_close(there[1][name], gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_a_t5_trains_and_ranks_there_as_here(sids: SidTable, normalize: str, device: torch.device) -> None:
    torch.manual_seed(1)
    model = spread(t5(sids.vocab, **SIZE))
    batcher, grouped, loss = SidBatcher(sids, HISTORY), GroupedT5(model), SidLoss(sids, normalize)
    inputs = batcher.encoder_inputs(HISTORIES)
    labelled = inputs | {"labels": batcher.labels(TARGETS)}
    here = loss_and_gradients(model, loss(grouped, labelled))
    trie = TitleTrie(sid_titles(sids), normalize)
    lists, scores, _ = decode.rank_sids(T5Weights(model, trie), inputs, 20)
    model.to(device).tie_weights()  # which .to() keeps on a real device only
    assert_same(here, loss_and_gradients(model, loss(grouped, {k: v.to(device) for k, v in labelled.items()})))
    weights = T5Weights(model, trie.to(device))
    found, theirs, _ = decode.rank_sids(weights, {k: v.to(device) for k, v in inputs.items()}, 20)
    assert (found == lists).mean() > 0.99, "but for what is scored alike"
    np.testing.assert_allclose(theirs, scores, atol=1e-3)


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_a_decoder_only_model_trains_and_ranks_there_as_here(sids: SidTable, normalize: str, device: torch.device) -> None:
    torch.manual_seed(1)
    lm = spread(decoder_only(sids.vocab, **SIZE))
    sequences = SidSequences(sids, HISTORY)
    trie = TitleTrie(sequences.titles, normalize)
    model = NextTitle(lm, trie.trie if normalize == "catalogue" else None)
    packed = sequences.training(range(len(HISTORIES)), HISTORIES)
    (one,) = micro_batches(packed, 0, trie, sids.vocab, limit=ON_GPU)
    here = loss_and_gradients(model, model(**one.inputs))
    prompts, _ = sequences.prompts(range(len(HISTORIES)), HISTORIES)
    lists, scores, _ = rank_titles(lm, trie, prompts, 20)
    model.to(device)
    lm.tie_weights()
    assert_same(here, loss_and_gradients(model, model(**{k: v.to(device) for k, v in one.inputs.items()})))
    found, theirs, _ = rank_titles(lm, trie.to(device), prompts, 20)
    assert (found == lists).mean() > 0.99, "but for what is scored alike"
    np.testing.assert_allclose(theirs, scores, atol=1e-3)


def test_there_a_batch_is_one_group_in_its_order(device: torch.device) -> None:
    mask = (torch.arange(64) < torch.arange(64, 0, -1)[:, None]).long()
    layout = Layout.of(mask.to(device), torch.float32)
    (group,) = layout.groups
    assert len(Layout.of(mask, torch.float32).groups) > 1
    assert layout.order.tolist() == list(range(64)) and layout.index.tolist() == list(range(64 * 64))
    assert torch.equal(group.hidden.cpu()[:, 0, 0] == 0, mask == 1)


@GPU
def test_adams_moments_are_restored_on_a_gpu() -> None:
    accelerator = Accelerator()

    def made() -> tuple[nn.Module, Replicated]:
        torch.manual_seed(0)
        model = nn.Linear(8, 3)
        return model, Replicated(accelerator, model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))

    def steps(parallel: Replicated, numbers: range) -> None:
        for number in numbers:
            inputs = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).to(accelerator.device)}
            parallel.accumulate(lambda m, i: m(i["x"]).square().sum(), inputs, 1.0, True)
            parallel.update(0.1, 1.0)

    whole, straight = made()
    steps(straight, range(6))
    cut, first = made()
    steps(first, range(3))
    again, second = made()
    again.load_state_dict(cut.state_dict())
    second.restore(first.moments(), 3)
    steps(second, range(3, 6))
    for name, parameter in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], parameter, msg=name)


@GPU
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recorded_steps_end_like_others(sids: SidTable, dropout: float, caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    batcher, loss, optimizer = SidBatcher(sids, HISTORY), SidLoss(sids, "catalogue"), Optimizer(steps=9, global_batch=40, lr=3e-3)

    def ended(graphs: bool) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(1)
        model = t5(sids.vocab, **SIZE | {"dropout": dropout})
        parallel = Replicated(
            accelerator, GroupedT5(model).train(), adam_of(model, optimizer, accelerator.device, True, graphs), graphs
        )
        losses = []
        for step in range(9):
            torch.manual_seed(step)
            total = 0.0
            for part in range(2):
                some = slice(20 * part, 20 * part + 20)
                inputs = batcher.encoder_inputs(HISTORIES[some]) | {"labels": batcher.labels(TARGETS[some])}
                inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
                total += parallel.accumulate(loss, inputs, 1 / 40, part == 1).item()
            parallel.update(learning_rate(optimizer, step), 1.0)
            losses.append(total)
        recorded = [] if parallel._passes is None else list(parallel._passes._graphs)
        assert bool(recorded) == graphs
        return losses, parallel.weights()

    (losses, weights), (expected, those) = ended(True), ended(False)
    assert not caplog.records, "nothing that could not be recorded"
    if dropout:  # other draws
        assert losses[-1] == pytest.approx(expected[-1], rel=0.05) and losses[-1] < losses[0]
        return
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, weight in those.items():
        torch.testing.assert_close(weights[name], weight, rtol=0.05, atol=2e-2, msg=name)
