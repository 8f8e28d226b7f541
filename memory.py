"""The memory: a vector store with four operations, a scratchpad, and a bag-of-words embedder.

One store belongs to one episode, so no rollout can touch an entry of its siblings. The store does
not embed anything itself: the agent loop embeds the texts of many episodes in one call and passes
the vectors in. Other embedders are in tools/encoder.py.

Letters: n entries, d dimensions of an embedding, k retrieved entries, B texts.
"""

import functools
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from config import BadInput

Embedder = Callable[..., np.ndarray]  # embed(texts, query=False) -> (B, d) float32, unit length

# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces: their words are character bigrams.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+"
)


@dataclass(frozen=True)
class Entry:
    """One memory entry. Ids count up from 0 in order of creation and are never reused."""

    id: int
    text: str


class Memory:
    """An episode's store and scratchpad.

    capacity: the maximum number of entries; 0 means no limit. A full store refuses to Create: the
    policy has to Delete or Update instead (the paper's Appendix C).
    """

    def __init__(self, capacity: int = 0):
        self.capacity = capacity
        self.scratchpad = ""
        self.texts: dict[int, str] = {}  # id -> text, oldest first
        self.next_id = 0
        self.vectors: dict[int, np.ndarray] = {}  # id -> (d,), of unit length

    def __len__(self) -> int:
        return len(self.texts)

    def create(self, text: str, vector: np.ndarray) -> int | None:
        """Append an entry and return its id, or None if the store is full. vector: (d,)."""
        if self.capacity and len(self) >= self.capacity:
            return None
        self.texts[self.next_id], self.vectors[self.next_id] = text, vector
        self.next_id += 1
        return self.next_id - 1

    def update(self, id: int, text: str, vector: np.ndarray) -> bool:
        """Replace an entry's text and vector. It keeps its id. False if there is no such entry."""
        if id not in self.texts:
            return False
        self.texts[id], self.vectors[id] = text, vector
        return True

    def delete(self, id: int) -> bool:
        """Remove an entry. False if there is no such entry."""
        self.vectors.pop(id, None)
        return self.texts.pop(id, None) is not None

    def search(self, vector: np.ndarray, k: int) -> list[Entry]:
        """The k entries most similar to `vector`, best first: TopK_i sim(q, m_i), eq. 6.

        The similarity is the cosine, because all vectors have unit length. We add two rules to
        eq. 6. Entries with a cosine of 0 or less are not retrieved. If entries are equally similar,
        older ones are retrieved first, but ties are listed by their text. A list by age would show
        which of two contradicting entries is newer, and a vector store does not know that.
        """
        if not self.texts:
            return []
        ids = list(self.texts)
        vectors = np.stack(list(self.vectors.values())).astype(np.float64)  # (n, d)
        cosines = (vectors * vector).sum(1).round(9)  # (n,); equal texts tie exactly
        order = np.argsort(-cosines, kind="stable")  # stable: of equal ones, the older comes first
        best = [i for i in order if cosines[i] > 1e-6][:k]
        best.sort(key=lambda i: (-cosines[i], self.texts[ids[i]]))
        return [Entry(ids[i], self.texts[ids[i]]) for i in best]

    def random_entries(self, rng: random.Random, k: int) -> list[Entry]:
        """At most k random entries, drawn with `rng`: the paper's Table 4."""
        ids = rng.sample(list(self.texts), min(k, len(self)))
        return [Entry(id, self.texts[id]) for id in ids]


class HashedEmbedder:
    """A bag of words, hashed into signed buckets. Needs no download and is the same everywhere."""

    def __init__(self, dimensions: int = 1024):
        self.dimensions = dimensions

    def __call__(self, texts: list[str], query: bool = False) -> np.ndarray:
        """(B, d) float32 of unit length, or zeros for a text without words. `query` is ignored."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for vector, text in zip(vectors, texts):
            text = text.lower()
            runs = [] if text.isascii() else UNSPACED.findall(text)
            words = re.findall(r"\w+", UNSPACED.sub(" ", text) if runs else text)
            words += [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
            for word in words:
                bucket = zlib.crc32(word.encode())  # stable, unlike hash()
                vector[bucket % self.dimensions] += 1 if bucket >> 31 else -1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@functools.cache
def load_embedder(name: str, device="cpu") -> Embedder:
    """The embedder that --embedder names, cached. Raises BadInput if it cannot be loaded."""
    if name == "hashed":
        return HashedEmbedder()
    from tools.encoder import TransformerEmbedder  # here: only this option needs tools/

    try:
        return TransformerEmbedder(name, device)
    except Exception as error:  # transformers raises errors of many kinds
        raise BadInput(f"--embedder {name} cannot be loaded: {error}") from error
