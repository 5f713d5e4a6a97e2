"""Sizes are counted on the modules themselves, never taken from a label."""

from transformers import PreTrainedModel

from gr.sid.inputs import input_parameters


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(all, non-embedding) parameters. Shared weights count once; the embeddings are the token table, and the output matrix too
    where it is not the same one (Kaplan et al. 2020, section 1.3), and what a SID recommender reads beside (`gr.sid.inputs`)."""
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    tables |= {id(weight): weight for weight in input_parameters(model)}
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(w.numel() for w in tables.values())
