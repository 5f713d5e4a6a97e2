"""The T5 stepper against transformers' own forward pass, and whole decoding against scoring the catalogue."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gr.beam import Beams, beam_search, length_groups
from gr.llm.decode import rank_titles
from gr.llm.sequences import prompts
from gr.llm.titles import TitleTrie
from gr.sid import t5_weights
from gr.sid.decode import T5Stepper, rank_sids
from gr.sid.decoder_only import decoder_only, most_tokens, sid_titles
from gr.sid.recommender import SidBatcher, SidLoss, t5, t5_flops
from gr.sid.sids import SidTable, disambiguate
from gr.sid.t5_weights import T5Weights
from gr.terms import Normalize


@pytest.fixture
def sids() -> SidTable:
    codes = disambiguate(np.random.default_rng(0).integers(0, 4, (40, 2)))
    offsets = np.concatenate([[0], np.cumsum(codes.max(0) + 1)[:-1]])
    return SidTable(1 + offsets + codes, int(2 + codes.max(0).sum() + 2))


@pytest.fixture(params=["prefixes looked up", "prefixes run"])
def prefixes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the decoder's first block is looked up, or run, as for more prefixes than a table has room for."""
    looked_up = bool(request.param == "prefixes looked up")
    if not looked_up:
        monkeypatch.setattr(t5_weights, "MOST_OF_PREFIXES", 0)
    return looked_up


@pytest.mark.usefixtures("prefixes")
@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_every_item_is_ranked_by_its_own_log_probability(sids: SidTable, normalize: Normalize) -> None:
    loss = SidLoss(sids, normalize)
    torch.manual_seed(1)
    model = t5(sids.vocab, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=0.1).eval()
    for parameter in model.parameters():  # far from uniform, so that mistakes show
        parameter.data += 0.3 * torch.randn_like(parameter)
    batcher = SidBatcher(sids, max_history=6)
    histories = [np.array([3, 5, 9]), np.array([7]), np.arange(12)]
    inputs = batcher.encoder_inputs(histories)
    leaf, score, _ = rank_sids(T5Weights(model, TitleTrie(sid_titles(sids), normalize)), inputs, beams=40)
    for user, history in enumerate(histories):
        alone = batcher.encoder_inputs([history] * 40)
        with torch.no_grad():
            each = [
                -loss(model, {**{k: v[:1] for k, v in alone.items()}, "labels": batcher.labels([item])}).item()
                for item in range(40)
            ]
        assert sorted(leaf[user].tolist()) == list(range(40))
        assert score[user].tolist() == pytest.approx([each[i] for i in leaf[user].tolist()], abs=2e-4)
        if normalize == "catalogue":
            assert np.exp(score[user]).sum() == pytest.approx(1.0, abs=1e-4), "a distribution over the items"


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_users_are_ranked_alike_alone_and_among_others_of_all_lengths(sids: SidTable, normalize: Normalize) -> None:
    """Twenty users in an order of no length: encoded in groups of like length, and returned in their own order."""
    rng = np.random.default_rng(3)
    histories = [rng.integers(0, 40, n) for n in rng.permutation(np.arange(1, 21))]
    torch.manual_seed(1)
    model = t5(sids.vocab, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=0.0).eval()
    lm = decoder_only(sids.vocab, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=0.0).eval()
    for parameter in [*model.parameters(), *lm.parameters()]:  # far from uniform, so that mistakes show
        parameter.data += 0.3 * torch.randn_like(parameter)
    batcher, titles = SidBatcher(sids, 20), sid_titles(sids)
    assert len(length_groups(torch.arange(20))) > 1

    def by_t5(some: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return rank_sids(T5Weights(model, TitleTrie(titles, normalize)), batcher.encoder_inputs(some), beams=5)[:2]

    def by_decoder(some: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        search = TitleTrie(titles, normalize)
        ranked, scores, _ = rank_titles(lm, search, prompts(titles, some, 20, most_tokens(sids, 20)), beams=5)
        return ranked, scores

    for rank in (by_t5, by_decoder):
        together, scores = rank(histories)
        for user, history in enumerate(histories):
            alone, own = rank([history])
            assert together[user].tolist() == alone[0].tolist()
            assert scores[user] == pytest.approx(own[0], abs=1e-3)


@torch.no_grad()
def test_places_of_beams_that_there_are_not_do_no_harm() -> None:
    """One first digit has three to follow it, the other one: two beams are empty when the later digits are asked for."""
    ends = [(6 + j, 8 + k) for j in range(2) for k in range(2)]
    uneven = SidTable(
        np.array([[first, 3 + i, *end] for first, many in ((1, 1), (2, 3)) for i in range(many) for end in ends]), 10
    )
    torch.manual_seed(1)
    model = t5(uneven.vocab, layers=1, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.0).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    inputs, loss = SidBatcher(uneven, 5).encoder_inputs([np.array([0, 7])]), SidLoss(uneven, "catalogue")
    found, scores, _ = rank_sids(T5Weights(model, TitleTrie(sid_titles(uneven), "catalogue")), inputs, beams=18)
    labels = [SidBatcher(uneven, 5).labels([item]) for item in found[0, :16]]
    assert sorted(found[0].tolist()) == [-1, -1, *range(16)]
    assert scores[0, :16] == pytest.approx([-loss(model, inputs | {"labels": label}).item() for label in labels], abs=1e-4)


@torch.no_grad()
def test_what_is_kept_between_batches_grows_with_their_histories(sids: SidTable) -> None:
    model = t5(sids.vocab, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=0.0).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    batcher, trie = SidBatcher(sids, 20), TitleTrie(sid_titles(sids), "catalogue")
    kept = T5Weights(model, trie)
    for length in (2, 15, 4):
        inputs = batcher.encoder_inputs([np.arange(length)])
        (found, scores, _), (own, fresh, _) = (rank_sids(w, inputs, beams=5) for w in (kept, T5Weights(model, trie)))
        assert found.tolist() == own.tolist() and scores == pytest.approx(fresh)


@torch.no_grad()
def test_norms_and_what_reads_them_are_those_of_the_model_for_vectors_however_short(sids: SidTable) -> None:
    model = t5(sids.vocab, layers=1, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.0).eval()
    layer = model.encoder.block[0].layer[1]
    layer.layer_norm.weight.data.uniform_(0.5, 2.0)
    weights = T5Weights(model, TitleTrie(sid_titles(sids), "catalogue"))
    for size in (1e-4, 1e-3, 1.0, 1e3):
        x = size * torch.randn(5, 16)
        torch.testing.assert_close(weights.norm(x) @ weights.encoder[0].wi, layer.DenseReluDense.wi(layer.layer_norm(x)))


@torch.no_grad()
def test_beams_without_a_choice_left_are_not_run() -> None:
    """Over the catalogue a first digit that one item alone has ends its beam there."""
    alone = SidTable(np.array([[1, 4, 6], [2, 4, 7], [3, 4, 6], [3, 5, 7]]), 8)
    model = t5(alone.vocab, layers=1, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.0).eval()
    trie = TitleTrie(sid_titles(alone), "catalogue")
    weights, inputs = T5Weights(model, trie), SidBatcher(alone, 5).encoder_inputs([np.array([0, 1])])
    ran: list[int] = []

    class Watched(T5Stepper):
        def advance(self, beams: Beams, span: tuple[int, int]) -> torch.Tensor:
            ran.append(int(beams.running.sum()))
            return super().advance(beams, span)

    found, _ = beam_search(Watched(weights, **inputs), trie.search, 4, normalize=True)
    assert ran == [1, 1], "the start, and the one first digit that two items share"
    assert sorted(found[0].tolist()) == [0, 1, 2, 3]


def test_flops_are_those_that_torch_counts() -> None:
    """One user, no padding: the formula against torch's counter of matrix products (which leaves attention's softmax out too)."""
    model = t5(50, layers=2, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.0).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.ones(1, 12, dtype=torch.int64), "decoder_input_ids": torch.ones(1, 4, dtype=torch.int64)}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    # The formula counts a digit's own prefix; teacher forcing computes all pairs of the decoder and masks the later ones.
    masked = 2 * 4 * 16 * (4 * 4 - 4 * 5 / 2)
    assert t5_flops(model.config, np.array([12]), digits=4) + masked == counter.get_total_flops()


def test_flops_of_beam_search_are_those_that_torch_counts(prefixes: bool) -> None:
    """A catalogue wide enough that all beams are in use from the second digit on."""
    codes = disambiguate(np.random.default_rng(0).integers(0, 30, (4000, 3)))
    offsets = np.concatenate([[0], np.cumsum(codes.max(0) + 1)[:-1]])
    sids = SidTable(1 + offsets + codes, int(1 + (codes.max(0) + 1).sum()))
    model = t5(sids.vocab, layers=2, d_model=32, heads=4, d_kv=8, d_ff=64, dropout=0.0).eval()
    model.set_attn_implementation("eager")
    weights = T5Weights(model, TitleTrie(sid_titles(sids), "vocabulary"))
    inputs = SidBatcher(sids, 10).encoder_inputs([np.arange(10)])
    with FlopCounterMode(display=False) as counter:
        _, _, flops = rank_sids(weights, inputs, beams=20)
    # Attention to a beam's own prefix is computed without products of matrices, so torch doesn't count it.
    own = (1 if prefixes else 2) * 4 * 32 * (1 + 20 * (2 + 3 + 4))
    assert flops == counter.get_total_flops() + own


@torch.no_grad()
def test_the_few_beams_that_go_on_attend_to_their_own_histories() -> None:
    """Twenty users of all lengths and few beams: every fourth first digit is shared, by two items."""
    codes = np.array([[1 + i, 31, 33] for i in range(30)] + [[1 + i, 32, 33] for i in range(0, 30, 4)])
    table = SidTable(codes, 34)
    torch.manual_seed(1)
    model = t5(table.vocab, layers=2, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=0.0).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    loss, batcher = SidLoss(table, "catalogue"), SidBatcher(table, 20)
    histories = [np.random.default_rng(n).integers(0, 38, 1 + n) for n in range(20)]
    weights = T5Weights(model, TitleTrie(sid_titles(table), "catalogue"))
    for beams in (1, 2, 3, 5):
        found, scores, _ = rank_sids(weights, batcher.encoder_inputs(histories), beams)
        for history, items, own in zip(histories, found, scores, strict=True):
            alone = batcher.encoder_inputs([history])
            each = [-loss(model, alone | {"labels": batcher.labels([item])}).item() for item in items]
            assert own == pytest.approx(each, abs=2e-4)
