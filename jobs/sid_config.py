"""What the stages of SID-based GR can be told."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gr.terms import Codebooks, Collisions, Gradient, Normalize, Pooling
from jobs.options import Config, Optimizer, Positive, Seed, Template, TransformerSize, Vocab, without_defaults

Architecture = Literal["encoder-decoder", "decoder-only"]
Rows = Literal["last", "prefixes", "subsequences"]


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
        if self.gradient == "gumbel" and self.codebooks == "ema":
            raise ValueError("gradient gumbel trains the codebooks by their loss, ema by moving averages; give one of them")
        return self


class T5Size(Config):
    """A SID recommender's; heads x d_kv need not be d_model (as in the sizes of Liu et al. 2025)."""

    layers: Positive
    d_model: Positive
    heads: Positive
    d_kv: Positive
    d_ff: Positive


class SidTraining(Config):
    """``architecture``: a T5-style encoder-decoder of ``layers`` in each stack, or a causal transformer of ``layers`` in all.

    ``user_tokens``, ``separator``, ``item_position``: what is read beside the SIDs (`gr.sid.inputs`). ``rows``: what is trained
    on: each user's last target, every target with all items before it, or every target with every run of them (docs/sid.md).
    """

    architecture: Architecture = "encoder-decoder"
    normalize: Normalize = "catalogue"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_history: Positive = 20
    user_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    separator: bool = False
    item_position: bool = False
    rows: Rows = "prefixes"

    @model_validator(mode="after")
    def _rows_of_the_architecture(self) -> "SidTraining":
        if self.rows == "subsequences" and self.architecture == "decoder-only":
            raise ValueError(
                "rows: subsequences is for architecture: encoder-decoder; a decoder-only pass has a target at every item already"
                " (rows: prefixes)"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, dump(self), ("user_tokens", "separator", "item_position", "rows"))


class TrainSidConfig(SidTraining):
    size: T5Size
    optimizer: Optimizer
    seed: Seed
