"""What the configurations of several stages share: kinds of values, optimizers, sizes, and how a stage is launched."""

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

from gr.data.split import STREAMS

Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(gt=0)]
SMALLEST_VOCAB = 256 + 3
"""Of a fresh byte-level tokenizer: every byte, and its three special tokens (`gr.text`)."""
TEMPLATE_FIELDS = ("text", "title", "attributes", "key")


def _vocab(value: int) -> int:
    if value < SMALLEST_VOCAB:
        raise ValueError(f"{value} is too small; a byte-level vocabulary has at least {SMALLEST_VOCAB} tokens")
    return value


def _processes(value: int) -> int:
    if STREAMS % value:
        dividers = ", ".join(str(n) for n in range(1, STREAMS + 1) if STREAMS % n == 0)
        raise ValueError(f"{value} processes can't share the {STREAMS} streams of the data; one of {dividers}")
    return value


def check_template(value: str, known: tuple[str, ...] = TEMPLATE_FIELDS) -> str:
    """``value``; ValueError unless it names fields of ``known`` and nothing else of theirs."""
    try:
        fields = [(name, spec, change) for _, name, spec, change in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"{value!r}: {error}; a brace that is meant as one is written twice") from None
    wrong = [f"{{{name}}}" for name, spec, change in fields if name not in known or spec or change]
    if wrong or not fields:
        words = ", ".join(f"{{{name}}}" for name in known)
        raise ValueError(f"{value!r} has {wrong[0] if wrong else 'nothing of the item'}; an item has {words}")
    return value


Vocab = Annotated[Positive, AfterValidator(_vocab)]
Template = Annotated[str, AfterValidator(check_template)]
Processes = Annotated[Positive, AfterValidator(_processes)]


class Config(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def without_defaults(config: Config, dumped: dict[str, Any], later: tuple[str, ...]) -> dict[str, Any]:
    """Without the keys that came ``later`` where they have their defaults: identities from before them hold."""
    fields = type(config).model_fields
    return {key: value for key, value in dumped.items() if key not in later or value != fields[key].default}


class Optimizer(Config):
    """AdamW, linear warm-up, decay to a tenth of ``lr``."""

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
    keep: Literal["best", "last"] = "best"
    """The weights that are kept: those with the least validation loss, or those of the last step (docs/tuning.md)."""

    @model_validator(mode="after")
    def _patience_keeps_the_best(self) -> "Optimizer":
        if self.patience is not None and self.keep == "last":
            raise ValueError("patience ends a run where its best weights lie behind it; keep: last has no use for it")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), ("schedule", "patience", "keep"))


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


class Launch(Config):
    """How a stage is started (docs/launch.md). The global batch is `Optimizer.global_batch`, whatever stands here.

    ``processes`` > 1: `accelerate launch`, one process per device (gloo on CPU). ``zero``: stage of ZeRO (arXiv 1910.02054), by
    DeepSpeed: 1 shares Adam's moments among the processes, 2 the gradients too, 3 the weights too; 0: plain data parallelism.
    ``offload`` "cpu": what ZeRO shares lies in main memory. ``accumulation``: micro-batches are this many times smaller.
    ``graphs``: a GPU's steps are recorded as CUDA graphs (`jobs.graphs`), of a T5-style SID recommender by one process.
    """

    processes: Processes = 1
    threads: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    zero: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "cpu"] = "none"
    accumulation: Positive = 1
    graphs: bool = False

    @model_validator(mode="after")
    def _graphs_of_one(self) -> "Launch":
        if self.graphs and (self.processes > 1 or self.zero):
            raise ValueError("graphs are of one process without zero: what several exchange can't be recorded")
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "Launch":
        if self.offload == "cpu" and self.zero == 0:
            raise ValueError("offload cpu needs zero 1, 2 or 3: only what ZeRO shares can be moved to main memory")
        return self

    def identity(self) -> dict[str, Any]:
        """What may change a bit of the result: sums in another order, other dropout masks. Where it is not the default, so that a
        key added here leaves the identities of earlier runs as they are; the number of processes always."""
        return {"processes": self.processes, **self.model_dump(exclude={"processes", "threads"}, exclude_defaults=True)}
