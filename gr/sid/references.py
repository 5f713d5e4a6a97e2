"""Item vectors without a neural net: what a learnt encoder has to beat, and what the text's meaning buys at all."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from gr.errors import UserError
from gr.text import item_texts


def templated(items: pa.Table, template: str) -> list[str]:
    """The text of every item: ``template`` with {text} (as `gr.text.item_texts`), {title}, {attributes} and {key} filled in."""
    texts = item_texts(items)
    rows = items.select(["key", "title", "attributes"]).to_pylist()
    return [
        template.format(text=text, title=row["title"] or "", attributes=", ".join(row["attributes"] or []), key=row["key"])
        for text, row in zip(texts, rows, strict=True)
    ]


def tfidf_vectors(texts: Sequence[str], dims: int, seed: int) -> NDArray[np.float32]:
    """(texts, dims) latent semantic analysis: TF-IDF of words (1 + log of counts), and its truncated SVD (Deerwester et al.
    1990).

    UserError where the texts have too few different words, or are too few, for so many dimensions.
    """
    try:
        counted = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(texts)
    except ValueError:
        raise UserError("config.tfidf: the texts have no words") from None
    if dims > (most := min(counted.shape)):
        raise UserError(f"config.tfidf.dims is {dims}; {counted.shape[0]} texts of {counted.shape[1]} words have at most {most}")
    return np.asarray(TruncatedSVD(dims, random_state=seed).fit_transform(counted), dtype=np.float32)


def random_vectors(items: int, dims: int, seed: int) -> NDArray[np.float32]:
    """(items, dims) standard normal numbers."""
    return np.random.default_rng(seed).standard_normal((items, dims), dtype=np.float32)
