"""The language model as a policy: create or load it, sample responses, score tokens, save it.

Letters: B rows, P longest prompt, T longest prompt + response, N response tokens of all rows, D width, V vocabulary.
"""

import math
from contextlib import contextmanager
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)
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
        raise BadInput(f"{name}: transformers cannot load this model: {error}") from error
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


# --- for both trainers -----------------------------------------------------------------------------------------------


def make_optimizers(policy, lr, kind):
    """Optimisers that together cover all parameters, on fp32 master weights.

    'muon': torch's Muon for the matrices inside the blocks, with updates scaled to AdamW's size; AdamW for embeddings, head and
    norms, at 0.3 of the learning rate. 'adamw': AdamW alone. No weight decay.
    """
    embeddings = {id(module.weight) for module in policy.modules() if isinstance(module, torch.nn.Embedding)}
    embeddings.add(id(policy.model.get_output_embeddings().weight))
    matrices = [p for p in policy.parameters() if p.ndim == 2 and id(p) not in embeddings] if kind == "muon" else []
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    optimizers = [torch.optim.AdamW(others, lr=0.3 * lr if matrices else lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def scale_lr(optimizers, factor):
    """Set the learning rates to `factor` times those of make_optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


def schedule(step, steps, warmup, decay):
    """Factor on the learning rate at `step`, 1 to `steps`: linear warm-up, constant, linear to 0 over the last share `decay`.

    >>> [schedule(step, 10, warmup=2, decay=0.5) for step in (1, 2, 5, 6, 8, 10)]
    [0.5, 1.0, 1.0, 1.0, 0.6, 0.2]
    """
    falling = (steps + 1 - step) / (decay * steps) if decay else 1.0
    return min(1.0, step / max(1, warmup), falling)


def clip_and_step(policy, optimizers, max_norm):
    """Clip the gradient, step and zero it. Returns its norm before clipping; a step with a non-finite one is left out."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()  # sharded weights have a sharded norm
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return norm


def count_bad_steps(before, norms):
    """How many steps in a row had a gradient that was not finite, given the number `before` this one. SystemExit at 3."""
    bad = 0 if all(map(math.isfinite, norms)) else before + 1
    if bad == 3:
        raise SystemExit("the gradient was not finite in 3 steps running, so the run stops; such steps leave the weights "
                         "alone, and the checkpoints are sound. A lower learning rate may help")
    return bad


def micro_batches(rows, max_tokens):
    """Split `rows` of (prompt ids, response ids, ...) into lists of at most `max_tokens`, padding included.

    Rows of similar length go together; the longest come first, so that running out of memory shows at once.
    """
    batches, width = [], 0
    for row in sorted(rows, key=lambda row: -len(row[0]) - len(row[1])):
        if not batches or width * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
            width = len(row[0]) + len(row[1])  # the longest of this batch
        batches[-1].append(row)
    return batches


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
