"""The decoder-only SID recommender: one pass against one per prefix, decoding against scoring the catalogue, dropout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gr.errors import UserError
from gr.llm.backbone import NextTitle
from gr.llm.decode import rank_titles
from gr.llm.sequences import batch, prompts, target_sequence, training_sequences
from gr.llm.titles import TitleTrie
from gr.sid.decoder_only import decoder_only, load_decoder_only, most_tokens, sid_titles
from gr.sid.sids import SidTable, disambiguate
from gr.terms import Normalize

HISTORY = 6


@pytest.fixture
def sids() -> SidTable:
    codes = disambiguate(np.random.default_rng(0).integers(0, 4, (40, 2)))
    offsets = np.concatenate([[0], np.cumsum(codes.max(0) + 1)[:-1]])
    return SidTable(1 + offsets + codes, int(1 + (codes.max(0) + 1).sum()))


def model_of(sids: SidTable, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(1)
    lm = decoder_only(sids.vocab, layers=2, d_model=16, heads=3, d_kv=8, d_ff=32, dropout=dropout).double().eval()
    for parameter in lm.parameters():  # far from uniform, so that mistakes show
        parameter.data += 0.3 * torch.randn_like(parameter)
    return lm


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_one_pass_over_all_targets_is_a_pass_per_prefix(sids: SidTable, normalize: Normalize) -> None:
    titles, trie, longest = sid_titles(sids), TitleTrie(sid_titles(sids), normalize), most_tokens(sids, HISTORY)
    model = NextTitle(model_of(sids), trie.trie if normalize == "catalogue" else None)
    items = np.array([3, 17, 5, 39, 8, 20, 11])
    (packed,) = training_sequences(titles, [items], HISTORY, longest)
    whole = batch([packed], 0, trie)
    alone = [batch([target_sequence(titles, items[:n], items[n], HISTORY, longest)], 0, trie) for n in range(1, len(items))]
    with torch.no_grad():
        together = model.token_nll(**whole.inputs)
        each = torch.cat([model.token_nll(**b.inputs) for b in alone])
    assert whole.target_tokens == (len(items) - 1) * sids.tokens.shape[1]
    torch.testing.assert_close(together, each, rtol=0, atol=1e-12)


def test_a_long_history_is_cut_into_windows_that_have_every_target_once(sids: SidTable) -> None:
    items = np.random.default_rng(2).integers(0, 40, 50)
    packed = training_sequences(sid_titles(sids), [items], HISTORY, most_tokens(sids, HISTORY))
    digits = sids.tokens.shape[1]
    targets = [p.targets.reshape(-1, digits) for p in packed]
    assert all(len(p.tokens) <= most_tokens(sids, HISTORY) for p in packed)
    assert np.concatenate(targets[::-1]).tolist() == sids.tokens[items[1:]].tolist()


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_every_item_is_ranked_by_its_own_log_probability(sids: SidTable, normalize: Normalize) -> None:
    titles, trie, longest = sid_titles(sids), TitleTrie(sid_titles(sids), normalize), most_tokens(sids, HISTORY)
    lm = model_of(sids)
    model = NextTitle(lm, trie.trie if normalize == "catalogue" else None)
    histories = [np.array([3, 5, 9]), np.array([7]), np.arange(12)]
    ranked, scores, _ = rank_titles(lm, trie, prompts(titles, histories, HISTORY, longest), beams=40)
    for user, history in enumerate(histories):
        rows = [batch([target_sequence(titles, history, item, HISTORY, longest)], 0, trie) for item in range(40)]
        with torch.no_grad():
            each = np.array([-model(**b.inputs).item() for b in rows])
        assert sorted(ranked[user].tolist()) == list(range(40))
        assert scores[user] == pytest.approx(each[ranked[user]], abs=1e-5)
        if normalize == "catalogue":
            assert np.exp(scores[user]).sum() == pytest.approx(1.0, abs=1e-5), "a distribution over the items"


def test_dropout_is_in_training_only_and_saved_models_come_back(sids: SidTable, tmp_path: Path) -> None:
    lm = model_of(sids, dropout=0.5)
    ids = torch.tensor([[0, 1, 6, 10, 2]])
    still = lm(input_ids=ids).logits
    assert torch.equal(still, lm(input_ids=ids).logits)
    lm.train()
    assert not torch.equal(lm(input_ids=ids).logits, lm(input_ids=ids).logits)
    lm.float().save_pretrained(tmp_path)
    torch.testing.assert_close(load_decoder_only(tmp_path)(input_ids=ids).logits, still.float(), rtol=1e-4, atol=1e-4)


def test_a_folder_that_is_no_recommender(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be loaded as a decoder-only SID recommender"):
        load_decoder_only(tmp_path)
