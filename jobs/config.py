"""What each stage can be told: one pydantic model per stage, with no torch behind it, so that a plan is checked in a moment.

Everything here changes a stage's result and is part of its identity, but for the paths of `Run` and the threads of `Launch`.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from gr.data.planted import World
from gr.data.split import LeaveOneOut, Protocol
from gr.metrics import TOP_K
from gr.terms import Length
from jobs.llm_config import PretrainLlmConfig, TrainLlmConfig
from jobs.options import Config, Launch, Positive, without_defaults
from jobs.sid_config import EncodeConfig, QuantizeConfig, TrainEncoderConfig, TrainSidConfig

Method = Literal["popularity", "item-knn", "markov", "bayes-optimal"]
Which = Literal["val", "test"]


class PlantConfig(Config):
    world: World = World()


class PrepareConfig(Config):
    protocol: Protocol = LeaveOneOut()


class EvaluateSidConfig(Config):
    """With fewer ``beams`` than a metric's k the metric is not reported."""

    beams: Positive = TOP_K
    which: Which = "test"
    users: Positive | None = None
    batch: Positive = 128


class EvaluateLlmConfig(EvaluateSidConfig):
    """``length``: what ranks titles of different lengths, the log-probability or its mean per token."""

    length: Length = "sum"

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), ("length",))


class BaselineConfig(Config):
    method: Method
    which: Which = "test"
    users: Positive | None = None


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
    inputs: dict[str, Path] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    launch: Launch = Launch()
