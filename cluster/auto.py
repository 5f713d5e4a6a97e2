"""`launch: auto`: a rung's parameters counted from the real modules, and the launch that fits a device's memory.

The choice is part of a run's identity, so it hangs on the study file alone and never on the machine that plans.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.spec import Llm, LlmRung, Sid, SidRung
from cluster.study import Loaded
from gr.errors import UserError
from gr.llm.backbone import fresh_backbone
from gr.llm.lora import per_rank
from gr.llm.sequences import ON_GPU
from gr.sid.decoder_only import decoder_only
from gr.sid.recommender import t5
from jobs.llm_config import Tuning
from jobs.options import Launch
from jobs.sid_recipes import tables_of
from jobs.sizing import Work, activation_bytes, choose


def launch_of(loaded: Loaded, rung: SidRung | LlmRung) -> Launch:
    """The launch of a rung that says ``auto``; UserError where none can be chosen, or nothing fits."""
    resources, paradigm = loaded.study.resources, "sid" if isinstance(rung, SidRung) else "llm"
    ladder = getattr(loaded.study, paradigm).ladder
    key = (paradigm, "ladder", ladder.index(rung), "launch")
    where = f"{loaded.where(key)}: {paradigm}.ladder[{key[2]}].launch: auto"
    if not resources.gpus_per_process or resources.gpu_memory is None:
        raise UserError(f"{where} needs resources.gpus_per_process and resources.gpu_memory (GB of one GPU) to choose by")
    try:
        work = _sid(loaded.study.sid, rung) if isinstance(rung, SidRung) else _llm(loaded.study.llm, rung)
        return choose(work, device_bytes=resources.gpu_memory * 1e9, devices=resources.gpus_per_machine)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('launch: auto: ')}") from None


def _sid(sid: Sid | None, rung: SidRung) -> Work:
    assert sid is not None
    quantizer = sid.quantizers[rung.quantizer or next(iter(sid.quantizers))]
    vocab, digits = 1 + quantizer.levels * quantizer.width, quantizer.levels + 1
    tokens = (sid.train.user_tokens > 0) + sid.train.max_history * (digits + sid.train.separator) + digits
    sizes = rung.model_dump(include={"layers", "d_model", "heads", "d_kv", "d_ff"})
    alone = sid.train.architecture == "decoder-only"
    with torch.device("meta"):
        model = (decoder_only if alone else t5)(vocab, **sizes, dropout=0.0, **tables_of(sid.train))
    row = activation_bytes(rung.layers * (1 if alone else 2), rung.d_model, rung.heads, tokens, vocab)
    rows = sid.train.optimizer.global_batch
    return _work(model, None, row, rows, ON_GPU.most(vocab) // tokens if alone else rows, tokens)


def _llm(llm: Llm | None, rung: LlmRung) -> Work:
    """Of the fresh backbone's own training, which takes more than the adapter's, or of a pretrained one's adapter."""
    assert llm is not None
    tokens, rows = llm.train.max_tokens, llm.train.optimizer.global_batch
    if rung.model is None:
        assert llm.pretrain is not None and rung.layers and rung.d_model and rung.heads
        sizes = rung.model_dump(include={"layers", "d_model", "heads", "d_ff", "kv_heads"})
        with torch.device("meta"):
            model = fresh_backbone(llm.pretrain.vocab, **sizes)
        row = activation_bytes(rung.layers, rung.d_model, rung.heads, tokens, llm.pretrain.vocab)
        return _work(model, None, row, rows, ON_GPU.most(llm.pretrain.vocab) // tokens, tokens)
    model = _outside(rung.model)
    text = model.config.get_text_config()
    row = activation_bytes(text.num_hidden_layers, text.hidden_size, text.num_attention_heads, tokens, text.vocab_size)
    return _work(model, llm.train, row, rows, ON_GPU.most(text.vocab_size) // tokens, tokens)


def _outside(name: str) -> Any:
    """A hub name's or folder's architecture, without its weights."""
    folder = Path(name).expanduser()
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the sizes of {name!r} can't be read: {' '.join(str(error).split())}") from None


def _work(model: Any, tuning: Tuning | None, row: float, global_batch: int, most_rows: int, tokens: int) -> Work:
    weights = trained = sum(p.numel() for p in model.parameters())
    if tuning and tuning.lora:
        trained = per_rank(model) * tuning.lora.rank if tuning.lora.rank else int(weights * (tuning.lora.share or 0.0))
    elif tuning and tuning.tune == "head":
        trained = model.get_output_embeddings().weight.numel()
    largest = max(p.numel() for p in model.parameters())
    return Work(weights, trained, row, global_batch, largest, max(1, most_rows), tokens)
