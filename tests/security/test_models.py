"""A model folder from outside is weights and configuration: no pickle of it is read, none of its code run."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gr.errors import UserError
from gr.llm.backbone import fresh_backbone, load_backbone
from gr.sid.encoder import load_encoder

LOADERS = [lambda folder: load_backbone(folder, 32), lambda folder: load_encoder(str(folder))]


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    words = models.WordLevel({"a": 0, "[UNK]": 1, "[PAD]": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]", unk_token="[UNK]")
    fresh_backbone(50, 1, 16, 2, 32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("load", LOADERS)
def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    load(folder)  # whole, as it is
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights are read from safetensors only"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # the file is a trap indeed


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kind", ["strange", "qwen3"])
def test_a_models_own_code_does_not_run(folder: Path, tmp_path: Path, load: Callable[[Path], Any], kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": names}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n")
    try:
        load(folder)  # of a known kind: by transformers' own code
    except UserError as error:
        assert kind == "strange" and "custom code" in str(error)
    assert not (tmp_path / "ran").exists()
