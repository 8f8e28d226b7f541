"""The language model: load it, sample responses, score tokens, save it.

Letters: B rows, U unique rows, P longest prompt, T longest prompt + response (P and T do not count
a shared prefix), n response tokens of all rows, u of the unique rows, D width, V vocabulary.
"""

import os
import random
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from agent import Observation, Response, instruction, render
from chat import Chat, fit
from config import BadInput, Config, need

LOGIT_SLICE = 2**24  # most logits in memory at once while tokens are scored
SHORT_PREFIX = 64  # fewer common tokens are not worth a pass of their own
logging.disable_progress_bar()  # transformers would show one for every checkpoint


@dataclass
class Sample:
    """One turn to train on. Every turn was a fresh prompt, so it is one independent row."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float] = field(default_factory=list)  # as the sampler computed them
    advantage: float = 0.0
    old_logprobs: torch.Tensor | None = None  # (n,), before the first of several updates

    @property
    def key(self) -> tuple:
        """Equal for samples with the same tokens."""
        return tuple(self.prompt_ids), tuple(self.response_ids)


class LanguageModel(torch.nn.Module):
    """A causal LM and its tokenizer. `respond` samples; calling the module scores tokens.

    temperature: for sampling and scoring (0: greedy). Default: config.temperature.
    """

    def __init__(self, model, tokenizer, config: Config, temperature: float | None = None):
        super().__init__()
        check_model(model, tokenizer, config)
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.temperature = config.temperature if temperature is None else temperature
        model.eval()  # no dropout
        if config.gradient_checkpointing and not model.is_activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():  # one is only recomputed if its own `training` is True
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = config.gradient_checkpointing
        # Checkpointed layers train without a cache. MPT and GPT-Neo count padding after a prefix.
        unsuited = config.gradient_checkpointing or model.config.model_type in ("mpt", "gpt_neo")
        self.share_prefix = not (unsuited or any(DynamicCache(config=model.config).is_sliding))
        self.chat = Chat(tokenizer, config.instruction or instruction(config))
        ends = model.generation_config.eos_token_id  # a chat model often has two
        self.end_ids = {self.chat.end_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        # A checkpoint may pad its vocabulary. Ids that the tokenizer lacks are never sampled.
        self.known_ids = min(len(tokenizer), model.config.get_text_config().vocab_size)

    def with_config(self, config: Config, temperature: float) -> "LanguageModel":
        """The same weights under other settings, for evaluation."""
        return LanguageModel(self.model, self.tokenizer, config, temperature)

    def autocast(self) -> torch.autocast:
        """For all passes of the model. Weights that are trained stay fp32."""
        dtype = compute_dtype(self.config, self.model.device)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)

    # --- prompts ---

    def encode(self, observations: list[Observation]) -> list[tuple[Observation, list[int]]]:
        """[(observation, prompt ids)]. Observations that are too long are shortened by `fit`."""
        limit, encoded = self.config.max_prompt_tokens, []
        prompts = self.chat.encode_prompts([render(observation) for observation in observations])
        for observation, ids in zip(observations, prompts):
            if len(ids) > limit:
                observation = fit(observation, self.prompt_length, limit)
                [ids] = self.chat.encode_prompts([render(observation)])
            encoded.append((observation, ids))
        return encoded

    def shorten(self, observation: Observation) -> Observation:
        """The observation as this model sees it, shortened if it is too long."""
        return self.encode([observation])[0][0]

    def prompt_length(self, observation: Observation) -> int:
        return len(self.chat.encode_prompts([render(observation)])[0])

    def count(self, texts: list[str]) -> list[int]:
        """The number of tokens of each text."""
        return [len(ids) for ids in self.chat.encode(texts)]

    # --- sampling ---

    @torch.no_grad()
    def respond(self, observations: list[Observation]) -> list[Response]:
        """One sampled Response per observation. Batches of `sample_rows`, longest prompts first."""
        encoded = self.encode(observations)
        order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row][1]))
        responses = {}
        for start in range(0, len(order), self.config.sample_rows):
            rows = order[start : start + self.config.sample_rows]
            prompts = [encoded[row][1] for row in rows]
            sampled = self.sample(prompts, [observations[row].rng for row in rows])
            for row, (ids, logprobs) in zip(rows, sampled):
                shown, prompt = encoded[row]
                ended = ids[-1] in self.end_ids
                text = self.chat.decode(ids[:-1] if ended else ids)
                responses[row] = Response(
                    text, len(ids), prompt, ids, logprobs, truncated=not ended, observation=shown
                )
        return [responses[row] for row in range(len(observations))]

    def sample(self, prompts: list[list[int]], rngs: list[random.Random]) -> list[tuple]:
        """[(ids, log-probs)]: one response per prompt, drawn with that prompt's generator.

        Equal prompts are read once and then fanned out. A row that has ended leaves the batch.
        """
        unique, inverse = unique_rows(map(tuple, prompts))
        cache, shared = self.read_prefix(unique, max_tokens=min(map(len, unique)) - 1)
        rest = [row[shared:] for row in unique]
        longest = max(map(len, rest))  # P
        ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rest])  # (U, P)
        mask = [[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in rest]
        parts = (ids, torch.tensor(mask), torch.tensor(inverse))
        ids, mask, inverse = (part.to(self.model.device) for part in parts)
        logits = self.next_logits(ids, mask, cache)[inverse]  # (B, V)
        cache.batch_select_indices(inverse)
        mask = mask[inverse]  # (B, shared + P)
        ends = torch.tensor(sorted(self.end_ids), device=ids.device)
        running = list(range(len(prompts)))  # the index of each row's prompt
        responses = [([], []) for _ in prompts]
        while True:
            tokens, logprobs = self.draw(logits, [rngs[row] for row in running])  # (B,) each
            for row, token, logprob in zip(running, tokens.tolist(), logprobs.tolist()):
                responses[row][0].append(token)
                responses[row][1].append(logprob)
            keep = ~torch.isin(tokens, ends)  # (B,)
            if len(responses[running[0]][0]) == self.config.max_response_tokens or not keep.any():
                return responses
            if not keep.all():
                kept = keep.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                tokens, mask = tokens[kept], mask[kept]
                running = [running[i] for i in kept.tolist()]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self.next_logits(tokens[:, None], mask, cache)

    def next_logits(self, ids: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
        """Logits (B, V) of the token after `ids` (B, t). mask: (B, cached + t), 0 on padding."""
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        with self.autocast():
            output = self.model(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def draw(self, logits: torch.Tensor, rngs: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token per row: ids (B,), log-probs (B,). SystemExit if one is not finite."""
        logits = self.scaled(logits)  # (B, V)
        total = logits.logsumexp(-1, keepdim=True)  # (B, 1)
        if not total.isfinite().all():
            raise SystemExit(
                "the policy's probabilities are not finite, so its weights are broken; "
                "a lower learning rate may help"
            )
        if self.temperature == 0:
            token = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:  # invert the cumulative distribution, in float64 so that rare tokens are not lost
            probs = (logits - total).exp()
            probs = probs.cpu() if probs.device.type == "mps" else probs  # MPS has no float64
            cumulative = probs.cumsum(-1, dtype=torch.float64)
            uniform = torch.tensor([[rng.random()] for rng in rngs], dtype=torch.float64)
            threshold = uniform.to(cumulative.device) * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, threshold, right=True).to(logits.device)
        return token[:, 0], (logits.gather(1, token) - total)[:, 0]

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """fp32 logits (..., known ids), divided by the temperature, of ids the tokenizer knows."""
        logits = logits[..., : self.known_ids]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)) / (self.temperature or 1)

    def read_prefix(self, rows: list, max_tokens: int) -> tuple[DynamicCache, int]:
        """Run the common prefix of the rows, template and instruction, through the model once.

        Returns (a cache with the prefix's keys and values for each row, the prefix's length). The
        cache is empty and the length 0 if a separate pass for the prefix would not pay off.
        """
        cache = DynamicCache(config=self.model.config)
        prefix = os.path.commonprefix(rows)[:max_tokens]
        least = max(SHORT_PREFIX, max(map(len, rows)) // 4)
        if not self.share_prefix or len(rows) == 1 or len(prefix) < least:
            return cache, 0
        ids = torch.tensor([prefix], device=self.model.device)
        with self.autocast():
            self.model.get_decoder()(input_ids=ids, cache=cache, use_cache=True)
        # All rows share the one prefix, so its gradient is the sum over the rows.
        cache.batch_repeat_interleave(len(rows))
        return cache, len(prefix)

    # --- scoring ---

    def forward(self, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs (n,) of the response tokens, and entropies (n,) of the distributions at their
        positions, both in the order of `samples`. Equal rows go through the model once."""
        unique, inverse = unique_rows(sample.key for sample in samples)
        rows = [[*prompt, *response] for prompt, response in unique]
        shortest = min(len(prompt) for prompt, _ in unique)
        cache, shared = self.read_prefix(rows, max_tokens=shortest - 1)
        rest = [row[shared:] for row in rows]
        longest = max(map(len, rest))  # T
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rest])  # (U, T)
        ids = ids.to(self.model.device)
        # Attention is causal: tokens never see the padding on their right, so no mask is needed.
        with self.autocast():
            decoder = self.model.get_decoder()
            past = cache if shared else None
            hidden = decoder(input_ids=ids, cache=past, use_cache=shared > 0).last_hidden_state
        # The token at position t is predicted at t - 1. Only lengths matter, not token values.
        starts = [len(prompt) - shared - 1 for prompt, _ in unique]
        sizes = [len(response) for _, response in unique]
        spans = [slice(start, start + size) for start, size in zip(starts, sizes)]
        hidden = torch.cat([row[span] for row, span in zip(hidden, spans)])  # (u, D)
        targets = torch.cat([row[1:][span] for row, span in zip(ids, spans)])  # (u,)
        logprobs, entropy = self.score_tokens(hidden, targets)
        logprobs, entropy = logprobs.split(sizes), entropy.split(sizes)
        return torch.cat([logprobs[i] for i in inverse]), torch.cat([entropy[i] for i in inverse])

    def score_tokens(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple:
        """Log-probs (u,), entropies (u,). Computed in slices, and again in the backward pass, so
        that the logits (u, V) are never all in memory."""
        size = max(1, LOGIT_SLICE // self.known_ids)
        parts = zip(hidden.split(size), targets.split(size))
        scored = [checkpoint(self.score_slice, *part, use_reentrant=False) for part in parts]
        logprobs, entropies = zip(*scored)
        return torch.cat(logprobs), torch.cat(entropies)

    def score_slice(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple:
        with self.autocast():
            logits = self.head(hidden)
        logits = self.scaled(logits)  # (u, V)
        total = logits.logsumexp(-1)  # (u,)
        with torch.no_grad():
            entropy = total - ((logits - total[:, None]).exp() * logits).sum(-1)
        return logits.gather(1, targets[:, None])[:, 0] - total, entropy

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (u, V) of hidden states (u, D)."""
        logits = self.model.get_output_embeddings()(hidden)
        return self.softcap * (logits / self.softcap).tanh() if self.softcap else logits

    # --- files ---

    def save(self, folder: str | Path, weights: dict | None = None):
        """Write a folder for from_pretrained. weights: a state dict to save instead of its own."""
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: that of --bf16, or bf16 on a GPU and fp32 elsewhere."""
    bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
    return torch.bfloat16 if bf16 else torch.float32


def check_model(model, tokenizer, config: Config):
    """Raises BadInput if the model cannot be sampled and scored correctly here."""
    name, text = tokenizer.name_or_path, model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    need(not kinds, f"{name} has layers whose state sampling cannot keep: {', '.join(kinds)}")
    context = getattr(text, "max_position_embeddings", None)
    longest = config.max_prompt_tokens + config.max_response_tokens
    short = f"the context of {name} is {context} tokens, and --max_prompt_tokens and"
    need(not context or longest <= context, f"{short} --max_response_tokens ask for {longest}")


def unique_rows(rows: Iterable[Hashable]) -> tuple[list, list[int]]:
    """(the distinct rows in order of appearance, each row's index among them)."""
    index, which = {}, []
    for row in rows:
        which.append(index.setdefault(row, len(index)))
    return list(index), which


def load_policy(name: str | Path, config: Config, dtype=torch.float32) -> LanguageModel:
    """Load a policy by folder or hub name. Training needs fp32. The text part alone is trained.
    Raises BadInput if it cannot be loaded, sampled or scored."""
    try:
        auto = auto_class(AutoConfig.from_pretrained(name))
        model, info = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises errors of many kinds
        missing = "" if Path(name).exists() else "there is no such folder, and "
        reason = " ".join(str(error).split())
        raise BadInput(f"{name}: {missing}transformers cannot load it: {reason}") from error
    need(not info["missing_keys"], f"{name} lacks weights: {sorted(info['missing_keys'])[:3]}")
    policy = LanguageModel(model, tokenizer, config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    model.requires_grad_(False)
    for part in (decoder, head):
        part.requires_grad_(True)
    with torch.no_grad():  # does `forward` score what `sample` will draw from?
        ids = torch.arange(min(8, policy.known_ids))[None]
        logits = policy.head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
        expected = model(input_ids=ids).logits
        same = torch.allclose(logits.float(), expected.float(), 1e-3, 1e-3, equal_nan=True)
    need(same, f"{name} transforms its logits in a way that scoring does not support")
    return policy


def auto_class(config) -> type:
    """The class that loads a model of this configuration. Multimodal ones may have their own."""
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText
