"""What each stage can be told: one pydantic model per stage, with no torch behind it, so that a plan is checked in a moment.

Everything here changes a stage's result and is part of its identity. Placement (processes, threads, paths) is in `Launch` and
`Run`, and is not, but for the number of processes.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gr.data.planted import World
from gr.data.split import STREAMS
from gr.data.split import LeaveOneOut as LeaveOneOut
from gr.data.split import Protocol as Protocol
from gr.data.split import Temporal as Temporal
from gr.terms import Normalize as Normalize
from gr.terms import SharedTitles as SharedTitles

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0)]
SMALLEST_VOCAB = 256 + 3
"""Of a fresh byte-level tokenizer: every byte, and its three special tokens (`gr.text`)."""
Method = Literal["popularity", "item-knn", "markov", "bayes-optimal"]
Which = Literal["val", "test"]


def _vocab(value: int) -> int:
    if value < SMALLEST_VOCAB:
        raise ValueError(f"{value} is too small; a byte-level vocabulary has at least {SMALLEST_VOCAB} tokens")
    return value


def _processes(value: int) -> int:
    if STREAMS % value:
        dividers = ", ".join(str(n) for n in range(1, STREAMS + 1) if STREAMS % n == 0)
        raise ValueError(f"{value} processes can't share the {STREAMS} streams of the data; one of {dividers}")
    return value


Vocab = Annotated[Positive, AfterValidator(_vocab)]
Processes = Annotated[Positive, AfterValidator(_processes)]


class Config(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimizer(Config):
    """AdamW, linear warm-up, cosine decay to a tenth of ``lr``; the weights kept are those with the least validation loss."""

    steps: Positive
    global_batch: Annotated[int, Field(gt=0, multiple_of=STREAMS)] = 256
    """Training units per step, over all processes: targets for SID-based GR, users for LLM-as-RS, items for text."""
    lr: Annotated[float, Field(gt=0)]
    lr_choice: str = "stated"
    """How ``lr`` was chosen, in words for the report: the one key that is no part of the identity."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    validations: Annotated[int, Field(ge=1)] = 5
    """How often the validation loss is measured, evenly over the run, the last time at its end."""
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: Positive = 1


class PlantConfig(Config):
    world: World = World()


class PrepareConfig(Config):
    protocol: Protocol = LeaveOneOut()


class TransformerSize(Config):
    layers: Positive
    d_model: Positive
    heads: Positive
    d_ff: Positive

    @model_validator(mode="after")
    def _heads_divide(self) -> "TransformerSize":
        if self.d_model % self.heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
        return self


class TrainEncoderConfig(Config):
    """A fresh text encoder, trained on the catalogue's own text (`gr.sid.encoder`)."""

    size: TransformerSize
    vocab: Vocab = 4000
    max_tokens: Positive = 48
    optimizer: Optimizer
    seed: Seed = 0


class EncodeConfig(Config):
    """``model``: a hub name or local path, where the encoder is no stage of the study."""

    model: str | None = None
    max_tokens: Positive = 128
    batch: Positive = 64


class QuantizeConfig(Config):
    method: Literal["residual-kmeans", "rqvae"] = "residual-kmeans"
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    width: Annotated[int, Field(ge=2, le=65536)] = 256
    normalize_residuals: bool = False
    hidden: tuple[Positive, ...] = (256, 128)
    latent: Positive = 64
    beta: Annotated[float, Field(ge=0)] = 0.25
    steps: Positive = 2000
    batch: Positive = 1024
    lr: Annotated[float, Field(gt=0)] = 1e-3
    seed: Seed = 0


class T5Size(Config):
    """The same layers in encoder and decoder; heads x d_kv need not be d_model (paper.md's sizes)."""

    layers: Positive
    d_model: Positive
    heads: Positive
    d_kv: Positive
    d_ff: Positive


class TrainSidConfig(Config):
    size: T5Size
    normalize: Normalize = "catalogue"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_history: Positive = 20
    optimizer: Optimizer
    seed: Seed


class BackboneSize(TransformerSize):
    kv_heads: Positive | None = None


class PretrainLlmConfig(Config):
    """A fresh Qwen3-architecture backbone and its tokenizer, trained on the catalogue's own text."""

    size: BackboneSize
    vocab: Vocab = 4000
    max_tokens: Positive = 256
    normalize: Normalize = "catalogue"
    optimizer: Optimizer
    seed: Seed = 0


class LoraConfig(Config):
    """``share`` of the backbone's counted parameters, or a ``rank``."""

    rank: Positive | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    alpha_per_rank: Annotated[float, Field(gt=0)] = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _one(self) -> "LoraConfig":
        if (self.rank is None) == (self.share is None):
            raise ValueError("lora needs either rank or share")
        return self


class TrainLlmConfig(Config):
    """``model``: a hub name or local path, where the backbone is no stage of the study."""

    model: str | None = None
    lora: LoraConfig
    max_history: Positive = 20
    max_tokens: Positive = 512
    shared_titles: SharedTitles = "expand"
    normalize: Normalize = "catalogue"
    optimizer: Optimizer
    seed: Seed


class EvaluateSidConfig(Config):
    beams: Annotated[int, Field(ge=20)] = 20
    which: Which = "test"
    users: Positive | None = None
    batch: Positive = 128


class EvaluateLlmConfig(EvaluateSidConfig):
    pass


class BaselineConfig(Config):
    method: Method
    which: Which = "test"
    users: Positive | None = None


class Launch(Config):
    """How a stage is started. ``processes`` > 1: `accelerate launch`, one process per device (gloo on CPU)."""

    processes: Processes = 1
    threads: Positive = 1


STAGES: dict[str, type[Config]] = {
    "plant": PlantConfig,
    "prepare": PrepareConfig,
    "train_encoder": TrainEncoderConfig,
    "encode": EncodeConfig,
    "quantize": QuantizeConfig,
    "train_sid": TrainSidConfig,
    "evaluate_sid": EvaluateSidConfig,
    "pretrain_llm": PretrainLlmConfig,
    "train_llm": TrainLlmConfig,
    "evaluate_llm": EvaluateLlmConfig,
    "baseline": BaselineConfig,
}
"""Stage name -> its configuration."""

INTERFACE: dict[str, int] = dict.fromkeys(STAGES, 1)
"""Version of each stage's code interface: raised when its result changes for the same configuration."""

PARALLEL = frozenset({"train_sid", "pretrain_llm", "train_llm"})
"""The stages that several processes can share. Every process of another would do and write the same, and a text encoder contrasts
the items of a whole batch, so that shares of it would be another objective."""

INPUTS: dict[str, dict[str, str]] = {
    "prepare": {"dataset": "plant"},
    "train_encoder": {"split": "prepare"},
    "encode": {"split": "prepare", "encoder": "train_encoder"},
    "quantize": {"embeddings": "encode"},
    "train_sid": {"split": "prepare", "sids": "quantize"},
    "evaluate_sid": {"split": "prepare", "sids": "quantize", "model": "train_sid"},
    "pretrain_llm": {"split": "prepare"},
    "train_llm": {"split": "prepare", "backbone": "pretrain_llm"},
    "evaluate_llm": {"split": "prepare", "backbone": "pretrain_llm", "model": "train_llm"},
    "baseline": {"split": "prepare", "dataset": "plant"},
}
"""Stage -> its inputs, and the stage whose artifact each one is; what no stage made, such as a user's own data set, has none."""


class Run(Config):
    """One run.yaml. Relative paths are relative to its folder."""

    stage: str
    id: str
    out: Path
    work: Path
    inputs: dict[str, Path] = {}
    config: dict[str, Any] = {}
    launch: Launch = Launch()
