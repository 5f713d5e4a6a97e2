"""The text a fresh backbone is first trained on: runs of related titles, from the catalogue alone.

A document looks like a user's history, but no interaction enters it: it is a random walk over the catalogue's text, from an item
to one whose title and attributes are like its own. From it a backbone learns the titles, and to continue a list by what its
members have in common, which is what a pretrained model brings along.
"""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from gr.llm.titles import title_texts

Ints = NDArray[np.int64]
WORD = re.compile(r"[^\W_]{2,}")
NEIGHBOURS = 32
JUMP = 0.1  # chance of an unrelated item
ANCHORS = 3  # the next item is like one of so many before it
TRIES = 4
BLOCK = 512  # rows of the similarity matrix in memory at once


class Walks:
    """Random walks from item to similar item; ``items`` is the catalogue's table.

    Similar are the `NEIGHBOURS` items of the greatest cosine similarity of TF-IDF over words of the title and attributes; one is
    chosen with a chance in proportion to its similarity squared.
    """

    def __init__(self, items: pa.Table) -> None:
        vectors = TfidfVectorizer(analyzer=list, sublinear_tf=True, dtype=np.float32).fit_transform(_features(items))
        self.items = items.num_rows
        self.neighbours, similarity = _nearest(vectors.tocsr(), min(NEIGHBOURS, self.items - 1))
        total = (similarity**2).cumsum(axis=1)
        self.lonely = total[:, -1] == 0
        self.chance = total / np.maximum(total[:, -1:], 1e-12)

    def sample(self, rng: np.random.Generator, documents: int, length: int) -> Ints:
        """(documents, length) item numbers; an item is repeated within a document only where nothing else was found."""
        runs = np.empty((documents, length), dtype=np.int64)
        runs[:, 0] = rng.integers(self.items, size=documents)
        for position in range(1, length):
            anchor = runs[np.arange(documents), rng.integers(max(0, position - ANCHORS), position, size=documents)]
            runs[:, position] = self._related(rng, anchor)
            for _ in range(TRIES):
                again = (runs[:, :position] == runs[:, position, None]).any(axis=1)
                if not again.any():
                    break
                runs[again, position] = self._related(rng, anchor[again])
        return runs

    def _related(self, rng: np.random.Generator, anchor: Ints) -> Ints:
        """For each anchor a similar item, or, by chance or for want of one, any item."""
        place = (rng.random((len(anchor), 1)) >= self.chance[anchor]).sum(axis=1)
        similar = self.neighbours[anchor, np.minimum(place, self.neighbours.shape[1] - 1)]
        unrelated = self.lonely[anchor] | (rng.random(len(anchor)) < JUMP)
        return np.where(unrelated, rng.integers(self.items, size=len(anchor)), similar)


def _features(items: pa.Table) -> Iterator[list[str]]:
    texts, _ = title_texts(items)
    for text, attributes in zip(texts, items["attributes"].to_pylist(), strict=True):
        yield [f"attribute {a}" for a in attributes or ()] + [w.lower() for w in WORD.findall(text)]


def _nearest(vectors: sp.csr_matrix, k: int) -> tuple[Ints, NDArray[np.float32]]:
    """(items, k) numbers of the rows most like each row, itself left out, and their cosine similarities."""
    items = vectors.shape[0]
    numbers, similarities = np.empty((items, k), np.int64), np.empty((items, k), np.float32)
    transposed = vectors.T.tocsr()
    for start in range(0, items, BLOCK):
        dense = (vectors[start : start + BLOCK] @ transposed).toarray()
        rows = np.arange(len(dense))
        dense[rows, start + rows] = -1
        best = np.argpartition(-dense, k - 1, axis=1)[:, :k]
        numbers[start : start + BLOCK] = best
        similarities[start : start + BLOCK] = np.maximum(np.take_along_axis(dense, best, axis=1), 0)
    return numbers, similarities
