"""The language model as a policy: create or load it, sample responses, score tokens, save it.

Letters: B rows, P longest prompt, T longest prompt + response, N response tokens of all rows, D width, V vocabulary.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.utils.checkpoint import checkpoint
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from agent import TAGS, Episode, Response, fit, instruction, observe, render, run_episodes
from config import BadInput
from endpoint import Endpoint, EndpointPolicy
from memory import Memory
from scoring import scorer
from tasks import corpus

PAD, END, RESPONSE = "<pad>", "<end>", "<response>"
# The tiny model learns its task from examples, so its template leaves the system message with the instruction out.
TINY_TEMPLATE = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}" + RESPONSE
MARK = "@observation@"  # stands for the observation while a chat template is applied
LOGIT_SLICE = 2**24  # most logits in memory at once when tokens are scored


class GrowingLayer(DynamicLayer):
    """A layer of the cache that writes keys and values behind the old ones; DynamicLayer copies the old ones for every token."""

    room = 32  # tokens between two copies

    def update(self, key_states, value_states, *args, **kwargs):
        new = key_states, value_states  # (B, heads, new tokens, head dimension) each
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.buffers = [states[..., :0, :] for states in new]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.buffers[0].shape[-2]:
            more = end - start + self.room
            self.buffers = [torch.cat([old[..., :start, :], states.new_empty(*states.shape[:-2], more, states.shape[-1])], -2)
                            for old, states in zip(self.buffers, new)]
        for buffer, states in zip(self.buffers, new):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        end = self.get_seq_length()
        self.buffers = [buffer.index_select(0, indices) for buffer in self.buffers]
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)


class LanguageModel(torch.nn.Module):
    """A causal LM with its tokenizer. Calling it scores tokens (for training); `respond` samples (for rollouts)."""

    def __init__(self, model, tokenizer, config):
        super().__init__()
        if tokenizer.chat_template is None:
            raise BadInput(f"{tokenizer.name_or_path} has no chat template; use an instruction-tuned model")
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):  # Gemma 2; Cohere; Granite
            if getattr(model.config, name, None) not in (None, 1.0):
                raise BadInput(f"{tokenizer.name_or_path} transforms its logits ({name}), which the trainer does not follow")
        room = getattr(model.config, "max_position_embeddings", None)
        if room and config.max_prompt_tokens + config.max_response_tokens > room:
            raise BadInput(f"--max_prompt_tokens {config.max_prompt_tokens} and --max_response_tokens "
                           f"{config.max_response_tokens} do not fit the model's context of {room} tokens")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.temperature = config.temperature
        if config.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ends = model.generation_config.eos_token_id or []
        ends = ends if isinstance(ends, list) else [ends]
        if tokenizer.eos_token_id is None:
            raise BadInput(f"{tokenizer.name_or_path} has no end token, without which no response could end")
        self.end_ids = torch.tensor(sorted({tokenizer.eos_token_id, *ends}))  # a chat model often has two
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

    def respond(self, observations):
        """One sampled Response for each observation (`temperature` 0: the most probable tokens)."""
        prompts = self.encode(observations)
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # similar lengths, little padding
        responses = [None] * len(prompts)
        for start in range(0, len(prompts), self.config.sample_rows):
            rows = by_length[start : start + self.config.sample_rows]
            for row, (ids, logprobs, ended) in zip(rows, self._sample([prompts[row] for row in rows])):
                text = self.tokenizer.decode(ids[:-1] if ended else ids)
                responses[row] = Response(text, len(ids), prompts[row], ids, logprobs, truncated=not ended)
        return responses

    @torch.no_grad()
    def _sample(self, prompts):
        """[(ids, log-probs, whether it ended by itself)] for each prompt; the end token is the last of its ids."""
        longest, device = max(map(len, prompts)), self.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, P), padded on the left
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        self.model.eval()  # recomputing layers fill no cache
        cache, ends = DynamicCache(config=self.model.config), self.end_ids.to(device)
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        alive = torch.arange(len(prompts), device=device)  # the prompt of each row that is still in the batch
        drawn = [([], [], False) for _ in prompts]
        for _ in range(self.config.max_response_tokens):
            with self.autocast():
                logits = self.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
                                    use_cache=True, logits_to_keep=1).logits[:, -1]  # (B, V)
            logprobs = self.log_softmax(logits)
            if not logprobs.amax(-1).isfinite().all():
                raise SystemExit("the policy's probabilities are not finite: its weights are broken; a lower learning rate may help")
            token = logprobs.argmax(-1) if self.temperature == 0 else torch.multinomial(logprobs.exp(), 1)[:, 0]  # (B,)
            chosen = logprobs.gather(1, token[:, None])[:, 0]
            ended = torch.isin(token, ends)
            for row, id, logprob, end in zip(alive.tolist(), token.tolist(), chosen.tolist(), ended.tolist()):
                drawn[row] = (drawn[row][0] + [id], drawn[row][1] + [logprob], end)
            if ended.all():
                break
            ids, position = token[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if ended.any():  # finished rows leave the batch
                keep = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                ids, position, mask, alive = ids[keep], position[keep], mask[keep], alive[keep]
        return drawn

    def log_softmax(self, logits):
        """Log-probabilities (..., V) of the distribution that is sampled from: temperature, and no unknown ids."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (self.temperature or 1.0)
        logits[..., self.known_ids :] = -math.inf
        return logits.log_softmax(-1)

    # --- scoring ---

    def forward(self, rows):
        """Log-probabilities (N,) of the response tokens of `rows`, and the entropy (N,) of each one's distribution.

        rows: list of (prompt ids, response ids, ...). The N tokens come row after row, in order.
        """
        length = max(len(prompt) + len(response) for prompt, response, *_ in rows)
        ids = torch.tensor([prompt + response + [0] * (length - len(prompt) - len(response)) for prompt, response, *_ in rows])
        # The token at position t is predicted at t - 1. Masks come from lengths alone, never from token values.
        where = torch.tensor([row * length + len(prompt) - 1 + t
                              for row, (prompt, response, *_) in enumerate(rows) for t in range(len(response))],
                             dtype=torch.long, device=self.device)
        targets = torch.tensor([id for _, response, *_ in rows for id in response], dtype=torch.long, device=self.device)
        for layer in self.model.modules() if self.config.recompute else ():
            if isinstance(layer, GradientCheckpointingLayer):  # looks at its own flag; the others' would switch dropout on
                layer.training = torch.is_grad_enabled()
        # Padding stands on the right, where a causal model's real tokens never see it: no attention mask is needed.
        with self.autocast():
            hidden = self.model.get_decoder()(input_ids=ids.to(self.device), use_cache=False).last_hidden_state  # (B, T, D)
        hidden = hidden.flatten(0, 1)[where]  # (N, D)
        tokens = max(1, LOGIT_SLICE // self.model.config.vocab_size)
        parts = [checkpoint(self._score, h, t, use_reentrant=False) if len(hidden) > tokens else self._score(h, t)
                 for h, t in zip(hidden.split(tokens), targets.split(tokens))]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _score(self, hidden, targets):
        with self.autocast():
            logits = self.model.get_output_embeddings()(hidden)
        logprobs = self.log_softmax(logits)  # (n, V)
        with torch.no_grad():
            entropy = -torch.xlogy(logprobs.exp(), logprobs.exp()).sum(-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropy

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

    Heads of 64 dimensions: Qwen3's QK-norm caps how sharp smaller ones can attend. Matrices of variance 1 / width, since
    transformers' 0.02 is meant for widths in the thousands. Embeddings of variance 1, which a tied head would not bear: names
    that start out almost equal, and then share most of their gradients, are told apart late.
    """
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=config.hidden_size, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, head_dim=64,
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
