"""A study as it is written down: YAML checked against these models, every mistake named with its line."""

import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)

from cluster.tuning import Sweep
from cluster.yaml_lines import Loc, apply_override, dotted, load
from gr.data.planted import World
from gr.errors import UserError
from gr.metrics import NDCG_AT, RECALL_AT
from jobs.config import (
    Architecture,
    Config,
    Launch,
    Method,
    Normalize,
    Optimizer,
    Pooling,
    Positive,
    Protocol,
    QuantizeConfig,
    RandomVectors,
    Seed,
    SharedTitles,
    T5Size,
    Template,
    Tfidf,
    TransformerSize,
    Tuning,
    Vocab,
    Which,
)

BUILTIN = Path(__file__).parent / "studies" / "builtin.yaml"
METRICS = tuple(f"recall@{k}" for k in RECALL_AT) + tuple(f"ndcg@{k}" for k in NDCG_AT)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a name is letters, digits, dots, dashes and underscores")
    return value


def _metric(value: str) -> str:
    if value not in METRICS:
        raise ValueError(f"{value!r} is not one of {', '.join(METRICS)}{_nearest(value, METRICS)}")
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


class EncoderSpec(Config):
    """``fresh``: trained on the catalogue's text first; ``model``: a hub name or local path; ``tfidf``, ``random``: no net.

    The other keys are those of `jobs.config.EncodeConfig`; ``launch``: how the catalogue is embedded.
    """

    fresh: FreshEncoder | None = None
    model: str | None = None
    tfidf: Tfidf | None = None
    random: RandomVectors | None = None
    template: Template = "{text}"
    pooling: Pooling = "mean"
    max_tokens: Positive = 128
    batch: Positive = 64
    launch: Launch = Launch()

    @model_validator(mode="after")
    def _one(self) -> "EncoderSpec":
        if sum(x is not None for x in (self.fresh, self.model, self.tfidf, self.random)) != 1:
            raise ValueError("needs one of fresh, model, tfidf and random")
        return self


class SidTrain(Config):
    """``architecture`` of every rung: a ladder is of one. `jobs.config.TrainSidConfig` says what the keys mean."""

    architecture: Architecture = "encoder-decoder"
    normalize: Normalize = "catalogue"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_history: Positive = 20
    optimizer: TunedOptimizer


class SidRung(T5Size):
    """``encoder``, ``quantizer``: names from above; the first one where left out."""

    name: Name
    encoder: str | None = None
    quantizer: str | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None
    launch: Launch | Literal["auto"] = Launch()


class Beams(Config):
    beams: Annotated[int, Field(ge=20)] = 20
    batch: Positive = 128


class Sid(Config):
    encoders: Annotated[dict[Name, EncoderSpec], Field(min_length=1)]
    quantizers: Annotated[dict[Name, QuantizeConfig], Field(min_length=1)]
    train: SidTrain
    ladder: Annotated[list[SidRung], Field(min_length=1)]
    evaluate: Beams = Beams()


class Pretrain(Config):
    """How the fresh backbones are trained on the catalogue's text."""

    vocab: Vocab = 4000
    max_tokens: Positive = 256
    normalize: Normalize = "catalogue"
    optimizer: TunedOptimizer


class LlmTrain(Tuning):
    max_history: Positive = 20
    max_tokens: Positive = 512
    shared_titles: SharedTitles = "expand"
    normalize: Normalize = "catalogue"
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
    evaluate: Beams = Beams()


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


@dataclass(frozen=True)
class Loaded:
    """A checked study, the document it came from (overrides applied), and where each key stands."""

    study: Study
    raw: dict[str, Any]
    path: Path
    lines: dict[Loc, int]

    def where(self, loc: Loc) -> str:
        """``study.yaml:17: sid.ladder[2]`` for the messages of later checks."""
        while loc and loc not in self.lines:
            loc = loc[:-1]
        return f"{self.path}:{self.lines.get(loc, 1)}"


def load_study(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Reads and checks a study; UserError names the file, the line, the key and the nearest valid spelling."""
    raw, lines = load(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}:1: a study is a mapping of keys")
    given: dict[Loc, str] = {}
    for override in overrides:
        loc = apply_override(raw, override)
        given[loc] = f"--set {override}"
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, raw, path, lines, given)) from None
    loaded = Loaded(study, raw, path, lines)
    _check_names(loaded)
    return loaded


def _check_names(loaded: Loaded) -> None:
    """What one model cannot see: names that refer to each other."""
    study = loaded.study
    if not (study.sid or study.llm or study.cf):
        raise UserError(f"{loaded.path}:1: nothing to measure: give sid, llm or cf")
    names = {
        "sid": [rung.name for rung in study.sid.ladder] if study.sid else [],
        "llm": [rung.name for rung in study.llm.ladder] if study.llm else [],
    }
    for key, rungs in names.items():
        for i, name in enumerate(rungs):
            if name in rungs[:i]:
                raise UserError(f"{loaded.where((key, 'ladder', i, 'name'))}: {key}.ladder[{i}].name: {name!r} is there twice")
    if study.sid:
        for i, rung in enumerate(study.sid.ladder):
            for field, known in (("encoder", study.sid.encoders), ("quantizer", study.sid.quantizers)):
                value = getattr(rung, field)
                if value is not None and value not in known:
                    where = loaded.where(("sid", "ladder", i, field))
                    raise UserError(
                        f"{where}: sid.ladder[{i}].{field}: {value!r} is not among sid.{field}s{_nearest(value, known)}"
                    )
    if study.llm:
        for i, llm_rung in enumerate(study.llm.ladder):
            where = loaded.where(("llm", "ladder", i))
            if llm_rung.model is None and study.llm.pretrain is None:
                raise UserError(f"{where}: llm.ladder[{i}]: a fresh backbone needs llm.pretrain")
            if llm_rung.model and llm_rung.lr is None and study.llm.train.optimizer.lr_at_d_model:
                raise UserError(f"{where}: llm.ladder[{i}].lr: missing; lr_at_d_model can't be applied to a model from outside")


def _explain(error: ValidationError, raw: Any, path: Path, lines: dict[Loc, int], given: dict[Loc, str]) -> str:
    # An unknown key is told first: what it should have been is then often "missing" too.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    loc = _in_document(first["loc"], raw)
    message = _message(first, loc)
    for override_loc, override in given.items():
        if loc[: len(override_loc)] == override_loc:
            return f"{override}: {dotted(loc)}: {message}"
    line = next(lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines)
    return f"{path}:{line}: {dotted(loc) + ': ' if loc else ''}{message}"


def _message(first: Any, loc: Loc) -> str:
    kind = first["type"]
    if kind == "extra_forbidden":
        known = _keys_at(Study, loc[:-1])
        return f"unknown key{_nearest(str(loc[-1]), known) or '; known: ' + ', '.join(sorted(known))}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(first["ctx"]["error"])
    text = first["msg"][0].lower() + first["msg"][1:]
    if kind in {"union_tag_invalid", "literal_error"}:
        got = first["ctx"].get("tag") or first["input"]
        expected = re.findall(r"'([^']+)'", first["ctx"].get("expected_tags") or first["ctx"]["expected"])
        return f"{got!r} is not one of {', '.join(expected)}{_nearest(str(got), expected)}"
    return f"{text}, not {first['input']!r}" if not isinstance(first["input"], dict | list) else text


def _in_document(loc: Sequence[str | int], raw: Any) -> Loc:
    """The location without the names that pydantic adds for union members and keys."""
    found: list[str | int] = []
    at: Any = raw
    for i, part in enumerate(loc):
        known = range(len(at)) if isinstance(at, list) else at if isinstance(at, dict) else ()
        if part in known:
            at = at[part]
            found.append(part)
        elif i == len(loc) - 1 and part != "[key]" and isinstance(at, dict) and isinstance(part, str):
            found.append(part)  # the missing key itself
    return tuple(found)


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _keys_at(model: Any, loc: Loc) -> list[str]:
    """The valid keys of the mapping at ``loc``."""
    at: list[Any] = [model]
    for part in loc:
        following: list[Any] = []
        for annotation in at:
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                if part in annotation.model_fields:
                    following += _alternatives(annotation.model_fields[str(part)].annotation)
            elif typing.get_origin(annotation) is dict:
                following += _alternatives(typing.get_args(annotation)[1])
            elif typing.get_origin(annotation) is list:
                following += _alternatives(typing.get_args(annotation)[0])
        at = following or at
    models = [a for a in at if isinstance(a, type) and issubclass(a, BaseModel)]
    return sorted({name for m in models for name in m.model_fields})


def _alternatives(annotation: Any) -> list[Any]:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _alternatives(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [a for part in typing.get_args(annotation) for a in _alternatives(part)]
    return [annotation]
