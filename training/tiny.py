"""The tiny model that learns the built-in task on a CPU: a new Qwen3 and its tokenizer."""

import json
from itertools import product

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agent import FORMS, TAGS
from chat import NO_INSTRUCTION
from config import Config
from policy import LanguageModel
from tasks import town

PAD, END, RESPONSE = "<pad>", "<end>", "<response>"
# The tiny model learns its task from examples, so its template leaves out the instruction.
TINY_TEMPLATE = (
    NO_INSTRUCTION
    + "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    + RESPONSE
)


def create_policy(config: Config) -> LanguageModel:
    """A new tiny Qwen3 with random weights, and a tokenizer of the town's words.

    These choices help a small model learn. Heads have 64 dimensions, because QK-norm limits how
    sharply smaller ones attend. One key-value head learns as well as four and costs a quarter less.
    Matrices have variance 1 / width: transformers' deviation of 0.02 is for widths in the
    thousands. Embeddings have variance 1 and are not tied to the head. Otherwise all names start
    almost equal and share most of their gradients, so the model learns late to tell them apart.
    """
    tokenizer = train_tokenizer(config)
    torch.manual_seed(config.seed)
    qwen3 = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=2 * config.hidden_size,
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.max_prompt_tokens)},
        max_position_embeddings=config.max_prompt_tokens + config.max_response_tokens,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(qwen3)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return LanguageModel(model, tokenizer, config)


def train_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """A tokenizer of the town's words. Each tag of the dialect, and what it adds, is one token."""
    control = [PAD, END, RESPONSE]
    tags = [f"<{slash}{tag}>" for tag in TAGS[config.dialect].values() for slash in ("", "/")]
    number, answer = FORMS[config.dialect]  # such as "Memory 2" and \boxed{text}
    tags += filter(None, [number.rstrip(" 2"), *answer.split("text")])
    # An unknown word becomes "?". If it became PAD, an entry with one would end the run.
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    trainer = trainers.WordLevelTrainer(special_tokens=control + tags)
    tokenizer.train_from_iterator(town_texts(), trainer)
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:  # tags are not special tokens: responses contain them
        token["special"] = token["content"] in control
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=PAD,
        eos_token=END,
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def town_texts() -> list[str]:
    """Texts with every word of the town's prompts, for the tokenizer."""
    found = ["none", town.sentence("pet", town.NAMES[0], None) + "."]
    found += ["Questions: Question: Scratchpad: Query: Text: #", *map(str, range(100))]
    for kind, name in product(town.SENTENCES, town.NAMES):
        found += [town.sentence(kind, name, value) for value in town.VALUES.get(kind, [""])]
    return found + [question.format(name=town.NAMES[0]) for question in town.QUESTIONS.values()]
