"""The backbone, its losses, LoRA and the decoder, against brute force on a tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from gr.beam import beam_search
from gr.errors import UserError
from gr.llm.backbone import NextTitle, count, forward_flops, fresh_backbone, load_backbone, train_flops
from gr.llm.decode import TitleStepper, rank_titles
from gr.llm.lora import add_lora, count_lora, merged, per_rank, save_adapter
from gr.llm.sequences import batch, micro_batches, target_sequence, training_sequences
from gr.llm.sequences import prompts as make_prompts
from gr.llm.titles import Titles, TitleTrie
from gr.llm.tokenizer import Frame, frame_of
from gr.terms import Normalize
from gr.text import train_tokenizer
from tests.gr.test_llm_titles import catalogue

NAMES = [f"{a} {b}{c}" for a in ("Acme", "Zenith", "Zen") for b in ("lamp", "chair", "lamp shade") for c in ("", " red", " 2")]
HISTORIES = [np.array([0, 5, 9, 3, 20, 11, 26]), np.array([4, 4]), np.array([13, 2, 1])]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(NAMES, 290)


@pytest.fixture(scope="module")
def titles(tokenizer: Any) -> Titles:
    return Titles.build(catalogue(NAMES), tokenizer, frame_of(tokenizer))


@pytest.fixture
def lm(tokenizer: Any) -> Any:
    torch.manual_seed(1)
    model = fresh_backbone(len(tokenizer), layers=2, d_model=32, heads=4, d_ff=48, kv_heads=2).double().eval()
    for parameter in model.parameters():  # far from uniform, so that mistakes show
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def brute_force(lm: Any, trie: TitleTrie, titles: Titles, prompt: np.ndarray) -> np.ndarray:
    """Log-probability of every title after ``prompt``, by whole forward passes without cache, padding or batch."""
    scores = []
    for number, sequence in enumerate(titles.sequences()):
        ids = torch.tensor([[*prompt.tolist(), *sequence]])
        logits = lm(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        total = 0.0
        for place, token in enumerate(sequence):
            row = logits[place]
            if trie.normalize == "catalogue":
                node = trie.node[titles.offsets[number] + place]
                edges = slice(*trie.trie.first_edge[node : node + 2].tolist())
                total += (row[token] - row[trie.trie.edge_token[edges]].logsumexp(0)).item()
            else:
                total += row.log_softmax(0)[token].item()
        scores.append(total)
    return np.array(scores)


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_packed_pass_equals_training_example_by_example(lm: Any, titles: Titles, normalize: Normalize) -> None:
    trie = TitleTrie(titles, normalize)
    model = NextTitle(lm, trie.trie if normalize == "catalogue" else None)
    together = batch(training_sequences(titles, HISTORIES, 20, 10**4), titles.frame.pad, trie)
    packed = model.token_nll(**together.inputs).tolist()
    one_by_one: list[float] = []
    for history in HISTORIES:
        for place in range(1, len(history)):
            example = target_sequence(titles, history[:place], history[place], 20, 10**4)
            one_by_one += model.token_nll(**batch([example], titles.frame.pad, trie).inputs).tolist()
            exact = brute_force(lm, trie, titles, example.tokens[: example.context])[titles.of_item[history[place]]]
            chosen = trie.branches[example.places].sum() if normalize == "catalogue" else len(example.places)
            assert -sum(one_by_one[-int(chosen) :]) == pytest.approx(exact, abs=1e-6)
    assert packed == pytest.approx(one_by_one, abs=1e-6)


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_decoding_equals_brute_force_whatever_the_batch(lm: Any, titles: Titles, normalize: Normalize) -> None:
    trie = TitleTrie(titles, normalize)
    some = make_prompts(titles, HISTORIES, 20, 10**4)
    everything = titles.counts["distinct_titles"]
    ranked, scores, flops = rank_titles(lm, trie, some, everything + 3)
    assert flops > 0
    for row, prompt in enumerate(some):
        exact = brute_force(lm, trie, titles, prompt)
        assert ranked[row].tolist() == [*np.argsort(-exact), -1, -1, -1]
        assert scores[row, :everything] == pytest.approx(np.sort(exact)[::-1], abs=1e-6)
        if normalize == "catalogue":
            assert np.exp(exact).sum() == pytest.approx(1), "a distribution over the titles"
    narrow, narrow_scores, _ = rank_titles(lm, trie, some, 4)
    for row, prompt in enumerate(some):
        alone, alone_scores, _ = rank_titles(lm, trie, [prompt], 4)
        assert narrow[row].tolist() == alone[0].tolist()
        assert narrow_scores[row] == pytest.approx(alone_scores[0], abs=1e-6)
        assert narrow_scores[row] == pytest.approx(brute_force(lm, trie, titles, prompt)[narrow[row]], abs=1e-6)


@torch.no_grad()
def test_users_and_beams_that_ended_are_dropped_and_the_rest_unharmed(lm: Any) -> None:
    """One user's best titles are short and certain, another's long: the short one leaves the cache first."""
    names = ["a", "b", "c " * 12 + "x", "c " * 12 + "y", "c " * 12 + "z"]
    tokenizer = train_tokenizer(names, 262)
    titles = Titles.build(catalogue(names), tokenizer, frame_of(tokenizer))
    trie = TitleTrie(titles, "vocabulary")
    some = make_prompts(titles, [np.array([0, 1]), np.array([2, 3, 4]), np.array([1]), np.array([0, 4])], 20, 10**4)
    kept: list[int] = []

    class Watched(TitleStepper):
        def _keep(self, rows: torch.Tensor) -> None:
            super()._keep(rows)
            kept.append(len(rows))

    for beams in (1, 2, 3):
        ranked, scores = beam_search(Watched(lm, some, trie.search), trie.search, beams)
        for row, prompt in enumerate(some):
            alone, alone_scores, _ = rank_titles(lm, trie, [prompt], beams)
            assert ranked[row].tolist() == alone[0].tolist()
            assert scores[row].tolist() == pytest.approx(alone_scores[0].tolist(), abs=1e-6)
            assert alone_scores[0] == pytest.approx(brute_force(lm, trie, titles, prompt)[alone[0]], abs=1e-6)
    assert kept, "this test is to see users dropped"


def test_micro_batches_hold_every_sequence_once_within_the_limit(titles: Titles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gr.llm.sequences.TOKENS_AT_ONCE", 60)
    trie = TitleTrie(titles, "vocabulary")
    packed = training_sequences(titles, HISTORIES * 5, 3, 60)
    batches = micro_batches(packed, titles.frame.pad, trie, 290)
    assert sum(b.input_ids.shape[0] for b in batches) == len(packed)
    assert sum(b.target_tokens for b in batches) == sum(len(p.places) for p in packed)
    assert all(b.input_ids.numel() <= 60 for b in batches) and len(batches) > 1


def test_counts_and_flops_by_hand() -> None:
    lm = fresh_backbone(100, layers=2, d_model=8, heads=2, d_ff=12)
    counts = count(lm)
    block = 4 * 8 * 8 + 3 * 8 * 12 + 2 * 8 + 2 * 4  # projections, SwiGLU, two norms, QK-norms
    assert (counts.total, counts.blocks, counts.head, counts.width) == (100 * 8 + 2 * block + 8, 2 * block + 8, 800, 16)
    assert forward_flops(counts, 5, 3, 15) == 2 * 5 * counts.blocks + 2 * 3 * 800 + 4 * 15 * 16
    assert train_flops(counts, 5, 3, 15) == 3 * forward_flops(counts, 5, 3, 15)
    assert train_flops(counts, 5, 3, 15, 7) == 4 * 5 * counts.blocks + 4 * 3 * 800 + 12 * 15 * 16 + 6 * 7 * 5
    tuned = add_lora(lm, rank=3)
    assert count(tuned) == counts and count_lora(tuned) == 3 * 2 * (4 * 16 + 3 * 20)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match="d_model 30, heads 4"):
        fresh_backbone(100, layers=1, d_model=30, heads=4, d_ff=8)
    with pytest.raises(UserError, match="heads 4, kv_heads 3"):
        fresh_backbone(100, layers=1, d_model=32, heads=4, d_ff=8, kv_heads=3)


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_lora_share_gives_the_nearest_rank(share: float) -> None:
    lm = fresh_backbone(300, layers=2, d_model=32, heads=2, d_ff=64)
    total, unit = count(lm).total, per_rank(lm)
    tuned = add_lora(lm, share=share)
    rank = tuned.peft_config["default"].r
    assert count_lora(tuned) == rank * unit
    assert all(abs(rank * unit - share * total) <= abs(r * unit - share * total) for r in range(1, 100))
    trainable = {name.split(".")[-4] for name, p in tuned.named_parameters() if p.requires_grad}
    assert trainable <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} | {"self_attn", "mlp"}
    assert all("lora_" in name for name, p in tuned.named_parameters() if p.requires_grad)


def test_adapter_folder_reopens_and_merges_to_the_same_model(tmp_path: Path, tokenizer: Any, titles: Titles) -> None:
    torch.manual_seed(0)
    fresh_backbone(len(tokenizer), layers=2, d_model=32, heads=4, d_ff=48).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, again = load_backbone(tmp_path / "base", 512)
    assert frame_of(again) == titles.frame
    tuned = add_lora(base, rank=64).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.tensor([[1, 5, 9, 200, 7]])
    expected = tuned(input_ids=ids).logits
    save_adapter(tuned, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not torch.allclose(load_backbone(tmp_path / "base", 512)[0](input_ids=ids).logits, expected, atol=1e-3)
    opened = PeftModel.from_pretrained(load_backbone(tmp_path / "base", 512)[0], str(tmp_path / "adapter")).eval()
    assert torch.allclose(opened(input_ids=ids).logits, expected, atol=1e-5)
    whole = merged(load_backbone(tmp_path / "base", 512)[0], tmp_path / "adapter").eval()
    assert torch.allclose(whole(input_ids=ids).logits, expected, atol=1e-4)


def test_a_missing_model_and_a_short_context_are_one_clear_line(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="can't be loaded"):
        load_backbone(tmp_path / "nowhere", 512)
    fresh_backbone(len(tokenizer), layers=1, d_model=8, heads=2, d_ff=8, max_tokens=64).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"max_tokens is 65; .* at most 64"):
        load_backbone(tmp_path / "short", 65)


def test_a_pretrained_tokenizer_ends_titles_with_its_line_break() -> None:
    class Qwen:
        bos_token_id, pad_token_id, eos_token, eos_token_id = None, 3, "<|im_end|>", 4

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert text == "\n" and not add_special_tokens
            return [198]

    assert frame_of(Qwen()) == Frame((), 198, 3)


def test_the_loss_learns_and_its_gradient_is_that_of_its_parts(tokenizer: Any, titles: Titles) -> None:
    trie = TitleTrie(titles, "catalogue")
    torch.manual_seed(0)
    model = NextTitle(add_lora(fresh_backbone(len(tokenizer), layers=2, d_model=32, heads=4, d_ff=48), rank=64), trie.trie)
    packed = training_sequences(titles, HISTORIES, 20, 10**4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = None
    for _ in range(40):
        loss = sum((model(**b.inputs) for b in micro_batches(packed, titles.frame.pad, trie, 290)), torch.zeros(()))
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
