"""Sizes are counted on the modules themselves, never taken from a label."""

from torch import Tensor, nn
from transformers import PreTrainedModel


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all, non-embedding) parameters. Shared weights count once; the embeddings are the token table, and the output matrix too
    where it is not the same one (Kaplan et al. 2020, section 1.3)."""
    tables = embedding_tables(model.get_input_embeddings())
    if model.config.is_encoder_decoder:
        tables += embedding_tables(model.get_encoder().get_input_embeddings())
    if (head := model.get_output_embeddings()) is not None:
        tables.append(head.weight)
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum({id(w): w.numel() for w in tables}.values())


def embedding_tables(embeddings: nn.Module) -> list[Tensor]:
    """The weights of ``embeddings`` and of the tables within it (`gr.sid.inputs.InputEmbedding` has some)."""
    return [m.weight for m in embeddings.modules() if isinstance(m, nn.Embedding)]
