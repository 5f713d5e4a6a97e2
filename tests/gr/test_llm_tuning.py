"""What of a backbone is trained: counted, saved, loaded again; FLOPs as torch counts them; the random control."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gr.llm.backbone import count, fresh_backbone
from gr.llm.tuning import load_trained, made_trainable, randomised, save_trained, trained_facts, tuning_flops
from gr.text import train_tokenizer

TOKENS, VOCAB = 12, 280
LORA = {"rank": 3, "share": None, "alpha_per_rank": 2.0, "dropout": 0.0}


def backbone(tied: bool = True) -> Any:
    torch.manual_seed(1)
    model = fresh_backbone(VOCAB, layers=2, d_model=32, heads=4, d_ff=48)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize(("tune", "trained"), [("full", "all"), ("head", "head"), ("lora", "adapters")])
def test_only_what_is_said_is_trained(tune: str, trained: str) -> None:
    model = backbone()
    counts = count(model)
    lm = made_trainable(model, tune, LORA if tune == "lora" else None)
    facts = trained_facts(lm, tune, counts)
    names = {name for name, p in lm.named_parameters() if p.requires_grad}
    if trained == "all":
        assert facts["n_trained"] == counts.total and facts["n_lora"] == 0
    elif trained == "head":
        assert names == {"model.embed_tokens.weight"} and facts["n_trained"] == VOCAB * 32, "tied: the table that both share"
    else:
        assert all("lora_" in name for name in names) and facts["n_trained"] == facts["n_lora"] > 0


@pytest.mark.parametrize("tune", ["full", "head", "lora"])
def test_what_is_trained_is_fp32_whatever_the_backbone_is(tune: str) -> None:
    lm = made_trainable(backbone().bfloat16(), tune, LORA if tune == "lora" else None)
    assert {p.dtype for p in lm.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tune", ["full", "head"])
def test_flops_are_those_that_torch_counts(tune: str, tied: bool) -> None:
    """One pass over 12 tokens, all of whose logits are computed; attention's causal half is computed whole by torch's maths."""
    model = backbone(tied)
    model.set_attn_implementation("eager")
    counts = count(model)
    lm = made_trainable(model, tune, None)
    ids = torch.arange(TOKENS)[None] + 3
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=ids).logits.square().sum().backward()
    counted = tuning_flops(model, tune, counts, TOKENS, TOKENS, TOKENS * TOKENS, 0)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("tune", "random"), [("full", False), ("head", False), ("lora", False), ("lora", True)])
def test_what_was_trained_comes_back(tmp_path: Path, tune: str, random: bool) -> None:
    tokenizer = train_tokenizer(["a lamp", "a chair", "a red lamp"], VOCAB)
    backbone().save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    model = backbone()
    if random:
        torch.manual_seed(7)
        model = randomised(model)
    lm = made_trainable(model, tune, LORA if tune == "lora" else None).eval()
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
        ids = torch.arange(9)[None] + 3
        before = lm(input_ids=ids).logits
        save_trained(lm, tokenizer, tune, tmp_path / "trained", with_backbone=random)
        loaded, words = load_trained(str(tmp_path / "backbone"), tmp_path / "trained", tune, 64)
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert words.encode("a lamp") == tokenizer.encode("a lamp")


def test_random_weights_are_of_the_same_architecture_and_by_seed() -> None:
    model = backbone()
    first, second, other = (torch.manual_seed(seed) and randomised(model) for seed in (3, 3, 4))
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (model, first)]
    assert shapes[0] == shapes[1]
    table = [m.get_input_embeddings().weight for m in (model, first, second, other)]
    assert torch.equal(table[1], table[2])
    assert not torch.equal(table[0], table[1]) and not torch.equal(table[1], table[3])
