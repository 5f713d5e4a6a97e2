"""What the stages of LLM-as-RS can be told."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gr.terms import Normalize, SharedTitles
from jobs.options import Config, Optimizer, Positive, Seed, TransformerSize, Vocab, check_template, without_defaults

HISTORY_FIELDS = ("title", "attributes", "key")


def _history_template(value: str) -> str:
    check_template(value, HISTORY_FIELDS)
    if not value.startswith("{title}"):
        raise ValueError(f"{value!r} does not begin with {{title}}: an item begins with what is generated of it")
    return value


HistoryTemplate = Annotated[str, AfterValidator(_history_template)]


class BackboneSize(TransformerSize):
    kv_heads: Positive | None = None


class Pretraining(Config):
    """``checkpoint_activations``: see `LlmTraining`."""

    vocab: Vocab = 4000
    max_tokens: Positive = 256
    normalize: Normalize = "catalogue"
    checkpoint_activations: bool = False


class PretrainLlmConfig(Pretraining):
    """A fresh Qwen3-architecture backbone and its tokenizer, trained on the catalogue's own text."""

    size: BackboneSize
    optimizer: Optimizer
    seed: Seed = 0

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), ("checkpoint_activations",))


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

    max_history: Positive = 20
    max_tokens: Positive = 512
    shared_titles: SharedTitles = "expand"
    normalize: Normalize = "catalogue"
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
    optimizer: Optimizer
    seed: Seed

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = ("input", "template", "prompt", "checkpoint_activations", "attention", "load_in_4bit", "save_merged")
        return without_defaults(self, dump(self), later)
