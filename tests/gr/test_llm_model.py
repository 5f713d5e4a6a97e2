"""The backbone, its losses, LoRA and the decoder, against brute force on a tiny model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gr.beam import beam_search
from gr.errors import UserError
from gr.llm.backbone import NextTitle, count, forward_flops, fresh_backbone, load_backbone, train_flops
from gr.llm.decode import TitleStepper, rank_titles
from gr.llm.lora import add_lora, count_lora, merged, per_rank, save_adapter
from gr.llm.sequences import AtOnce, batch, micro_batches, target_sequence, training_sequences
from gr.llm.sequences import prompts as make_prompts
from gr.llm.titles import Titles, TitleTrie
from gr.llm.tokenizer import Frame, frame_of
from gr.terms import Length, Normalize
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


@pytest.mark.parametrize("length", ["sum", "mean"])
@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_decoding_equals_brute_force_whatever_the_batch(lm: Any, titles: Titles, normalize: Normalize, length: Length) -> None:
    trie = TitleTrie(titles, normalize)
    tokens = titles.lengths if length == "mean" else 1
    some = make_prompts(titles, HISTORIES, 20, 10**4)
    everything = titles.counts["distinct_titles"]
    ranked, scores, flops = rank_titles(lm, trie, some, everything + 3, length)
    assert flops > 0
    for row, prompt in enumerate(some):
        sums = brute_force(lm, trie, titles, prompt)
        exact = sums / tokens
        assert ranked[row].tolist() == [*np.argsort(-exact), -1, -1, -1]
        assert scores[row, :everything] == pytest.approx(np.sort(exact)[::-1], abs=1e-6)
        if normalize == "catalogue":
            assert np.exp(sums).sum() == pytest.approx(1), "a distribution over the titles"
    narrow, narrow_scores, _ = rank_titles(lm, trie, some, 4, length)
    for row, prompt in enumerate(some):
        alone, alone_scores, _ = rank_titles(lm, trie, [prompt], 4, length)
        assert narrow[row].tolist() == alone[0].tolist()
        assert narrow_scores[row] == pytest.approx(alone_scores[0], abs=1e-6)
        exact = brute_force(lm, trie, titles, prompt) / tokens
        assert narrow_scores[row] == pytest.approx(exact[narrow[row]], abs=1e-6)


@torch.no_grad()
def test_slots_without_a_living_descendant_leave_the_cache_and_the_scores_unharmed(
    lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{NAMES[i % 18]} {NAMES[(5 * i) % 18]} {i}" for i in range(60)]
    long = Titles.build(catalogue(names), tokenizer, frame_of(tokenizer))
    trie = TitleTrie(long, "vocabulary")
    some = make_prompts(long, [np.array([3, 4]), np.array([50]), np.array([7, 8, 9])], 20, 10**4)
    left: list[tuple[int, int]] = []

    class Watched(TitleStepper):
        def _compacted(self, seen: torch.Tensor) -> torch.Tensor:
            kept = super()._compacted(seen)
            left.append((seen.shape[2], kept.shape[2]))
            assert all(layer.keys.shape[2] == kept.shape[2] for layer in self.cache.layers)
            return kept

    monkeypatch.setattr("gr.llm.decode.TitleStepper", Watched)
    ranked, scores, _ = rank_titles(lm, trie, some, 6)
    assert any(kept < slots for slots, kept in left), "nothing was taken out"
    for row, prompt in enumerate(some):
        assert scores[row] == pytest.approx(brute_force(lm, trie, long, prompt)[ranked[row]], abs=1e-6)


@torch.no_grad()
def test_the_mean_per_token_prefers_long_titles_and_the_sum_short_ones(lm: Any) -> None:
    """Of a model that finds all tokens alike, the sum's best title is the shortest; the mean's is any, as all but tie."""
    names = ["a", "bb", "ccc", "dddd"]
    tokenizer = train_tokenizer(["x"], 259)
    titles = Titles.build(catalogue(names), tokenizer, frame_of(tokenizer))
    lm.get_output_embeddings().weight.data.zero_()
    ranked, scores, _ = rank_titles(lm, TitleTrie(titles, "vocabulary"), [np.array([1, 5])], 4)
    even = -np.log(lm.config.vocab_size)
    assert ranked[0].tolist() == titles.of_item.tolist() and scores[0] == pytest.approx(even * titles.lengths)
    _, means, _ = rank_titles(lm, TitleTrie(titles, "vocabulary"), [np.array([1, 5])], 4, "mean")
    assert means[0] == pytest.approx([even] * 4)


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
        ranked, scores = beam_search(Watched(lm, some), trie.search, beams)
        for row, prompt in enumerate(some):
            alone, alone_scores, _ = rank_titles(lm, trie, [prompt], beams)
            assert ranked[row].tolist() == alone[0].tolist()
            assert scores[row].tolist() == pytest.approx(alone_scores[0].tolist(), abs=1e-6)
            assert alone_scores[0] == pytest.approx(brute_force(lm, trie, titles, prompt)[alone[0]], abs=1e-6)
    assert kept, "this test is to see users dropped"


def test_micro_batches_hold_every_sequence_once_within_the_limit(titles: Titles) -> None:
    trie = TitleTrie(titles, "vocabulary")
    packed = training_sequences(titles, HISTORIES * 5, 3, 60)
    batches = micro_batches(packed, titles.frame.pad, trie, 290, limit=AtOnce(60, 10**9))
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


def in_products(lm: Any, flops: float, tokens: int, masked: int) -> float:
    """A forward pass's counted FLOPs as torch counts matrix products: norms' weights are in none, masked pairs are in some."""
    norms = sum(p.numel() for name, p in lm.named_parameters() if "norm" in name)
    return flops + 4 * count(lm).width * masked - 2 * norms * tokens


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_decoding_flops_are_those_that_torch_counts(lm: Any, titles: Titles, normalize: Normalize) -> None:
    lm.set_attn_implementation("eager")
    trie = TitleTrie(titles, normalize)
    [prompt] = make_prompts(titles, HISTORIES[:1], 20, 10**4)
    tokens, masked = len(prompt), len(prompt) * (len(prompt) - 1) // 2

    class Watched(TitleStepper):
        def _run(self, parents: torch.Tensor, tokens_: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
            nonlocal tokens, masked
            assert real.all(), "with one user no row is filler"
            logp = super()._run(parents, tokens_, real)
            tokens += tokens_.numel()
            masked += int((~self.seen).sum())
            return logp

    stepper = Watched(lm, [prompt])
    with FlopCounterMode(display=False) as counter:
        beam_search(stepper, trie.search, 6, normalize == "catalogue")
    assert in_products(lm, stepper.flops, tokens, masked) == counter.get_total_flops()
    assert rank_titles(lm, trie, [prompt], 6)[2] == stepper.flops


@pytest.mark.parametrize("normalize", ["vocabulary", "catalogue"])
def test_training_flops_are_those_that_torch_counts(tokenizer: Any, titles: Titles, normalize: Normalize) -> None:
    trie = TitleTrie(titles, normalize)
    one = batch(training_sequences(titles, HISTORIES[:1], 20, 10**4), titles.frame.pad, trie)
    tokens, logits, pairs = one.tokens, len(one.targets), one.pairs
    lm = fresh_backbone(len(tokenizer), layers=2, d_model=32, heads=4, d_ff=48, kv_heads=2)
    lm.set_attn_implementation("eager")
    counts, more = count(lm), in_products(lm, 0, tokens, tokens**2 - pairs)
    norms = (in_products(lm, 0, 0, tokens**2 - pairs) - more) / tokens

    def products(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            NextTitle(model, trie.trie if normalize == "catalogue" else None)(**one.inputs).backward()
        return int(counter.get_total_flops())

    assert train_flops(counts, tokens, logits, pairs) + 3 * more == products(lm)
    tuned = add_lora(lm, rank=4)
    # The norms' own gradient is not computed. Nor is, which the formula doesn't know, that of the first layer's input.
    own = lm.model.layers[0].self_attn
    first = sum(p.base_layer.weight.numel() + p.lora_A["default"].weight.numel() for p in (own.q_proj, own.k_proj, own.v_proj))
    expected = train_flops(counts, tokens, logits, pairs, count_lora(tuned)) + 3 * more + norms * tokens - 2 * first * tokens
    assert expected == products(tuned)


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


TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_is_no_whole_causal_lm_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    vocab = {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    bert = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    both_ways = saved(tmp_path / "bert", BertLMHeadModel(BertConfig(**vocab, **bert)), tokenizer)
    with pytest.raises(UserError, match=r"bert' is no causal LM: what it predicts depends on the tokens that follow"):
        load_backbone(both_ways, 100)
    headless = saved(tmp_path / "headless", LlamaModel(LlamaConfig(**vocab, **TINY)), tokenizer)
    with pytest.raises(UserError, match=r"headless' is no whole causal LM: 1 weights are missing, such as lm_head.weight"):
        load_backbone(headless, 100)
    tied = saved(tmp_path / "tied", LlamaModel(LlamaConfig(**vocab, **TINY, tie_word_embeddings=True)), tokenizer)
    model, _ = load_backbone(tied, 100)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = tied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match=r"tied' can't be loaded as a causal LM"):
        load_backbone(tied, 100)


def test_a_sliding_window_limits_the_context_wherever_it_is_used(tmp_path: Path, tokenizer: Any) -> None:
    vocab = {"vocab_size": len(tokenizer)}
    mistral = saved(tmp_path / "mistral", MistralForCausalLM(MistralConfig(**vocab, **TINY, sliding_window=8)), tokenizer)
    with pytest.raises(UserError, match=r"max_tokens is 9; .* at most 8"):
        load_backbone(mistral, 9)
    load_backbone(mistral, 8)
    for name, options in (
        ("off", {"use_sliding_window": False, "sliding_window": 8}),
        ("full", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ):
        config = Qwen2Config(**vocab, **TINY, **options)
        config.sliding_window = 8  # some configurations drop a window that is not used
        load_backbone(saved(tmp_path / name, Qwen2ForCausalLM(config), tokenizer), 512)


def test_lora_share_counts_what_peft_adapts_in_any_architecture() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    total, unit = count(model).total, per_rank(model)
    state = torch.get_rng_state()
    assert per_rank(model) == unit and torch.equal(state, torch.get_rng_state()), "counting draws no random numbers"
    tuned = add_lora(model, share=0.2)
    assert count_lora(tuned) == tuned.peft_config["default"].r * unit
    assert abs(count_lora(tuned) - 0.2 * total) <= unit / 2
    for size in ({"share": 0.2}, {"rank": 2}):
        with pytest.raises(UserError, match="lora: a model of type 'qwen3' has no layer to adapt"):
            add_lora(fresh_backbone(300, layers=0, d_model=32, heads=2, d_ff=64), **size)


def test_adapters_are_merged_in_fp32_and_only_into_their_own_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = fresh_backbone(300, layers=2, d_model=64, heads=4, d_ff=128).bfloat16().eval()
    tuned = add_lora(copy.deepcopy(base).float(), rank=16).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2e-4)  # an adapter's weights after little training
    save_adapter(tuned, tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        without = base.float()(input_ids=ids).logits
        moved = tuned(input_ids=ids).logits - without
        whole = merged(base.bfloat16(), tmp_path).eval()(input_ids=ids).logits
    assert (whole - without - moved).norm() < 0.01 * moved.norm()
    with pytest.raises(UserError, match="can't be loaded as an adapter of this backbone"):
        merged(fresh_backbone(300, layers=2, d_model=32, heads=4, d_ff=128), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="can't be loaded as an adapter of this backbone"):
        merged(fresh_backbone(300, layers=2, d_model=64, heads=4, d_ff=128), tmp_path)


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


@pytest.mark.parametrize(
    ("about", "vocab", "sizes"),
    [
        (30e3, 300, {"layers": 2, "d_model": 32, "heads": 4, "d_ff": 64}),
        (1e9, 32000, {"layers": 16, "d_model": 2048, "heads": 16, "d_ff": 7168, "kv_heads": 8}),
    ],
)
def test_fresh_backbones_span_the_sizes_of_a_ladder(about: float, vocab: int, sizes: dict[str, int]) -> None:
    with torch.device("meta"):
        counts = count(fresh_backbone(vocab, **sizes))
    assert counts.total == pytest.approx(about, rel=0.1)
