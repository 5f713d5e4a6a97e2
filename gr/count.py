"""Sizes are counted on the modules themselves, never taken from a label."""

from transformers import PreTrainedModel


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all, non-embedding) parameters. Shared weights count once; the embeddings are the token table, and the output matrix too
    where it is not the same one (Kaplan et al. 2020, section 1.3)."""
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(w.numel() for w in tables.values())
