"""What a recommender reads beside the SIDs, for both architectures: numbers of tokens, one pass against one per prefix, decoding
against scoring the catalogue, saved models, counted parameters."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gr.count import count_parameters
from gr.llm.backbone import NextTitle, count, forward_flops
from gr.llm.decode import TitleStepper, rank_titles
from gr.llm.sequences import batch
from gr.llm.titles import TitleTrie
from gr.sid.decode import rank_sids
from gr.sid.decoder_only import SidSequences, decoder_only, load_decoder_only
from gr.sid.inputs import Reads
from gr.sid.recommender import SidBatcher, SidLoss, load_t5, t5, t5_flops
from gr.sid.sids import SidTable, disambiguate
from gr.sid.t5 import GroupedT5
from gr.sid.t5_weights import T5Weights
from gr.terms import Normalize

HISTORY = 6
ALL = Reads(user_tokens=9, separator=True, item_position=True)
EACH = [Reads(user_tokens=9), Reads(separator=True), Reads(item_position=True), ALL]
SIZE = {"layers": 2, "d_model": 16, "heads": 3, "d_kv": 8, "d_ff": 32}
USERS = [0, 7, 123456789, 5, 11, 2]
HISTORIES = [np.array([3, 5, 9]), np.array([7]), np.arange(12), np.array([1, 1]), np.arange(30, 36), np.array([8, 2, 4, 39])]


@pytest.fixture(scope="module")
def sids() -> SidTable:
    codes = disambiguate(np.random.default_rng(0).integers(0, 4, (40, 2)))
    offsets = np.concatenate([[0], np.cumsum(codes.max(0) + 1)[:-1]])
    return SidTable(1 + offsets + codes, int(1 + (codes.max(0) + 1).sum()))


def far_from_uniform(model: torch.nn.Module) -> Any:
    """So that mistakes show."""
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def an_encoder_decoder(sids: SidTable, reads: Reads) -> Any:
    torch.manual_seed(1)
    return far_from_uniform(t5(sids.vocab, **SIZE, dropout=0.1, **reads.tables(HISTORY)))


def a_decoder(sids: SidTable, reads: Reads) -> Any:
    torch.manual_seed(1)
    return far_from_uniform(decoder_only(sids.vocab, **SIZE, dropout=0.1, **reads.tables(HISTORY + 1)).double())


def test_what_an_encoder_reads(sids: SidTable) -> None:
    """Two items of a user and padding, number by number: places from the newest, a separator behind every item."""
    inputs = SidBatcher(sids, HISTORY, ALL).encoder_inputs([np.array([3, 5]), np.array([8])], [4, 4])
    width, separator = sids.vocab + 10, sids.vocab + 9
    user = int(ALL.user([4], sids.vocab)[0])
    older, newer, other = ([*sids.tokens[item].tolist(), separator] for item in (3, 5, 8))
    expected = [user, *(2 * width + t for t in older), *(width + t for t in newer)]
    assert inputs["input_ids"].tolist() == [expected, [user, *(width + t for t in other), 0, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 9, [1] * 5 + [0] * 4]
    plain = SidBatcher(sids, HISTORY).encoder_inputs([np.array([3, 5])])
    assert plain["input_ids"].tolist() == [sids.tokens[[3, 5]].reshape(-1).tolist()]


def test_what_a_decoder_reads(sids: SidTable) -> None:
    """The same two items as a prompt: places from the oldest, and the item to come has the third."""
    (prompt,), shift = SidSequences(sids, HISTORY, ALL).prompts([4], [np.array([3, 5])])
    width, separator = sids.vocab + 10, sids.vocab + 9
    older, newer = ([*sids.tokens[item].tolist(), separator] for item in (3, 5))
    expected = [0, int(ALL.user([4], sids.vocab)[0]), *(width + t for t in older), *(2 * width + t for t in newer)]
    assert prompt.tolist() == expected and shift.tolist() == [3 * width]


def test_users_are_hashed_alike_everywhere() -> None:
    """Written down: another process, machine or version must give a user the token that was trained."""
    assert Reads(user_tokens=2000).user([0, 1, 2, 10**9], 100).tolist() == [1885, 319, 778, 1580]
    tokens = Reads(user_tokens=50).user(np.arange(20_000), 100) - 100
    counts = np.bincount(tokens, minlength=50)
    assert len(counts) == 50 and counts.min() > 300 and counts.max() < 500, "400 each, of a standard deviation of 20"


@given(st.integers(0, 9), st.booleans(), st.booleans(), st.integers(1, 50), st.integers(0, 20), st.data())
def test_the_number_of_a_token_tells_token_and_place(
    users: int, separator: bool, place: bool, vocab: int, at: int, data: Any
) -> None:
    reads = Reads(users, separator, place)
    token = data.draw(st.integers(0, vocab + reads.more - 1))
    number = token + int(reads.at(at, vocab))
    assert (number % (vocab + reads.more), number // (vocab + reads.more)) == (token, at if place else 0)


def test_a_vector_is_the_tokens_and_its_places(sids: SidTable) -> None:
    table = an_encoder_decoder(sids, ALL).encoder.embed_tokens
    whole = torch.cat([table.weight, table.more.weight])
    places = torch.cat([torch.zeros(1, whole.shape[1]), table.place.weight])
    tokens, at = torch.randint(0, len(whole), (4, 50)), torch.randint(0, len(places), (4, 50))
    assert torch.equal(table(tokens + len(whole) * at), whole[tokens] + places[at])


@pytest.mark.parametrize("reads", EACH)
@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_one_pass_over_all_targets_is_a_pass_per_prefix(sids: SidTable, reads: Reads, normalize: Normalize) -> None:
    sequences = SidSequences(sids, HISTORY, reads)
    trie, items = TitleTrie(sequences.titles, normalize), np.array([3, 17, 5, 39, 8, 20, 11])
    model = NextTitle(a_decoder(sids, reads), trie.trie if normalize == "catalogue" else None)
    (packed,) = sequences.training([5], [items])
    whole = batch([packed], 0, trie)
    alone = [batch([sequences.target(5, items[:n], int(items[n]))], 0, trie) for n in range(1, len(items))]
    last = batch(sequences.training([5], [items], last=True), 0, trie)
    with torch.no_grad():
        together = model.token_nll(**whole.inputs)
        each = [model.token_nll(**b.inputs) for b in alone]
        of_last = model.token_nll(**last.inputs)
    assert whole.target_tokens == (len(items) - 1) * sids.tokens.shape[1] and last.target_tokens == sids.tokens.shape[1]
    torch.testing.assert_close(together, torch.cat(each), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_last, each[-1], rtol=0, atol=1e-12)


def test_a_long_history_is_cut_into_windows_that_have_every_target_once(sids: SidTable) -> None:
    """Each begins with place 1 and the user's token, and none is longer than the model has places for."""
    items = np.random.default_rng(2).integers(0, 40, 50)
    sequences = SidSequences(sids, HISTORY, ALL)
    packed, digits, width = sequences.training([5], [items]), sids.tokens.shape[1], sids.vocab + ALL.more
    assert len(packed) > 5
    assert np.concatenate([p.targets.reshape(-1, digits) for p in packed][::-1]).tolist() == sids.tokens[items[1:]].tolist()
    for p in packed:
        assert p.tokens[:2].tolist() == [0, ALL.user([5], sids.vocab)[0]] and len(p.tokens) <= sequences.longest
        places = p.tokens[2:] // width
        assert places.tolist() == sorted(places) and (places[0], places[-1]) == (1, -(-len(places) // (digits + 1)))
        assert places.max() <= HISTORY + 1


@given(st.lists(st.integers(0, 20), max_size=8), st.sampled_from(EACH), st.randoms(use_true_random=False))
def test_sequences_of_many_users_are_those_of_each(sids: SidTable, sizes: list[int], reads: Reads, random: Random) -> None:
    sequences, users = SidSequences(sids, HISTORY, reads), [random.randrange(100) for _ in sizes]
    histories = [np.array([random.randrange(40) for _ in range(n)], dtype=np.int64) for n in sizes]
    together = sequences.training(users, histories)
    each = [p for user, items in zip(users, histories, strict=True) for p in sequences.training([user], [items])]
    assert [[a.tolist() for a in vars(p).values()] for p in together] == [[a.tolist() for a in vars(p).values()] for p in each]


def by_t5(sids: SidTable, reads: Reads, normalize: Normalize) -> Callable[..., tuple[Any, Any]]:
    trie = TitleTrie(SidSequences(sids, HISTORY).titles, normalize)
    weights, batcher = T5Weights(an_encoder_decoder(sids, reads), trie), SidBatcher(sids, HISTORY, reads)
    return lambda users, histories, beams: rank_sids(weights, batcher.encoder_inputs(histories, users), beams)[:2]


def by_decoder(sids: SidTable, reads: Reads, normalize: Normalize) -> Callable[..., tuple[Any, Any]]:
    lm, sequences = a_decoder(sids, reads), SidSequences(sids, HISTORY, reads)
    trie = TitleTrie(sequences.titles, normalize)

    def rank(users: list[int], histories: list[Any], beams: int) -> tuple[Any, Any]:
        some, shift = sequences.prompts(users, histories)
        return rank_titles(lm, trie, some, beams, shift=shift)[:2]

    return rank


def scored_by_t5(sids: SidTable, reads: Reads, normalize: Normalize) -> Callable[[int, Any], np.ndarray]:
    model, batcher, loss = an_encoder_decoder(sids, reads), SidBatcher(sids, HISTORY, reads), SidLoss(sids, normalize)

    def score(user: int, history: Any) -> np.ndarray:
        one = batcher.encoder_inputs([history], [user])
        return np.array([-loss(model, one | {"labels": batcher.labels([item])}).item() for item in range(40)])

    return score


def scored_by_decoder(sids: SidTable, reads: Reads, normalize: Normalize) -> Callable[[int, Any], np.ndarray]:
    sequences = SidSequences(sids, HISTORY, reads)
    trie = TitleTrie(sequences.titles, normalize)
    model = NextTitle(a_decoder(sids, reads), trie.trie if normalize == "catalogue" else None)

    def score(user: int, history: Any) -> np.ndarray:
        rows = [batch([sequences.target(user, history, item)], 0, trie) for item in range(40)]
        return np.array([-model(**b.inputs).item() for b in rows])

    return score


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@pytest.mark.parametrize(("rank", "scored"), [(by_t5, scored_by_t5), (by_decoder, scored_by_decoder)])
@torch.no_grad()
def test_every_item_is_ranked_by_its_own_log_probability(sids: SidTable, rank: Any, scored: Any, normalize: Normalize) -> None:
    ranked, scores = rank(sids, ALL, normalize)(USERS[:3], HISTORIES[:3], 40)
    score = scored(sids, ALL, normalize)
    for user, history, found, own in zip(USERS[:3], HISTORIES[:3], ranked, scores, strict=True):
        assert sorted(found.tolist()) == list(range(40))
        assert own == pytest.approx(score(user, history)[found], abs=2e-4)
    assert score(0, HISTORIES[0]) != pytest.approx(score(7, HISTORIES[0]), abs=1e-2), "users have tokens of their own"


@pytest.mark.parametrize("reads", EACH)
@pytest.mark.parametrize("rank", [by_t5, by_decoder])
def test_users_are_ranked_alike_alone_and_among_others(sids: SidTable, rank: Any, reads: Reads) -> None:
    random = np.random.default_rng(3)
    histories = [random.integers(0, 40, n) for n in random.permutation(np.arange(1, 21))]
    users = random.permutation(1000)[:20].tolist()
    ranker = rank(sids, reads, "catalogue")
    together, scores = ranker(users, histories, 5)
    for user, history, found, score in zip(users, histories, together, scores, strict=True):
        alone, own = ranker([user], [history], 5)
        assert found.tolist() == alone[0].tolist()
        assert score == pytest.approx(own[0], abs=1e-3)


@torch.no_grad()
def test_users_that_ended_take_their_places_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the items are told by their first digit; the others' users go on without those who got one of them."""
    codes = np.array(
        [[1 + item, 40, 42] for item in range(20)] + [[30 + item // 5, 40 + item % 2, 42 + item % 5] for item in range(20)]
    )
    sids, kept = SidTable(codes, 47), []

    class Watched(TitleStepper):
        def _keep(self, rows: Tensor) -> None:
            super()._keep(rows)
            kept.append(len(rows))

    monkeypatch.setattr("gr.llm.decode.TitleStepper", Watched)
    random = np.random.default_rng(3)
    users, histories = list(range(40)), [random.integers(0, 40, n) for n in random.integers(1, 7, 40)]
    ranker = by_decoder(sids, ALL, "catalogue")
    together, scores = ranker(users, histories, 1)
    assert kept, "this test is to see users dropped"
    for user, history, found, score in zip(users, histories, together, scores, strict=True):
        alone, own = ranker([user], [history], 1)
        assert found.tolist() == alone[0].tolist() and score == pytest.approx(own[0], abs=1e-6)


@pytest.mark.parametrize("reads", EACH)
def test_saved_models_come_back_exactly_with_all_that_they_read(sids: SidTable, reads: Reads, tmp_path: Path) -> None:
    numbers = torch.randint(0, sids.vocab + reads.more, (3, 8)) + torch.tensor(reads.at(np.arange(8) // 2, sids.vocab))
    told = {"attention_mask": torch.ones_like(numbers), "decoder_input_ids": torch.zeros(3, 2, dtype=torch.int64)}
    for name, model, load, more in (
        ("t5", an_encoder_decoder(sids, reads), load_t5, told),
        ("decoder", a_decoder(sids, reads).float(), load_decoder_only, {}),
    ):
        model.save_pretrained(tmp_path / name)
        again = load(tmp_path / name).eval()
        assert [p.name for p in (tmp_path / name).glob("*.safetensors")] == ["model.safetensors"]
        assert torch.equal(again(input_ids=numbers, **more).logits, model(input_ids=numbers, **more).logits)


def test_what_is_read_counts_as_embedding_and_costs_no_logits(sids: SidTable) -> None:
    for build, places in ((t5, HISTORY), (decoder_only, HISTORY + 1)):
        plain = build(sids.vocab, **SIZE, dropout=0.0)
        model = build(sids.vocab, **SIZE, dropout=0.0, **ALL.tables(places))
        (total, inner), (before, inner_before) = count_parameters(model), count_parameters(plain)
        assert total - before == (9 + 1 + places) * 16 and inner == inner_before
        assert model.get_output_embeddings().weight.shape[0] == sids.vocab
    assert count(model).blocks == count(plain).blocks and count(model).head == count(plain).head


def test_flops_are_those_that_torch_counts(sids: SidTable) -> None:
    """One user whose history is read with all options: a token of its own, three of digits and a separator for each item."""
    encoder_decoder = an_encoder_decoder(sids, ALL)
    encoder_decoder.set_attn_implementation("eager")
    inputs = SidBatcher(sids, HISTORY, ALL).encoder_inputs([np.arange(5)], [3])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder_decoder(**inputs, decoder_input_ids=torch.ones(1, 3, dtype=torch.int64))
    masked = 2 * 4 * 24 * (3 * 3 - 3 * 4 / 2)  # of the decoder's pairs, which it computes and then hides
    assert inputs["attention_mask"].sum() == 1 + 5 * 4
    assert t5_flops(encoder_decoder.config, np.array([21]), digits=3) + masked == counter.get_total_flops()

    lm = a_decoder(sids, ALL)
    lm.set_attn_implementation("eager")
    (packed,) = SidSequences(sids, HISTORY, ALL).training([3], [np.arange(5)])
    tokens = torch.from_numpy(packed.tokens)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        lm(input_ids=tokens)
    n = 2 + 5 * 4 - 2  # the last digit and separator predict nothing
    assert tokens.shape[1] == n
    norms = sum(p.numel() for name, p in lm.named_parameters() if "norm" in name)  # in the formula as if they were matrices
    assert forward_flops(count(lm), n, n, n * n) - 2 * norms * n == counter.get_total_flops()


def test_training_in_groups_of_like_length_reads_the_same(sids: SidTable) -> None:
    model, batcher = an_encoder_decoder(sids, ALL), SidBatcher(sids, HISTORY, ALL)
    inputs = batcher.encoder_inputs(HISTORIES * 3, USERS * 3) | {"decoder_input_ids": batcher.labels(range(18))}
    with torch.no_grad():
        torch.testing.assert_close(GroupedT5(model)(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-4)


def test_gradients_reach_every_table(sids: SidTable) -> None:
    model, batcher = an_encoder_decoder(sids, ALL), SidBatcher(sids, HISTORY, ALL)
    inputs = batcher.encoder_inputs(HISTORIES, USERS) | {"labels": batcher.labels([1, 2, 3, 4, 5, 6])}
    SidLoss(sids, "catalogue")(model, inputs).backward()
    table = model.encoder.embed_tokens

    def touched(gradient: Tensor | None) -> list[int]:
        assert gradient is not None
        return gradient.abs().sum(1).nonzero()[:, 0].tolist()

    assert touched(table.more.weight.grad) == [*sorted(set((ALL.user(USERS, 0)).tolist())), 9]
    assert touched(table.place.weight.grad) == list(range(HISTORY))
