"""What a history shows of items beside their titles: attributes, semantic IDs as new tokens, a prompt; cut by tokens."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from gr.errors import UserError
from gr.llm.backbone import NextTitle, count, fresh_backbone
from gr.llm.decode import rank_titles
from gr.llm.sequences import batch, check_fits, prompts, target_sequence, training_sequences
from gr.llm.shown import generated_sids, grow, shown_items, sids_of
from gr.llm.titles import Titles, TitleTrie
from gr.llm.tokenizer import frame_of
from gr.llm.tuning import load_trained, made_trainable, randomised, save_trained, trained_facts, tuning_flops
from gr.sid.sids import SidTable
from gr.terms import Normalize
from gr.text import train_tokenizer
from tests.gr.test_llm_model import NAMES
from tests.gr.test_llm_titles import catalogue

CODES = np.stack([np.arange(27) // 9, np.arange(27) % 3, np.arange(27) // 3 % 3], axis=1)
HISTORIES = [np.array([0, 5, 9, 3, 17, 11, 6]), np.array([4, 4]), np.array([13, 2, 1])]
TEMPLATES = ["{title}", "{title} ({attributes})", "{title}, {key}: {attributes}"]
LORA = {"rank": 3, "share": None, "alpha_per_rank": 2.0, "dropout": 0.0}


def table() -> SidTable:
    """Two levels of three codes and an extra digit of three; tokens as `SidTable.read` numbers them."""
    return SidTable(1 + np.array([0, 3, 6]) + CODES, 10)


def items() -> Any:
    return catalogue(NAMES, [[f"brand {i % 4}"] if i % 5 else [] for i in range(len(NAMES))])


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(NAMES, 290)


def made(tokenizer: Any, kind: str, template: str = "{title}", prompt: str = "") -> tuple[Titles, Titles, list[int]]:
    sids = None if kind == "titles" else sids_of(tokenizer, table())
    tokens = [] if sids is None else np.unique(sids.tokens).tolist()
    frame = frame_of(tokenizer, prompt)
    if kind == "sids":
        assert sids is not None
        found = generated_sids(sids, frame)
        return found, found, tokens
    titles = Titles.build(items(), tokenizer, frame)
    return titles, shown_items(titles, items(), tokenizer, template, sids), tokens


def model_for(tokenizer: Any, tokens: list[int], tied: bool = True) -> Any:
    torch.manual_seed(1)
    lm = fresh_backbone(290, layers=2, d_model=32, heads=4, d_ff=48, kv_heads=2).double().eval()
    if not tied:
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach().flip(1))
    for parameter in lm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    grow(lm, tokenizer, tokens)
    return lm


def said(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(tokens)).replace("<end>", "|")


def test_a_history_reads_as_the_template_says(tokenizer: Any) -> None:
    history = np.array([5, 1])
    for kind, template, words in (
        ("titles", "{title} ({attributes})", " Acme chair 2 ()| Acme lamp red (brand 1)|"),
        ("titles", "{title} [{key}]", " Acme chair 2 [k5]| Acme lamp red [k1]|"),
        ("both", "{title}", " Acme chair 2<a_0><b_2><c_1>| Acme lamp red<a_0><b_1><c_0>|"),
        ("both", "{title} ({attributes})", " Acme chair 2 ()<a_0><b_2><c_1>| Acme lamp red (brand 1)<a_0><b_1><c_0>|"),
        ("sids", "{title}", "<a_0><b_2><c_1><a_0><b_1><c_0>"),
    ):
        titles, shown, _ = made(tokenizer, kind, template, "Bought before:\n")
        (prompt,) = prompts(titles, [history], 20, 10**4, shown)
        assert said(tokenizer, prompt) == "<bos> Bought before:\n" + words
        example = target_sequence(titles, history, 7, 20, 10**4, shown)
        assert example.tokens[: example.context].tolist() == prompt.tolist()
        target = titles.tokens[titles.offsets[titles.of_item[7]] : titles.offsets[titles.of_item[7] + 1]]
        assert example.targets.tolist() == target.tolist(), "generated is the title or the SID, whatever is shown"


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@pytest.mark.parametrize(
    ("kind", "template"), [*[("titles", t) for t in TEMPLATES[1:]], ("both", TEMPLATES[1]), ("sids", "{title}")]
)
@torch.no_grad()
def test_one_pass_gives_every_target_the_probability_that_it_has_alone(
    tokenizer: Any, kind: str, template: str, normalize: Normalize
) -> None:
    titles, shown, tokens = made(tokenizer, kind, template, "Bought before:")
    trie = TitleTrie(titles, normalize)
    model = NextTitle(model_for(tokenizer, tokens), trie.trie if normalize == "catalogue" else None)
    together = batch(training_sequences(titles, HISTORIES, 20, 10**4, shown), titles.frame.pad, trie)
    packed = model.token_nll(**together.inputs).tolist()
    alone: list[float] = []
    for history in HISTORIES:
        for place in range(1, len(history)):
            example = target_sequence(titles, history[:place], history[place], 20, 10**4, shown)
            alone += model.token_nll(**batch([example], titles.frame.pad, trie).inputs).tolist()
    assert packed == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("kind", ["both", "sids"])
@torch.no_grad()
def test_decoding_ranks_by_the_score_that_the_loss_gives(tokenizer: Any, kind: str) -> None:
    titles, shown, tokens = made(tokenizer, kind)
    trie = TitleTrie(titles, "catalogue")
    lm = model_for(tokenizer, tokens)
    model, everything = NextTitle(lm, trie.trie), len(titles.lengths)
    ranked, scores, _ = rank_titles(lm, trie, prompts(titles, HISTORIES, 20, 10**4, shown), everything)
    for user, history in enumerate(HISTORIES):
        nll = [
            sum(model.token_nll(**batch([target_sequence(titles, history, item, 20, 10**4, shown)], 0, trie).inputs).tolist())
            for item in range(len(NAMES))
        ]
        exact = {int(titles.of_item[item]): -value for item, value in enumerate(nll)}
        assert [exact[t] for t in ranked[user]] == pytest.approx(scores[user].tolist(), abs=1e-6)
        assert sorted(ranked[user].tolist()) == sorted(exact)


def test_items_of_one_sid_come_as_in_the_sid_paradigm(tokenizer: Any) -> None:
    """Collisions allowed: the items of a SID one after the other, the most bought first, and counted."""
    codes = np.array([[0, 0], [0, 1], [0, 0], [1, 0]])
    sids = SidTable(1 + np.array([0, 2]) + codes, 5, levels=2, popularity=np.array([1, 0, 3, 0]))
    mine = sids_of(tokenizer, sids)
    titles = generated_sids(mine, frame_of(tokenizer))
    ranked = np.array([[1, 0, 2], [0, -1, -1]])
    assert titles.ranked_items(ranked, 4).tolist() == sids.ranked_items(ranked, 4).tolist() == [[1, 2, 0, 3], [2, 0, -1, -1]]
    assert titles.counts == sids.tie_facts() and titles.counts["items_with_shared_sid"] == 2


def test_sid_tokens_are_new_once_and_by_level(tokenizer: Any) -> None:
    before = len(tokenizer)
    first, second = sids_of(tokenizer, table()), sids_of(tokenizer, table())
    assert len(tokenizer) == before + 9 and np.array_equal(first.tokens, second.tokens)
    assert tokenizer.convert_ids_to_tokens(first.tokens[26].tolist()) == ["<a_2>", "<b_2>", "<c_2>"]
    assert tokenizer("<a_2><b_0>", add_special_tokens=False)["input_ids"] == [before + 2, before + 3]
    assert np.array_equal(first.of_item, table().of_item)


LENGTHS = st.lists(st.integers(0, 26), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 8), st.integers(0, 60))
def test_histories_are_cut_from_the_old_end_between_items(history: list[int], max_history: int, spare: int) -> None:
    """Whatever the limit, a prompt is its beginning and the newest items whole, as many as fit."""
    words = _words()
    titles, shown, _ = made(words, "both", TEMPLATES[1], "Bought:")
    bos, longest = titles.frame.bos, titles.longest
    limit = len(bos) + longest + spare
    (prompt,) = prompts(titles, [np.array(history)], max_history, limit, shown)
    forms = [shown.tokens[shown.offsets[i] : shown.offsets[i + 1]].tolist() for i in history[-max_history:]]
    kept = next(n for n in range(len(forms), -1, -1) if sum(map(len, forms[len(forms) - n :])) <= spare)
    assert prompt.tolist() == [*bos, *chain(*forms[len(forms) - kept :])]
    if limit >= len(bos) + 2 * shown.longest:
        check_fits(titles, shown, limit)
        sequences = training_sequences(titles, [np.array(history)], max_history, limit, shown)
        assert all(len(p.tokens) < limit and p.tokens[: len(bos)].tolist() == list(bos) for p in sequences)
        assert sum(len(p.targets) for p in sequences) == titles.lengths[titles.of_item[history[1:]]].sum()
    else:
        with pytest.raises(UserError, match=rf"max_tokens is {limit}; .* item take {len(bos) + 2 * shown.longest} tokens"):
            check_fits(titles, shown, limit)


def _words() -> Any:
    if not hasattr(_words, "made"):
        _words.made = train_tokenizer(NAMES, 290)  # type: ignore[attr-defined]
    return _words.made  # type: ignore[attr-defined]


def test_long_attributes_are_cut_and_counted_and_braces_in_them_are_text(tokenizer: Any) -> None:
    rows = catalogue(NAMES[:3], [["{key}", "a\nb"], ["long " * 60], []])
    titles = Titles.build(rows, tokenizer, frame_of(tokenizer))
    shown = shown_items(titles, rows, tokenizer, "{title} ({attributes})", None)
    texts = [said(tokenizer, part) for part in np.split(shown.tokens, shown.offsets[1:-1])]
    assert texts[0] == f" {NAMES[0]} ({{key}}, a b)|" and texts[2] == f" {NAMES[2]} ()|"
    assert shown.counts == {"cut_attributes": 1} and len(shown.lengths) == 3
    assert shown.lengths[1] == titles.lengths[titles.of_item[1]] + 48 and re.match(r".*\(long long", texts[1])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_trained_counted_and_saved_with_the_adapters(tmp_path: Path, tokenizer: Any, tied: bool) -> None:
    model_for(tokenizer, [], tied).float().save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    titles, shown, tokens = made(tokenizer, "both")
    lm = model_for(tokenizer, tokens, tied).float()
    base = count(lm)
    rows = len(tokenizer) - 290  # beyond those that the backbone had to spare
    assert 0 < rows < 9
    assert base.total == count(model_for(train_tokenizer(NAMES, 290), [], tied)).total + rows * 32 * (1 if tied else 2)
    tuned = made_trainable(lm, "lora", LORA, tokens)
    facts = trained_facts(tuned, "lora", base)
    assert facts["n_trained"] - facts["n_lora"] == 9 * 32 * (1 if tied else 2)
    trie = TitleTrie(titles, "vocabulary")
    model = NextTitle(tuned)
    one = batch(training_sequences(titles, HISTORIES, 20, 10**4, shown), titles.frame.pad, trie)
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    frozen = {name: p.clone() for name, p in tuned.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(8):
        loss = model(**one.inputs)
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in tuned.named_parameters() if not p.requires_grad)
    tuned.eval()
    with torch.no_grad():
        ids = torch.tensor([[1, 9, *tokens, 40]])
        expected = tuned(input_ids=ids).logits
        save_trained(tuned, tokenizer, "lora", tmp_path / "out", with_backbone=False, with_tokenizer=True, with_merged=True)
        loaded, words = load_trained(str(tmp_path / "backbone"), tmp_path / "out", "lora", 64)
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert words.convert_tokens_to_ids("<b_1>") == tokenizer.convert_tokens_to_ids("<b_1>")
        # What a reader does with peft and transformers alone.
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
        words = AutoTokenizer.from_pretrained(tmp_path / "out")
        plain.resize_token_embeddings(len(words))
        opened = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
        torch.testing.assert_close(opened(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
        torch.testing.assert_close(whole(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").encode("<a_1>") == tokenizer.encode("<a_1>")


def test_a_random_backbone_with_new_tokens_is_saved_as_what_the_adapters_stand_on(tmp_path: Path, tokenizer: Any) -> None:
    _, _, tokens = made(tokenizer, "sids")
    torch.manual_seed(5)
    lm = randomised(model_for(tokenizer, []).float())
    grow(lm, tokenizer, tokens)
    tuned = made_trainable(lm, "lora", LORA, tokens).eval()
    ids = torch.tensor([[1, *tokens]])
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        expected = tuned(input_ids=ids).logits
        save_trained(tuned, tokenizer, "lora", tmp_path / "out", with_backbone=True, with_tokenizer=True, with_merged=True)
        adapted = load_trained("nowhere", tmp_path / "out", "lora", 64)[0]
        whole = load_trained("", tmp_path / "out" / "merged", "full", 64)[0]
        for model in (adapted, whole):
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_flops_with_new_tokens_are_those_that_torch_counts(tokenizer: Any) -> None:
    _, _, tokens = made(tokenizer, "both")
    lm = model_for(tokenizer, tokens).float()
    lm.set_attn_implementation("eager")
    counts = count(lm)
    tuned = made_trainable(lm, "lora", LORA, tokens)
    n_lora = trained_facts(tuned, "lora", counts)["n_lora"]
    ids = torch.arange(12)[None] + 3
    with FlopCounterMode(display=False) as counter:
        tuned(input_ids=ids).logits.square().sum().backward()
    counted = tuning_flops(lm, "lora", counts, 12, 12, 144, n_lora, new_tokens=True)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_new_rows_are_spread_like_the_others_and_by_seed(tokenizer: Any) -> None:
    _, _, tokens = made(tokenizer, "sids")
    rows = [model_for(tokenizer, tokens).get_input_embeddings().weight[tokens] for _ in range(2)]
    assert torch.equal(rows[0], rows[1])
    old = model_for(tokenizer, tokens).get_input_embeddings().weight[: tokens[0]]
    assert 0.6 < (rows[0].std() / old.std()).item() < 1.6
