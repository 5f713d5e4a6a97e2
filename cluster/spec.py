"""What a study may say: the models that its YAML is checked against."""

import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)

from cluster.tuning import Sweep
from cluster.yaml_lines import nearest
from gr.data.planted import World
from gr.data.split import Protocol
from gr.errors import UserError
from gr.metrics import NDCG_AT, RECALL_AT, TOP_K
from gr.terms import Length
from jobs.config import Method, Which
from jobs.llm_config import LlmTraining, Pretraining
from jobs.options import Config, Launch, Optimizer, Positive, Processes, Seed, TransformerSize, Vocab
from jobs.sid_config import EncodeConfig, QuantizeConfig, SidTraining, T5Size

METRICS = tuple(f"recall@{k}" for k in RECALL_AT) + tuple(f"ndcg@{k}" for k in NDCG_AT)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a name is letters, digits, dots, dashes and underscores")
    return value


def _metric(value: str) -> str:
    if value not in METRICS:
        raise ValueError(f"{value!r} is not one of {', '.join(METRICS)}{nearest(value, METRICS)}")
    return value


def _unique(values: list[Any]) -> list[Any]:
    if len(set(map(repr, values))) < len(values):
        raise ValueError("something is listed twice")
    return values


def _planted(value: Any, validate: typing.Callable[[Any], World]) -> World:
    try:
        return validate(value)
    except UserError as error:  # pydantic knows where a ValueError arose, and nothing of a UserError
        raise ValueError(str(error)) from None


def _short_protocol(value: Any) -> Any:
    """``leave-one-out`` and ``{temporal: {val: .1}}`` for the job's ``{kind: ...}``."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1 and "kind" not in value:
        ((kind, options),) = value.items()
        if options is None or isinstance(options, dict):
            return {"kind": kind, **(options or {})}
    return value


Name = Annotated[str, AfterValidator(_name)]
Metric = Annotated[str, AfterValidator(_metric)]


class StudyOptimizer(Optimizer):
    """``lr_at_d_model``: the width at which ``lr`` was chosen; a rung of another width gets lr x lr_at_d_model / d_model."""

    lr_at_d_model: Positive | None = None


def _number_or_sweep(value: Any) -> str:
    return "sweep" if isinstance(value, dict | Sweep) else "number"


class TunedOptimizer(StudyOptimizer):
    """``lr`` may be a sweep, of whose rates each rung gets its own."""

    lr: Annotated[  # type: ignore[assignment]
        Annotated[float, Field(gt=0), Tag("number")] | Annotated[Sweep, Tag("sweep")], Discriminator(_number_or_sweep)
    ]

    @model_validator(mode="after")
    def _one_rule(self) -> "TunedOptimizer":
        if isinstance(self.lr, Sweep) and self.lr_at_d_model is not None:
            raise ValueError("lr_at_d_model scales a stated lr, and this one is swept; give one of them")
        return self


class DatasetSpec(Config):
    """``planted``: a world to generate; ``path``: a folder that ``grscale data`` made."""

    planted: Annotated[World, WrapValidator(_planted)] | None = None
    path: Path | None = None

    @model_validator(mode="after")
    def _one(self) -> "DatasetSpec":
        if (self.planted is None) == (self.path is None):
            raise ValueError("needs either planted or path")
        return self


class FreshEncoder(TransformerSize):
    vocab: Vocab = 4000
    max_tokens: Positive = 48
    optimizer: StudyOptimizer


class EncoderSpec(EncodeConfig):
    """``fresh``: trained on the catalogue's text first, in place of ``model`` or a reference without a net; ``launch``: how the
    catalogue is embedded."""

    fresh: FreshEncoder | None = None
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _one(self) -> "EncoderSpec":
        if sum(x is not None for x in (self.fresh, self.model, self.tfidf, self.random)) != 1:
            raise ValueError("needs one of fresh, model, tfidf and random")
        return self


class SidTrain(SidTraining):
    """Of every rung: a ladder is of one architecture."""

    optimizer: TunedOptimizer


class SidRung(T5Size):
    """``encoder``, ``quantizer``: names from above; the first one where left out."""

    name: Name
    encoder: str | None = None
    quantizer: str | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    launch: Launch | Literal["auto"] = Launch()


class SharedWork(Config):
    """``processes`` among which an evaluation's users are shared, each with its ``threads``."""

    processes: Processes = 1
    threads: Positive = 1


class Beams(Config):
    """``beams``: of the points' measurement, and so at least as many as the deepest metric's k. ``widths``: further numbers of
    beams with which each trained model is evaluated, beside the table of points. ``launch``: where left out, one process with as
    many threads as all of the training's had."""

    beams: Annotated[int, Field(ge=TOP_K)] = TOP_K
    widths: Annotated[list[Positive], AfterValidator(_unique)] = Field(default=[])
    batch: Positive = 128
    launch: SharedWork | None = None

    @field_validator("widths")
    @classmethod
    def _further(cls, value: list[int], info: ValidationInfo) -> list[int]:
        if (beams := info.data.get("beams")) in value:
            raise ValueError(f"{beams} is what beams says already; widths are further ones")
        return value

    def config(self, beams: int) -> dict[str, Any]:
        """The job's, of one width."""
        return {**self.model_dump(exclude={"widths", "launch"}), "beams": beams}

    def processes_and_threads(self, processes: int, threads: int) -> tuple[int, int]:
        """Of the evaluation, after a training by ``processes`` of ``threads`` each."""
        return (self.launch.processes, self.launch.threads) if self.launch else (1, processes * threads)


class TitleBeams(Beams):
    """`jobs.config.EvaluateLlmConfig` says what ``length`` means."""

    length: Length = "sum"


class Sid(Config):
    encoders: Annotated[dict[Name, EncoderSpec], Field(min_length=1)]
    quantizers: Annotated[dict[Name, QuantizeConfig], Field(min_length=1)]
    train: SidTrain
    ladder: Annotated[list[SidRung], Field(min_length=1)]
    evaluate: Beams = Beams()


class Pretrain(Pretraining):
    """How the fresh backbones are trained on the catalogue's text."""

    optimizer: TunedOptimizer


class LlmTrain(LlmTraining):
    """``encoder``, ``quantizer``: names from the study's ``sid``, whose SIDs ``input: sids`` and ``both`` take; the first ones
    where left out. `jobs.llm_config.LlmTraining` says what the other keys mean."""

    encoder: str | None = None
    quantizer: str | None = None
    optimizer: TunedOptimizer


class LlmRung(Config):
    """A fresh backbone's sizes, or ``model``: a hub name or local path."""

    name: Name
    model: str | None = None
    layers: Positive | None = None
    d_model: Positive | None = None
    heads: Positive | None = None
    d_ff: Positive | None = None
    kv_heads: Positive | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    launch: Launch | Literal["auto"] = Launch()

    @model_validator(mode="after")
    def _one(self) -> "LlmRung":
        sizes = {"layers": self.layers, "d_model": self.d_model, "heads": self.heads, "d_ff": self.d_ff}
        if self.model is None:
            missing = [key for key, value in sizes.items() if value is None]
            if missing:
                raise ValueError(f"a fresh backbone needs {', '.join(missing)} (or give model: a hub name or path)")
            assert self.d_model and self.heads
            if self.d_model % self.heads:
                raise ValueError(f"d_model {self.d_model} is not a multiple of heads {self.heads}")
            if self.d_model // self.heads % 2:
                raise ValueError(f"d_model / heads is {self.d_model // self.heads}; rotary positions need an even number")
            if self.kv_heads and self.heads % self.kv_heads:
                raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        elif any(value is not None for value in [*sizes.values(), self.kv_heads]):
            raise ValueError("has both model and sizes of its own; give one of them")
        return self


class Llm(Config):
    pretrain: Pretrain | None = None
    train: LlmTrain
    ladder: Annotated[list[LlmRung], Field(min_length=1)]
    evaluate: TitleBeams = TitleBeams()


class Evaluate(Config):
    """The same target and users for every paradigm."""

    which: Which = "test"
    users: Positive | None = None


class Resources(Config):
    """What one process of a job gets; ``flops_per_second`` is only for the plan's time estimates.

    ``gpu_memory``: of one GPU, in GB; with it tiny stages share a GPU (`cluster.schedule.need`), and a rung's `launch: auto` has
    as many of a machine's GPUs, and as much of ZeRO, as its memory needs (`cluster.auto`).
    """

    gpus_per_process: Annotated[int, Field(ge=0)] = 0
    gpus_per_machine: Positive = 8
    gpu_memory: Annotated[float, Field(gt=0)] | None = None
    flops_per_second: Annotated[float, Field(gt=0)] = 10e9


class Study(Config):
    """One study. ``worthwhile``: the smallest gain of ``metric`` per doubling of size that would be worth paying for."""

    study: Name
    seeds: Annotated[list[Seed], Field(min_length=1), AfterValidator(_unique)] = Field(default=[0, 1, 2])
    metric: Metric = "recall@10"
    worthwhile: Annotated[float, Field(gt=0, lt=1)] = 0.01
    datasets: Annotated[dict[Name, DatasetSpec], Field(min_length=1)]
    protocols: Annotated[
        list[Annotated[Protocol, BeforeValidator(_short_protocol)]], Field(min_length=1), AfterValidator(_unique)
    ] = Field(default=["leave-one-out"], validate_default=True)
    cf: Annotated[list[Method], AfterValidator(_unique)] = Field(default=["popularity", "item-knn", "markov"])
    sid: Sid | None = None
    llm: Llm | None = None
    evaluate: Evaluate = Evaluate()
    resources: Resources = Resources()
