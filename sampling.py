"""Sampling: a batch whose rows come and go, so that no episode waits for the slowest of the others.

`serve(policy, waiting)` decodes all that waits, and what is put there meanwhile, and yields responses as they are finished. On a GPU a
bf16 model leaves that to transformers' continuous batching (a paged cache, shared prefixes, CUDA graphs) where flash-attention is
installed: without it that would score each row against the keys of all.

Letters: n rows in the batch, m rows that join it, P longest prompt of those, W longest row (prompt + response so far), H heads,
d head dimension, V vocabulary.
"""

import gc
import itertools
import math
import random
from dataclasses import dataclass, field

import torch
import transformers
from transformers import Cache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.utils import is_flash_attn_2_available

from agent import Response
from optim import micro_batches, numbered

# Rows join the batch when there are this many of them for each that is in it: few large forward passes cost less than many small ones.
JOIN_SHARE = 0.25
NOT_FINITE = "the policy's probabilities are not finite: its weights are broken; a lower learning rate may help"


@dataclass
class Row:
    """A response in the making, and the item of `waiting` that it answers."""

    item: tuple
    prompt: list
    rng: random.Random  # its episode's own: what it draws does not depend on the other rows
    ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)

    def __len__(self):
        return len(self.prompt) + len(self.ids)


# --- the cache -----------------------------------------------------------------------------------------------------


class RowCache(Cache):
    """Keys and values of rows that all end at the same column: a row of w tokens takes the columns end - w to end - 1.

    So a row is written into a free place whatever the lengths of the others, a row that is done leaves its place to the last one,
    and each token is one more column. The whole is copied when the columns are used up (SPARE of them at a time), and for more or
    longer rows than ever before.
    """

    SPARE = 32

    def __init__(self, layers):
        self.rows = 0  # in the batch
        self.joining = None  # in a forward pass of prompts: for each row that joins, behind the others, the number of its prompt
        self.start = self.end = 0  # columns of the longest row
        self.places = self.columns = 0  # size of the buffers
        super().__init__(layers=[RowLayer(self) for _ in range(layers)])

    def reserve(self, rows, width):
        """Room for `rows` rows in all, the longest of `width` tokens, and one more column."""
        if rows <= self.places and width <= self.end < self.columns:
            return
        kept, end = self.end - self.start, max(width, self.end - self.start)
        self.places, self.columns = max(rows, self.places), end + self.SPARE
        for layer in self.layers:
            for number, old in enumerate(layer.buffers):
                # Zeros: what stands in unused columns has no weight in the attention, but zero times NaN is NaN.
                layer.buffers[number] = new = old.new_zeros(self.places, old.shape[1], self.columns, old.shape[3])
                new[: self.rows, :, end - kept : end] = old[: self.rows, :, self.start : self.end]
        self.start, self.end = end - kept, end

    def move(self, places, sources):
        """Write the rows at `sources` over those at `places`."""
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer[places, :, self.start : self.end] = buffer[sources, :, self.start : self.end]


class RowLayer(DynamicLayer):
    """One layer of a RowCache. buffers: keys and values, (places, H, columns, d) each."""

    def __init__(self, cache):
        super().__init__()
        self.cache, self.buffers = cache, []

    def get_seq_length(self):
        return 0 if self.cache.joining is not None else self.cache.end - self.cache.start

    def update(self, key_states, value_states, *args, **kwargs):
        cache, new = self.cache, (key_states, value_states)  # (at most m, H, P, d) each, or (n, H, 1, d)
        if not self.buffers:
            self.buffers = [states.new_zeros(cache.places, states.shape[1], cache.columns, states.shape[3]) for states in new]
        if cache.joining is not None:
            for buffer, states in zip(self.buffers, new):
                buffer[cache.rows : cache.rows + len(cache.joining), :, cache.end - states.shape[2] : cache.end] = states[cache.joining]
            return new  # rows that join see nothing but themselves
        for buffer, states in zip(self.buffers, new):
            buffer[: cache.rows, :, cache.end : cache.end + 1] = states
        return tuple(buffer[: cache.rows, :, cache.start : cache.end + 1] for buffer in self.buffers)


# --- the loop ------------------------------------------------------------------------------------------------------


def serve(policy, waiting):
    """Yields [(item, Response)], some at a time, until `waiting` is empty and all are answered.

    waiting: a deque of items (number, observation, random.Random), to which the caller may append between two yields.
    """
    paged = policy.device.type == "cuda" and policy.model.dtype == torch.bfloat16 and is_flash_attn_2_available() and has_pages()
    return (serve_paged if paged else serve_rows)(policy, waiting)


@torch.no_grad()
def serve_rows(policy, waiting):
    """serve, with the loop below. Each token takes one number of its item's generator, so that a response does not depend on what else
    is in the batch, but for rounding.
    """
    config = policy.config
    policy.model.eval()  # recomputing layers fill no cache
    cache, rows = RowCache(policy.model.config.get_text_config().num_hidden_layers), []
    while waiting or rows:
        free = config.sample_rows - len(rows)
        if waiting and free and len(waiting) >= JOIN_SHARE * len(rows):
            items = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            prompts = policy.encode([observation for _, observation, _ in items])
            new = [Row(item, prompt, item[2]) for item, prompt in zip(items, prompts)]
            cache.reserve(len(rows) + len(new), max(map(len, new)))
            for group in micro_batches([(row.prompt, [], row) for row in new], config.micro_batch_tokens):
                joining = [row for *_, row in group]
                draw(policy, join(policy, cache, joining), joining)
                rows += joining
                cache.rows = len(rows)
        else:
            draw(policy, step(policy, cache, rows), rows)
        if finished := leave(policy, cache, rows):
            yield finished


def join(policy, cache, rows):
    """The logits (m, V) of the first token of `rows`, whose prompts go into the cache. Equal prompts, of one group say, are read once."""
    numbers = numbered(tuple(row.prompt) for row in rows)
    longest = max(map(len, numbers))  # P
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in numbers], device=policy.device)  # padded on the left
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in numbers], device=policy.device)
    cache.joining = torch.tensor([numbers[tuple(row.prompt)] for row in rows], device=policy.device)  # (m,)
    cache.start = min(cache.start, cache.end - longest)
    logits = forward(policy, cache, ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    logits, cache.joining = logits[cache.joining], None
    return logits


def step(policy, cache, rows):
    """The logits (n, V) of the next token of `rows`; their last one goes into the cache."""
    width = max(map(len, rows))  # W
    cache.reserve(len(rows), width - 1)
    cache.start = cache.end - (width - 1)  # the longest row may have left
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)[:, None]  # (n, 1)
    mask = torch.arange(width, device=policy.device) >= width - lengths  # (n, W)
    logits = forward(policy, cache, torch.tensor([row.ids[-1:] for row in rows], device=policy.device), mask, lengths - 1)
    cache.end += 1
    return logits


def forward(policy, cache, ids, mask, position):
    with policy.autocast():
        return policy.model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
                            logits_to_keep=1).logits[:, -1]


def draw(policy, logits, rows):
    """Add one token to each row, with its log-probability."""
    logits = policy.scaled(logits)  # (n, V)
    total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    if not total.isfinite().all():
        raise SystemExit(NOT_FINITE)
    if policy.temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # (n, 1)
    else:  # where the cumulated probability passes a random number; in float64, that the rarest tokens have their chance
        probs = (logits - total).exp()
        cumulated = (probs.cpu() if probs.device.type == "mps" else probs).cumsum(-1, dtype=torch.float64)  # MPS has none
        below = torch.tensor([[row.rng.random()] for row in rows], dtype=torch.float64, device=cumulated.device)  # (n, 1)
        token = torch.searchsorted(cumulated, below * cumulated[:, -1:], right=True).to(logits.device)
    chosen = logits.gather(1, token) - total
    for row, id, logprob in zip(rows, token[:, 0].tolist(), chosen[:, 0].tolist()):
        row.ids.append(id)
        row.logprobs.append(logprob)


def leave(policy, cache, rows):
    """Take the rows that are finished out of `rows` and the cache. Returns [(item, Response)]."""
    ends, most = policy.end_ids, policy.config.max_response_tokens
    done = [row.ids[-1] in ends or len(row.ids) == most for row in rows]
    if not any(done):
        return []
    finished = [row for row, out in zip(rows, done) if out]
    left = len(rows) - len(finished)
    places = [number for number in range(left) if done[number]]
    sources = [number for number in range(left, len(rows)) if not done[number]]
    if places:
        cache.move(places, sources)
    for place, source in zip(places, sources):
        rows[place] = rows[source]
    del rows[left:]
    cache.rows = left
    return [(row.item, response_of(policy, row.prompt, row.ids, row.logprobs)) for row in finished]


def response_of(policy, prompt, ids, logprobs):
    """The Response that was sampled; the end token, if there is one, is the last of its ids."""
    ended = ids[-1] in policy.end_ids
    return Response(policy.tokenizer.decode(ids[:-1] if ended else ids), len(ids), prompt, ids, logprobs, truncated=not ended)


# --- on a GPU ------------------------------------------------------------------------------------------------------

PAGE = 256  # tokens whose keys and values are kept, and shared by prompts that begin alike, together
CACHE_SHARE = 0.25  # of the GPU's memory that the pages may take: they stay where they are while the policy is trained


def has_pages():
    """Whether this version of transformers has continuous batching as it is used here (5.17)."""
    return "page_size" in getattr(getattr(transformers, "ContinuousBatchingConfig", None), "__dataclass_fields__", {})


@torch.no_grad()
def serve_paged(policy, waiting):
    """serve, with transformers' continuous batching. Its manager lives as long as the model; the draws are its own, whatever the seeds.

    The keys and values that it keeps of earlier prompts are forgotten when a weight has been changed in place, or replaced, since.
    """
    config, model, playing = policy.config, policy.model, {}
    weights = [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]
    settings = policy.temperature, config.sample_rows, config.max_prompt_tokens + config.max_response_tokens
    before = getattr(policy, "paged", None)  # (settings, weights) of the last call
    if not before:  # ids that the tokenizer does not have are never sampled
        model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits[..., : policy.known_ids])
    elif before[0] != settings:
        model.destroy_cached_continuous_batching_manager()
        gc.collect()  # the old cache goes before the new one comes
    elif before[1] != weights:
        model._cached_continuous_batching_manager.batch_processor.cache.reset()
    numbers = itertools.count()
    with model.continuous_batching_context_manager(**paged_settings(policy), persistent_manager=True) as manager:
        policy.paged = settings, weights
        while waiting or playing:
            items = [waiting.popleft() for _ in range(len(waiting))]
            for item, prompt in zip(items, policy.encode([observation for _, observation, _ in items]) if items else ()):
                number = str(next(numbers))
                playing[number] = item, prompt
                manager.add_request(prompt, number, config.max_response_tokens, eos_token_id=sorted(policy.end_ids))
            finished = []
            while playing and (result := manager.get_result(timeout=0.0 if finished else 1.0)):
                if result.error:
                    raise SystemExit(f"transformers' continuous batching failed: {result.error}")
                if result.is_finished():
                    if not all(map(math.isfinite, result.logprobs)):
                        raise SystemExit(NOT_FINITE)
                    item, prompt = playing.pop(result.request_id)
                    finished.append((item, response_of(policy, prompt, result.generated_tokens, result.logprobs)))
            if finished:
                yield finished
            elif not manager.is_running():
                raise SystemExit("transformers' continuous batching has stopped; the reason stands above")


def paged_settings(policy):
    """The distribution that the trainer scores, and a cache for `sample_rows` rows of the longest kind, or as many as fit CACHE_SHARE."""
    config, model = policy.config, policy.model.config.get_text_config()
    longest = -(-(config.max_prompt_tokens + config.max_response_tokens) // PAGE)  # in pages
    pages = config.sample_rows * longest
    if policy.device.type == "cuda":
        head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        size = 2 * model.num_hidden_layers * model.num_key_value_heads * head * policy.model.dtype.itemsize * PAGE  # bytes, keys and values
        pages = max(longest, min(pages, int(CACHE_SHARE * torch.cuda.mem_get_info()[1]) // size))
    ends = dict(eos_token_id=sorted(policy.end_ids), pad_token_id=policy.tokenizer.pad_token_id)
    return {
        "generation_config": GenerationConfig(**ends) if policy.temperature == 0 else GenerationConfig(
            **ends, do_sample=True, temperature=policy.temperature, top_k=0, top_p=1.0),
        "continuous_batching_config": transformers.ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=pages, max_requests_per_batch=config.sample_rows, return_logprobs=True,
            max_batch_tokens=max(PAGE, min(config.micro_batch_tokens, 4096)))}
