"""The language model as a policy: create or load it, sample responses, score tokens, save it.

Letters: B distinct rows, T longest prompt + response, N response tokens of all rows, D width, V vocabulary.
"""

import random
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model, repeat_kv, rotate_half

import sampling
from agent import TAGS, Episode, fit, instruction, observe, render, run_episodes
from config import BadInput
from endpoint import Endpoint, EndpointPolicy
from memory import Memory
from optim import numbered
from scoring import scorer
from tasks import corpus

PAD, END, RESPONSE = "<pad>", "<end>", "<response>"
# The tiny model learns its task from examples, so its template leaves the system message with the instruction out.
TINY_TEMPLATE = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}" + RESPONSE
MARK = "@observation@"  # stands for the observation while a chat template is applied
LOGIT_SLICE = 2**24  # most logits in memory at once when tokens are scored


class LastLayer(Qwen3DecoderLayer):
    """The last layer of a Qwen3, which can skip tokens that are not scored, but for their keys and values: later tokens attend to those.

    A training step of the tiny model, of three layers, takes 0.8 to 0.85 of the time. Attention is torch's, whatever the model's setting.
    """

    def forward(self, hidden_states, *args, scored=None, position_embeddings=None, **kwargs):
        """Hidden states (B, T, D) to those of the N tokens at `scored`, ascending places in B x T: (N, D). Without it, all: (B, T, D).

        H heads of d dimensions; R: the most scored tokens in any row.
        """
        if scored is None:
            return super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        attention, length = self.self_attn, hidden_states.shape[1]
        cos, sin = (part[0, :, None] for part in position_embeddings)  # (T, 1, d)

        def heads(projection, x):
            return projection(x).unflatten(-1, (-1, attention.head_dim))

        def turned(x, cos, sin):
            return x * cos + rotate_half(x) * sin

        x, out = self.input_layernorm(hidden_states), hidden_states.flatten(0, 1)[scored]
        keys, values = turned(attention.k_norm(heads(attention.k_proj, x)), cos, sin), heads(attention.v_proj, x)  # (B, T, fewer, d)
        keys, values = (repeat_kv(part.transpose(1, 2), attention.num_key_value_groups) for part in (keys, values))  # (B, H, T, d)
        row, time = scored // length, scored % length  # (N,)
        queries = turned(attention.q_norm(heads(attention.q_proj, x.flatten(0, 1)[scored])), cos[time], sin[time])  # (N, H, d)
        place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # (N,), which one of its row
        shape = len(x), int(place.max()) + 1 if len(row) else 1  # (B, R); a process that has no rows scores nothing
        queries = queries.new_zeros(*shape, *queries.shape[1:]).index_put((row, place), queries)  # (B, R, H, d)
        # A place that holds no token sees the first one, since of nothing at all there is no mean.
        seen = torch.arange(length, device=row.device) <= time.new_zeros(shape).index_put((row, place), time)[..., None]  # (B, R, T)
        mixed = scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=attention.scaling)
        out = out + attention.o_proj(mixed.transpose(1, 2)[row, place].flatten(1))
        return out + self.mlp(self.post_attention_layernorm(out))


class LanguageModel(torch.nn.Module):
    """A causal LM with its tokenizer. Calling it scores tokens (for training); `respond` samples (for rollouts)."""

    def __init__(self, model, tokenizer, config):
        super().__init__()
        if tokenizer.chat_template is None:
            raise BadInput(f"{tokenizer.name_or_path} has no chat template; use an instruction-tuned model")
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):  # Gemma 2; Cohere; Granite
            if getattr(model.config, name, None) not in (None, 1.0):
                raise BadInput(f"{tokenizer.name_or_path} transforms its logits ({name}), which the trainer does not follow")
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise BadInput(f"{tokenizer.name_or_path} has layers ({', '.join(sorted(kinds))}) whose state sampling.py does not keep")
        room = getattr(model.config, "max_position_embeddings", None)
        if room and config.max_prompt_tokens + config.max_response_tokens > room:
            raise BadInput(f"--max_prompt_tokens {config.max_prompt_tokens} and --max_response_tokens "
                           f"{config.max_response_tokens} do not fit the model's context of {room} tokens")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.temperature = config.temperature
        decoder = model.get_decoder()  # selects: it can be asked for the hidden states of some tokens alone
        self.selects = isinstance(decoder, Qwen3Model) and not decoder.layers[-1].self_attn.sliding_window
        if self.selects:
            decoder.layers[-1].__class__ = LastLayer
        if config.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ends = model.generation_config.eos_token_id or []
        ends = ends if isinstance(ends, list) else [ends]
        if tokenizer.eos_token_id is None:
            raise BadInput(f"{tokenizer.name_or_path} has no end token, without which no response could end")
        self.end_ids = {tokenizer.eos_token_id, *ends}  # a chat model often has two
        # A checkpoint's vocabulary may be padded to a round size: ids beyond the tokenizer's are never sampled.
        self.known_ids = min(len(tokenizer), model.config.vocab_size)

    @property
    def device(self):
        return self.model.device

    def autocast(self):
        """bf16 on a GPU, in sampling and scoring alike; the weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # --- prompts ---

    def encode(self, observations):
        """Prompt token ids of each observation, shortened by agent.fit where they do not fit."""
        prompts = self.frame([render(observation) for observation in observations])
        for row, observation in enumerate(observations):
            if len(prompts[row]) > self.config.max_prompt_tokens:
                fit(observation, lambda o: len(self.frame([render(o)])[0]), self.config.max_prompt_tokens)
                prompts[row] = self.frame([render(observation)])[0]
        return prompts

    def frame(self, texts):
        """The template's ids around those of each text, in which a tag or a special token's name is nothing but text."""
        messages = [{"role": "system", "content": instruction(self.config)}, {"role": "user", "content": MARK}]
        try:
            frame = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        except TemplateError as error:
            raise BadInput(f"{self.tokenizer.name_or_path}: its chat template refuses the prompt: {error}") from error
        before, after = self.tokenizer(frame.split(MARK), add_special_tokens=False)["input_ids"]
        shown = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [before + ids + after for ids in shown]

    def count(self, texts, written=False):
        """Number of tokens of each text that is shown; written: of each response, in which a tag counts as one."""
        return list(map(len, self.tokenizer(texts, add_special_tokens=False, split_special_tokens=not written)["input_ids"]))

    # --- sampling ---

    def serve(self, waiting):
        """See sampling.serve (`temperature` 0: the most probable tokens)."""
        return sampling.serve(self, waiting)

    def respond(self, observations):
        """One sampled Response for each observation."""
        waiting = deque((number, observation, random.Random(random.random())) for number, observation in enumerate(observations))
        responses = {item[0]: response for finished in self.serve(waiting) for item, response in finished}
        return [responses[number] for number in range(len(observations))]

    def scaled(self, logits):
        """The logits in float32 (..., V) of the distribution that is sampled from: temperature, and no unknown ids."""
        logits = logits[..., : self.known_ids]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / (self.temperature or 1.0)

    # --- scoring ---

    def forward(self, rows):
        """Log-probabilities (N,) of the response tokens of `rows`, and the entropy (N,) of each one's distribution.

        rows: list of (prompt ids, response ids, ...). The N tokens come row after row, in order. Rows that are the same, as the
        first turns of a group's episodes often are, go through the model once.
        """
        distinct = numbered((tuple(prompt), tuple(response)) for prompt, response, *_ in rows)
        length = max(len(prompt) + len(response) for prompt, response in distinct)
        ids = torch.tensor([[*prompt, *response, *[0] * (length - len(prompt) - len(response))] for prompt, response in distinct])  # (B, T)
        # The token at position t is predicted at t - 1. Masks come from lengths alone, never from token values.
        first = [distinct[tuple(prompt), tuple(response)] * length + len(prompt) - 1 for prompt, response, *_ in rows]
        where = torch.tensor([place + t for place, row in zip(first, rows) for t in range(len(row[1]))], dtype=torch.long)
        where, which = where.unique(return_inverse=True)  # the tokens of distinct rows, and which of them each of the N is
        targets = ids.flatten()[where + 1].to(self.device)
        for layer in self.model.modules() if self.config.recompute else ():
            if isinstance(layer, GradientCheckpointingLayer):  # looks at its own flag; the others' would switch dropout on
                layer.training = torch.is_grad_enabled()
        where = where.to(self.device)
        scored = {"scored": where} if self.selects else {}
        # Padding stands on the right, where a causal model's real tokens never see it: no attention mask is needed.
        with self.autocast():
            hidden = self.model.get_decoder()(input_ids=ids.to(self.device), use_cache=False, **scored).last_hidden_state
        if not self.selects:
            hidden = hidden.flatten(0, 1)[where]  # from (B, T, D) to (tokens of distinct rows, D)
        tokens = max(1, LOGIT_SLICE // self.model.config.vocab_size)
        parts = [checkpoint(self._score, h, t, use_reentrant=False) if len(hidden) > tokens else self._score(h, t)
                 for h, t in zip(hidden.split(tokens), targets.split(tokens))]
        which = which.to(self.device)
        return torch.cat([part[0] for part in parts])[which], torch.cat([part[1] for part in parts])[which]

    def _score(self, hidden, targets):
        with self.autocast():
            logits = self.model.get_output_embeddings()(hidden)
        logits = self.scaled(logits)  # (n, V)
        total = logits.logsumexp(-1)  # (n,)
        with torch.no_grad():
            entropy = total - ((logits - total[:, None]).exp() * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - total, entropy

    # --- files ---

    def save(self, folder, weights=None):
        """Write a folder that AutoModelForCausalLM and AutoTokenizer open. weights: the state dictionary, if not the model's."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def open_policy(name, config, dtype=torch.float32):
    """The policy saved in a folder or a run folder, or a pretrained model by its hub name; for "" a new tiny model for config.task.

    dtype: to be trained, a model needs fp32 weights; bf16 is for autocast.
    """
    if not name:
        return create_tiny(train_tokenizer(corpus(config), config, word_level=config.task == "town"), config)
    name = str(Path(name) / "model") if (Path(name) / "model").is_dir() else name
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise BadInput(f"{name}: " + "no such folder, and " * (not Path(name).exists()) + f"transformers cannot load this model: {error}") from error
    return LanguageModel(model, tokenizer, config)


def open_player(name, config, device):
    """A policy that plays and is not trained: with --endpoint, the one that the server has under `name`, else open_policy's.

    On a GPU a pretrained model is in bf16, since autocast would convert all of its weights for every token.
    """
    if config.endpoint and not name:
        raise BadInput("--endpoint needs the model's name at that server: --model NAME (or --teacher NAME)")
    if config.endpoint:
        file = Path("runs") / config.name / "responses.jsonl"
        return EndpointPolicy(Endpoint(config.endpoint, name, file, config.in_flight, config.seed, config.overwrite), config)
    return open_policy(name, config, torch.bfloat16 if name and config.model and device.type == "cuda" else torch.float32).to(device)


def create_tiny(tokenizer, config):
    """A Qwen3 with random weights, made so that a small one learns.

    Heads of 64 dimensions: Qwen3's QK-norm caps how sharp smaller ones can attend. One head of keys and values for all of them: it
    learns as well as one for each, and costs a quarter less. Matrices of variance 1 / width, since
    transformers' 0.02 is meant for widths in the thousands. Embeddings of variance 1, which a tied head would not bear: names
    that start out almost equal, and then share most of their gradients, are told apart late.
    """
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden_size, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=1, head_dim=64,
        intermediate_size=2 * config.hidden_size, initializer_range=config.hidden_size**-0.5, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.max_prompt_tokens)},  # short texts, fast turns
        max_position_embeddings=config.max_prompt_tokens + config.max_response_tokens,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return LanguageModel(model, tokenizer, config)


def train_tokenizer(texts, config, word_level):
    """The tiny model's tokenizer: the words of `texts` (word level), or a byte-level BPE trained on them.

    The tags of the dialect are single tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, END, RESPONSE] + [f"<{slash}{tag}>" for tag in TAGS[config.dialect].values() for slash in ("", "/")]
    if word_level:
        tokenizer = Tokenizer(models.WordLevel(unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
        trainer = trainers.WordLevelTrainer(special_tokens=special)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=config.vocab_size, special_tokens=special,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=TINY_TEMPLATE,
                                   clean_up_tokenization_spaces=False)


# --- playing ------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(policy, config):
    """Inside, `policy` plays at the evaluation temperature, by the settings, and with the prompts, of `config`."""
    before = policy.config, getattr(policy, "temperature", None)  # a scripted policy has no temperature
    policy.config, policy.temperature = config, config.eval_temperature
    try:
        yield policy
    finally:
        policy.config, policy.temperature = before


def evaluate(policy, tasks, config, embed, progress=lambda turns, done: None):
    """Episodes of `tasks`, under `evaluating`."""
    with evaluating(policy, config):
        return run_episodes(tasks, policy, config, embed, scorer(config), progress)


def check_prompts(policy, tasks, config):
    """BadInput, before any long work, if the first text and questions of a task do not fit the prompt."""
    policy.encode([observe(Episode(task, Memory()), config, None) for task in tasks])
