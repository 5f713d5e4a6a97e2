"""The grouped T5 and its dropout against transformers' T5 and torch's dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gr.dropout import dropout
from gr.sid.recommender import t5
from gr.sid.t5 import GROUPS, LEAST_IN_GROUP, GroupedT5, Layout

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=80)


def masked(lengths: list[int]) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@settings(max_examples=100, deadline=None)
@given(LENGTHS)
def test_every_token_stands_in_one_group_and_little_else_does(lengths: list[int]) -> None:
    mask = masked(lengths)
    layout = Layout.of(mask, torch.float32)
    assert sorted(layout.order.tolist()) == list(range(len(lengths)))
    assert len(layout.index.unique()) == len(layout.index), "a place stands in one row"
    assert int(mask.flatten()[layout.index].sum()) == sum(lengths), "every token stands in one"
    assert len(layout.groups) <= GROUPS + 1
    whole = [g for g in layout.groups if g.hidden is None]
    assert all(len(g) >= min(LEAST_IN_GROUP, len(lengths)) for g in layout.groups)
    for group in layout.groups:
        own = sorted(lengths)[group.users]
        assert group.longest == own[-1] and (group in whole) == (own[0] == own[-1])
        assert group.rows.stop - group.rows.start == len(group) * group.longest


@settings(max_examples=15, deadline=None)
@given(LENGTHS, st.integers(0, 1000))
def test_logits_and_gradients_are_those_of_transformers(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    model = t5(50, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=0.0).double()
    for parameter in model.parameters():  # norms too
        parameter.data += 0.3 * torch.randn_like(parameter)
    mask = masked(lengths)
    ids = torch.randint(1, 50, mask.shape) * mask
    digits = torch.randint(1, 50, (len(lengths), 4))
    expected = model(input_ids=ids, attention_mask=mask, decoder_input_ids=digits).logits
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = GroupedT5(model)(ids, mask, digits).logits
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    (logits * weights).sum().backward()
    assert set(gradients) == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-7, atol=1e-7, msg=name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_scales_the_rest(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    out = dropout(x, share, training=True)
    kept = out != 0
    spread = 5 * (share * (1 - share) / x.numel()) ** 0.5
    assert 1 - kept.double().mean().item() == pytest.approx(share, abs=spread + 2**-17)
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / (1 - share)))
    # Each of the four numbers that a draw serves is its own, and so is each from its neighbour.
    for of in (kept[:, :1000].reshape(-1, 4).double(), kept.T.reshape(-1, 7).double()):
        assert of.T.corrcoef().fill_diagonal_(0).abs().max() < 0.01
    out.sum().backward()
    assert torch.equal(x.grad, out), "the gradient passes where the value did, scaled alike"


def test_dropout_draws_anew_each_time_and_the_same_from_the_same_seed() -> None:
    x = torch.ones(7, 9)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5, True), dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert not torch.equal(first, second) and torch.equal(first, dropout(x, 0.5, True))
    assert dropout(x, 0.5, False) is x and dropout(x, 0.0, True) is x


def test_a_grouped_training_pass_drops_in_every_layer_and_none_in_evaluation() -> None:
    torch.manual_seed(0)
    model = GroupedT5(t5(50, layers=1, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.5))
    ids, mask = torch.randint(1, 50, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    digits = torch.zeros(3, 2, dtype=torch.int64)
    model.train()
    assert not torch.allclose(model(ids, mask, digits).logits, model(ids, mask, digits).logits)
    model.eval()
    assert torch.equal(model(ids, mask, digits).logits, model(ids, mask, digits).logits)
