"""The memory: a vector store with four operations, a scratchpad, and the embedders that give it its vectors.

One store belongs to one episode, so that no rollout can touch an entry of its sibling. The store never embeds anything
itself: the agent loop embeds the texts of many episodes in one call and hands the vectors over.

Letters: n entries, d dimensions of an embedding, k entries retrieved, B texts embedded together, T tokens.
"""

import functools
import re
import zlib
from dataclasses import dataclass

import numpy as np

from config import BadInput


@dataclass(frozen=True)
class Entry:
    """One memory entry. Ids count up from 0 in order of creation and are never used again."""

    id: int
    text: str


class Memory:
    """An episode's store and scratchpad.

    capacity: the most entries it holds; 0 means no limit. In a full store Create is refused: the policy has to Delete
    or Update instead (the paper's Appendix C).
    """

    def __init__(self, capacity=0):
        self.capacity = capacity
        self.scratchpad = ""
        self.texts = {}  # id -> text, oldest first
        self.next_id = 0
        self._row = {}  # id -> row of the two arrays below
        self._ids = np.zeros(0, dtype=np.int64)  # (rows,) with rows >= n; spare rows at the end
        self._vectors = np.zeros((0, 0), dtype=np.float32)  # (rows, d)

    def __len__(self):
        return len(self.texts)

    def create(self, text, vector):
        """Append an entry and return its id; None when the store is full."""
        if self.capacity and len(self) >= self.capacity:
            return None
        row = len(self)
        if row == len(self._ids):  # out of rows: doubling makes the copies O(1) per entry, amortised
            spare = max(8, row)
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.int64)])
            self._vectors = np.concatenate([self._vectors.reshape(row, len(vector)), np.zeros((spare, len(vector)), np.float32)])
        self._ids[row], self._vectors[row] = self.next_id, vector
        self.texts[self.next_id], self._row[self.next_id] = text, row
        self.next_id += 1
        return self.next_id - 1

    def update(self, id, text, vector):
        """Replace an entry's text and vector; it keeps its id, and with it its age. False when there is no such entry."""
        if id not in self.texts:
            return False
        self.texts[id] = text
        self._vectors[self._row[id]] = vector
        return True

    def delete(self, id):
        """Remove an entry; the last row takes its place. False when there is no such entry."""
        if id not in self.texts:
            return False
        del self.texts[id]
        row, last = self._row.pop(id), len(self.texts)
        if row != last:
            self._ids[row], self._vectors[row] = self._ids[last], self._vectors[last]
            self._row[int(self._ids[row])] = row
        return True

    def search(self, vector, k):
        """The `k` entries most similar to `vector`, best first: TopK_i sim(q, m_i), eq. 6.

        The similarity is the cosine: all vectors, the query (d,) among them, have unit length. Two refinements of eq. 6:
        an entry with nothing in common with the query (cosine <= 0) is not retrieved, and of equally similar entries the
        older ones are chosen, but shown in the order of their texts: an order by age would tell which of two
        contradicting entries is the newer one, which no vector store can tell in general.
        """
        n = len(self)
        if n == 0:
            return []
        similarity = np.round(self._vectors[:n] @ vector, 6)  # (n,); rounded, so that equal texts tie exactly
        candidates = np.arange(n)
        if n > k:  # keep what ties with the k-th best: at least k rows, without sorting all n
            candidates = np.flatnonzero(similarity >= np.partition(similarity, n - k)[n - k])
        candidates = candidates[similarity[candidates] > 0]
        best = candidates[np.lexsort((self._ids[candidates], -similarity[candidates]))][:k]
        entries = [(-similarity[row], self.texts[int(self._ids[row])], int(self._ids[row])) for row in best]
        return [Entry(id, text) for _, text, id in sorted(entries)]

    def sample(self, rng, k):
        """`k` entries drawn by `rng` (random.Random) instead of retrieved: the paper's Table 4."""
        ids = rng.sample(list(self.texts), min(k, len(self)))
        return [Entry(id, self.texts[id]) for id in ids]

    def state(self):
        """Everything, for a JSON file; float32 survives the decimal notation exactly."""
        entries = [{"id": id, "text": text, "vector": [float(x) for x in self._vectors[self._row[id]]]}
                   for id, text in self.texts.items()]
        return {"capacity": self.capacity, "scratchpad": self.scratchpad, "next_id": self.next_id, "entries": entries}

    @classmethod
    def from_state(cls, state):
        """The memory of which `state` was taken. KeyError or TypeError if it is something else."""
        memory = cls(state["capacity"])
        for entry in state["entries"]:
            memory.next_id = entry["id"]
            memory.create(entry["text"], np.asarray(entry["vector"], np.float32))
        memory.scratchpad, memory.next_id = state["scratchpad"], state["next_id"]
        return memory


class HashedEmbedder:
    """A bag of words, hashed into `dimensions` signed buckets: no download, no training, the same on every machine."""

    def __init__(self, dimensions=1024):
        self.dimensions = dimensions

    def __call__(self, texts, query=False):
        """(B, d) float32 of unit length, or zeros for a text without a word. Queries are embedded like entries."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        for vector, text in zip(vectors, texts):
            for word in re.findall(r"\w+", text.lower()):
                bucket = zlib.crc32(word.encode())  # stable, unlike hash()
                vector[bucket % self.dimensions] += 1 if bucket >> 31 else -1
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class TransformerEmbedder:
    """Any encoder that transformers loads, from a hub name or a folder.

    A causal encoder (Qwen3-Embedding) is read at its last token, and a query is preceded by the instruction it was
    trained with; a BERT-like one is averaged over its tokens, queries like entries.
    """

    INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

    def __init__(self, model, device="cpu", batch_size=64, remembered=200_000):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.torch, self.device, self.batch_size, self.remembered = torch, device, batch_size, remembered
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
        self.model = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
        self.causal = any("CausalLM" in name for name in self.model.config.architectures or [])
        self.known = {}  # text, a query with its instruction -> (d,)

    def __call__(self, texts, query=False):
        """(B, d) float32 of unit length. A text is embedded once; the vectors of the last `remembered` ones are kept."""
        if query and self.causal:
            texts = [self.INSTRUCTION + text for text in texts]
        new = sorted({text for text in texts if text not in self.known}, key=len)  # similar lengths, little padding
        fresh = {}
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            fresh |= zip(part, self._embed(part))
        vectors = [fresh[text] if text in fresh else self.known[text] for text in texts]
        self.known |= fresh
        for text in list(self.known)[: max(0, len(self.known) - self.remembered)]:
            del self.known[text]
        return np.stack(vectors) if vectors else np.zeros((0, self.model.config.hidden_size), np.float32)

    def _embed(self, texts):
        with self.torch.no_grad():
            batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
            hidden = self.model(**batch).last_hidden_state.float()  # (B, T, d)
            mask = batch["attention_mask"]  # (B, T), zeros on the right
            if self.causal:
                pooled = hidden[self.torch.arange(len(texts)), mask.sum(1) - 1]  # (B, d)
            else:
                pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, d)
            return self.torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


@functools.cache
def load_embedder(name, device="cpu"):
    """The embedder that --embedder names, made once. Raises BadInput if transformers cannot load it."""
    if name == "hashed":
        return HashedEmbedder()
    try:
        return TransformerEmbedder(name, device)
    except (OSError, ValueError) as error:
        raise BadInput(f"--embedder {name}: transformers cannot load it: {error}") from error
