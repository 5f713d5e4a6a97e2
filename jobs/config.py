"""What each stage can be told: one pydantic model per stage, with no torch behind it, so that a plan is checked in a moment.

Everything here changes a stage's result and is part of its identity, but for the paths of `Run` and the threads of `Launch`.
"""

from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from gr.data.planted import World
from gr.data.split import STREAMS
from gr.data.split import LeaveOneOut as LeaveOneOut
from gr.data.split import Protocol as Protocol
from gr.data.split import Temporal as Temporal
from gr.terms import Codebooks, Collisions, Gradient
from gr.terms import Length as Length
from gr.terms import Normalize as Normalize
from gr.terms import Pooling as Pooling
from gr.terms import SharedTitles as SharedTitles

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0)]
SMALLEST_VOCAB = 256 + 3
"""Of a fresh byte-level tokenizer: every byte, and its three special tokens (`gr.text`)."""
TEMPLATE_FIELDS = ("text", "title", "attributes", "key")
HISTORY_FIELDS = ("title", "attributes", "key")
Method = Literal["popularity", "item-knn", "markov", "bayes-optimal"]
Which = Literal["val", "test"]
Architecture = Literal["encoder-decoder", "decoder-only"]


def _vocab(value: int) -> int:
    if value < SMALLEST_VOCAB:
        raise ValueError(f"{value} is too small; a byte-level vocabulary has at least {SMALLEST_VOCAB} tokens")
    return value


def _processes(value: int) -> int:
    if STREAMS % value:
        dividers = ", ".join(str(n) for n in range(1, STREAMS + 1) if STREAMS % n == 0)
        raise ValueError(f"{value} processes can't share the {STREAMS} streams of the data; one of {dividers}")
    return value


def _template(value: str, known: tuple[str, ...] = TEMPLATE_FIELDS) -> str:
    try:
        fields = [(name, spec, change) for _, name, spec, change in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"{value!r}: {error}; a brace that is meant as one is written twice") from None
    wrong = [f"{{{name}}}" for name, spec, change in fields if name not in known or spec or change]
    if wrong or not fields:
        words = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"{value!r} has {wrong[0] if wrong else 'nothing of the item'}; an item has {words}")
    return value


def _history_template(value: str) -> str:
    _template(value, HISTORY_FIELDS)
    if not value.startswith("{title}"):
        raise ValueError(f"{value!r} does not begin with {{title}}: an item begins with what is generated of it")
    return value


Vocab = Annotated[Positive, AfterValidator(_vocab)]
Template = Annotated[str, AfterValidator(_template)]
HistoryTemplate = Annotated[str, AfterValidator(_history_template)]
Processes = Annotated[Positive, AfterValidator(_processes)]


class Config(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _without_defaults(config: Config, dumped: dict[str, Any], later: tuple[str, ...]) -> dict[str, Any]:
    """Without the keys that came ``later`` where they have their defaults: identities from before them hold."""
    fields = type(config).model_fields
    return {key: value for key, value in dumped.items() if key not in later or value != fields[key].default}


class Optimizer(Config):
    """AdamW, linear warm-up, decay to a tenth of ``lr``; the weights kept are those with the least validation loss."""

    steps: Positive
    global_batch: Annotated[int, Field(gt=0, multiple_of=STREAMS)] = 256
    """Training units per step, over all processes: targets for the encoder-decoder of SID-based GR, users (all of their targets)
    for the decoder-only one and LLM-as-RS, items for text."""
    lr: Annotated[float, Field(gt=0)]
    lr_choice: str = "stated"
    """How ``lr`` was chosen, in words for the report: the one key that is no part of the identity."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] = 1.0
    validations: Annotated[int, Field(ge=1)] = 5
    """How often the validation loss is measured, evenly over the run, the last time at its end."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine over all steps, or ``lr`` unchanged and an exponential decay over the last tenth (warm-up,
    stable, decay; Hu et al. 2024, arXiv 2404.06395, section 4)."""
    patience: Positive | None = None
    """End the run after this many validations in a row without a new least loss. The schedule stays that of all steps."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, dump(self), ("schedule", "patience"))


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


class Tfidf(Config):
    """TF-IDF of the texts' words, reduced to ``dims`` by a truncated SVD (`gr.sid.references`)."""

    dims: Positive = 128
    seed: Seed = 0


class RandomVectors(Config):
    """A random vector of ``dims`` per item, of which no text tells anything."""

    dims: Positive = 64
    seed: Seed = 0


class EncodeConfig(Config):
    """``model``: a hub name or local path, where the encoder is no stage of the study; ``tfidf``, ``random``: no neural net at
    all.

    ``template``: what is encoded of an item, of {text} (its title and attributes), {title}, {attributes} and {key}.
    """

    model: str | None = None
    tfidf: Tfidf | None = None
    random: RandomVectors | None = None
    template: Template = "{text}"
    pooling: Pooling = "mean"
    max_tokens: Positive = 128
    batch: Positive = 64


class QuantizeConfig(Config):
    """``hidden`` to ``codebooks`` are of the RQ-VAE; ``kmeans_batch``: mini-batches, for a large catalogue (None: Lloyd's
    algorithm).

    ``assignment_beam``: how many choices for the levels so far a residual k-means carries on when it codes an item.
    """

    method: Literal["residual-kmeans", "rqvae", "product"] = "residual-kmeans"
    levels: Annotated[int, Field(ge=1, le=8)] = 3
    width: Annotated[int, Field(ge=2, le=65536)] = 256
    collisions: Collisions = "extra-digit"
    normalize_residuals: bool = False
    kmeans_batch: Positive | None = None
    assignment_beam: Positive = 1
    hidden: tuple[Positive, ...] = (256, 128)
    latent: Positive = 64
    beta: Annotated[float, Field(ge=0)] = 0.25
    steps: Positive = 2000
    batch: Positive = 1024
    lr: Annotated[float, Field(gt=0)] = 1e-3
    gradient: Gradient = "straight-through"
    codebooks: Codebooks = "loss"
    seed: Seed = 0

    @model_validator(mode="after")
    def _method_has_it(self) -> "QuantizeConfig":
        for key, method in (
            ("normalize_residuals", "residual-kmeans"),
            ("assignment_beam", "residual-kmeans"),
            ("gradient", "rqvae"),
            ("codebooks", "rqvae"),
        ):
            if self.method != method and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is an option of method {method}, not of {self.method}")
        if self.normalize_residuals and self.assignment_beam > 1:
            raise ValueError("normalize_residuals leaves no sum of codes for assignment_beam to improve; give one of them")
        return self


class T5Size(Config):
    """A SID recommender's; heads x d_kv need not be d_model (as in the sizes of Liu et al. 2025)."""

    layers: Positive
    d_model: Positive
    heads: Positive
    d_kv: Positive
    d_ff: Positive


class TrainSidConfig(Config):
    """``architecture``: a T5-style encoder-decoder of ``layers`` in each stack, or a causal transformer of ``layers`` in all."""

    size: T5Size
    architecture: Architecture = "encoder-decoder"
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
    checkpoint_activations: bool = False
    optimizer: Optimizer
    seed: Seed = 0

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, dump(self), ("checkpoint_activations",))


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


class Tuning(Config):
    """What of a backbone is trained, and from which weights.

    ``tune``: adapters, all of it, or its output layer alone (with tied embeddings the table that both share). ``start``: the
    weights as they come (pretrained, or fresh from the catalogue's text), or drawn anew: a control, of the same architecture and
    tokenizer, for what those weights are worth.
    """

    tune: Literal["lora", "full", "head"] = "lora"
    lora: LoraConfig | None = None
    start: Literal["trained", "random"] = "trained"

    @model_validator(mode="after")
    def _lora_goes_with_tune(self) -> "Tuning":
        if (self.tune == "lora") != (self.lora is not None):
            raise ValueError("tune: lora needs lora" if self.lora is None else f"tune: {self.tune} has no use for lora")
        return self


class LlmTraining(Tuning):
    """What an LLM reads and generates, and how its training is computed (docs/llm.md).

    ``input``: items of a history appear as titles, as semantic IDs or as both; generated is the title, or with "sids" the SID.
    ``template``: what is shown of an item in a history, of {title}, {attributes} and {key}, in front of its SID; ``prompt``: text
    before every history. ``checkpoint_activations``: activations are computed again for the backward pass rather than kept.
    ``attention``: transformers' implementation, in training. ``load_in_4bit``: the frozen backbone is rounded to 4 bits while its
    adapters are trained. ``save_merged``: the whole model that backbone and adapters make is saved beside these.
    """

    input: Literal["titles", "sids", "both"] = "titles"
    template: HistoryTemplate = "{title}"
    prompt: str = ""
    checkpoint_activations: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    load_in_4bit: bool = False
    save_merged: bool = False

    @model_validator(mode="after")
    def _options_go_together(self) -> "LlmTraining":
        if self.input == "sids" and self.template != "{title}":
            raise ValueError("input: sids shows no text, so that template has nothing to fill in; input: both shows both")
        if self.input != "titles" and self.tune == "head":
            raise ValueError(f"tune: head would leave the new tokens of input: {self.input} as they were drawn; lora or full")
        for key in ("load_in_4bit", "save_merged"):
            if getattr(self, key) and self.tune != "lora":
                raise ValueError(f"{key} goes with tune: lora")
        if self.load_in_4bit and (self.save_merged or self.start == "random"):
            other = "save_merged" if self.save_merged else "start: random"
            raise ValueError(f"load_in_4bit and {other}: weights of 4 bits are neither drawn nor added to; give one of them")
        return self


class TrainLlmConfig(LlmTraining):
    """``model``: a hub name or local path, where the backbone is no stage of the study."""

    model: str | None = None
    max_history: Positive = 20
    max_tokens: Positive = 512
    shared_titles: SharedTitles = "expand"
    normalize: Normalize = "catalogue"
    optimizer: Optimizer
    seed: Seed

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, dump(self), tuple(LlmTraining.__annotations__))


class EvaluateSidConfig(Config):
    beams: Annotated[int, Field(ge=20)] = 20
    which: Which = "test"
    users: Positive | None = None
    batch: Positive = 128


class EvaluateLlmConfig(EvaluateSidConfig):
    """``length``: what ranks titles of different lengths, the log-probability or its mean per token."""

    length: Length = "sum"

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(self, dump(self), ("length",))


class BaselineConfig(Config):
    method: Method
    which: Which = "test"
    users: Positive | None = None


class Launch(Config):
    """How a stage is started (docs/launch.md). The global batch is `Optimizer.global_batch`, whatever stands here.

    ``processes`` > 1: `accelerate launch`, one process per device (gloo on CPU). ``zero``: stage of ZeRO (arXiv 1910.02054), by
    DeepSpeed: 1 shares Adam's moments among the processes, 2 the gradients too, 3 the weights too; 0: plain data parallelism.
    ``offload`` "cpu": what ZeRO shares lies in main memory. ``accumulation``: micro-batches are this many times smaller.
    """

    processes: Processes = 1
    threads: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"
    accumulation: Positive = 1

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "Launch":
        if self.offload == "cpu" and self.zero == 0:
            raise ValueError("offload cpu needs zero 1, 2 or 3: only what ZeRO shares can be moved to main memory")
        return self

    def identity(self) -> dict[str, Any]:
        """What may change a bit of the result: sums in another order, other dropout masks. Where it is not the default, so that a
        key added here leaves the identities of earlier runs as they are; the number of processes always."""
        return {"processes": self.processes, **self.model_dump(exclude={"processes", "threads"}, exclude_defaults=True)}


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

PARALLEL = frozenset({"encode", "train_sid", "evaluate_sid", "pretrain_llm", "train_llm", "evaluate_llm"})
"""The stages that several processes can share. Every process of another would do and write the same, and a text encoder contrasts
the items of a whole batch, so that shares of it would be another objective."""

DIVISIBLE = frozenset({"train_sid", "pretrain_llm", "train_llm"})
"""The training stages whose batches can be cut: they alone have `Launch.zero` and `Launch.accumulation`."""

INPUTS: dict[str, dict[str, str]] = {
    "prepare": {"dataset": "plant"},
    "train_encoder": {"split": "prepare"},
    "encode": {"split": "prepare", "encoder": "train_encoder"},
    "quantize": {"embeddings": "encode", "dataset": "plant"},
    "train_sid": {"split": "prepare", "sids": "quantize"},
    "evaluate_sid": {"split": "prepare", "sids": "quantize", "model": "train_sid"},
    "pretrain_llm": {"split": "prepare"},
    "train_llm": {"split": "prepare", "backbone": "pretrain_llm", "sids": "quantize"},
    "evaluate_llm": {"split": "prepare", "backbone": "pretrain_llm", "sids": "quantize", "model": "train_llm"},
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
