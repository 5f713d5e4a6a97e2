"""How a backbone is run: recomputed activations, implementations of attention, weights of 4 bits; merged weights on request."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoTokenizer

from gr.errors import UserError
from gr.llm.backbone import attend_by, checkpoint_activations, fresh_backbone, load_backbone
from gr.llm.tuning import made_trainable, save_trained
from gr.text import train_tokenizer

LORA = {"rank": 3, "share": None, "alpha_per_rank": 2.0, "dropout": 0.1}
IDS = torch.arange(2 * 64).reshape(2, 64) + 3


def tuned(tune: str, layers: int = 2, d_model: int = 32) -> Any:
    torch.manual_seed(1)
    model = fresh_backbone(280, layers=layers, d_model=d_model, heads=4, d_ff=2 * d_model)
    return made_trainable(model, tune, LORA if tune == "lora" else None).train()


def passed(model: Any, ids: torch.Tensor = IDS) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients, with the dropout of one seed."""
    torch.manual_seed(2)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("tune", ["lora", "full", "head"])
def test_recomputed_activations_give_the_same_loss_and_gradients(tune: str) -> None:
    plain = tuned(tune)
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    loss, gradients = passed(plain)
    other_loss, other_gradients = passed(again)
    assert other_loss == loss and len(gradients) == len(other_gradients)
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def most_bytes(model: Any, ids: torch.Tensor) -> int:
    """The most main memory that a pass, forward and backward, held beside what was there before, as torch allocated it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        passed(model, ids)
    held = most = 0
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_recomputed_activations_take_less_memory() -> None:
    """Kept are a block's input, and one block's activations at a time, rather than those of all eight."""
    plain = tuned("lora", layers=8, d_model=64)
    again = copy.deepcopy(plain)
    checkpoint_activations(again)
    ids = IDS.repeat(4, 4)
    most_bytes(plain, ids)  # the first pass allocates what stays
    assert most_bytes(again, ids) < 0.5 * most_bytes(plain, ids)


@torch.no_grad()
def test_implementations_of_attention_agree() -> None:
    model = tuned("full").eval()
    logits = {}
    for attention in ("sdpa", "eager"):
        attend_by(model, attention, "fp32")
        assert model.config._attn_implementation == attention
        logits[attention] = model(input_ids=IDS).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-5)


def test_what_the_machine_lacks_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("full")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="flash_attention_2 needs a CUDA device, and this machine has none"):
            attend_by(model, "flash_attention_2", "bf16")
        with pytest.raises(UserError, match="load_in_4bit needs a CUDA device, and this machine has none"):
            load_backbone(tmp_path, 64, in_4bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if find_spec("flash_attn") is None:
        with pytest.raises(UserError, match="flash_attention_2 needs the package flash-attn"):
            attend_by(model, "flash_attention_2", "bf16")
    if find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="load_in_4bit needs bitsandbytes, which is not installed"):
            load_backbone(tmp_path, 64, in_4bit=True)


def test_merged_weights_are_a_plain_folder_with_the_same_logits(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a lamp", "a chair", "a red lamp"], 280)
    model = tuned("lora").eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
        expected = model(input_ids=IDS).logits
        save_trained(model, tokenizer, "lora", tmp_path, with_backbone=False, with_merged=True)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(whole(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("a lamp") == tokenizer.encode("a lamp")
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "merged"}
    assert not (tmp_path / "backbone").exists() and not (tmp_path / "tokenizer.json").exists()
