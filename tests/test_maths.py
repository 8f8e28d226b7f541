"""The objective, checked from outside: against a plain and slow reference, by hand, and by statistics."""

import copy
import random

import pytest
import torch
from accelerate import Accelerator
from conftest import gradients

import grpo
from config import Config


def shaken(policy, seed):
    """A copy with other weights."""
    other, random_numbers = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=random_numbers))
    return other


def distributions(policy, prompt, ids):
    """Log-probabilities (n, known ids) at each place of one response: one row, no padding."""
    logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / policy.temperature
    return logits[:, : policy.known_ids].log_softmax(-1)


def logprobs(policy, prompt, ids):
    """Log-probabilities (n,) of the tokens of one response."""
    return distributions(policy, prompt, ids).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("kl, updates", [(0.0, 1), (0.0, 2), (0.3, 2)])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_loss_and_gradients_equal_a_plain_reference(tiny, kl, updates, temperature):
    """Bug: anything between rows and gradient that depends on padding, order or micro-batches, or a term that is detached."""
    rng, policy, vocabulary = random.Random(0), tiny.double(), len(tiny.tokenizer)
    policy.temperature = temperature
    old, reference = shaken(policy, 1), shaken(policy, 2)
    rows = [([rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))], [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))],
             rng.choice([-0.75, -0.25, 0.0, 0.5])) for _ in range(23)]
    tokens = 7 + sum(len(ids) for _, ids, _ in rows)  # 7: of rows that were skipped
    config = Config(kl=kl, max_grad_norm=1e9)
    loss = 0.0
    for prompt, ids, advantage in rows:
        new, ref = logprobs(policy, prompt, ids), logprobs(reference, prompt, ids).detach()
        before = logprobs(old, prompt, ids).detach() if updates > 1 else new.detach()
        for t in range(len(ids)):
            ratio = (new[t] - before[t]).exp()
            gain = min(ratio * advantage, min(max(ratio, torch.tensor(0.8)), torch.tensor(1.28)) * advantage)
            penalty = (ref[t] - new[t]).exp() - (ref[t] - new[t]) - 1
            loss = loss - (gain - kl * penalty) / tokens
    policy.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters()}

    sampled = [(prompt, ids, [0.0] * len(ids), advantage) for prompt, ids, advantage in rows]
    for budget in (1, 100, 10**6):
        shuffled = rng.sample(sampled, len(sampled))
        config.micro_batch_tokens = budget
        if updates > 1:
            shuffled = grpo.with_old(old, shuffled, Accelerator(cpu=True), config)
        metrics, found = gradients(policy, shuffled, tokens, config, reference)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7), name
    assert (metrics["clipped"] > 0.1) == (updates > 1)


@pytest.mark.parametrize("selects", [True, False])
def test_padding_cannot_be_seen(tiny, selects):
    """Bug: the loss, or the last layer, reads a position of the padding, which here holds garbage."""
    rows = [([5, 6], [7, 8, 9, 10], [0.0] * 4, -0.5), ([5, 6, 7], [8], [0.0], 1.0), ([5], [6, 7], [0.0] * 2, 0.25)]
    lengths = torch.tensor([6, 4, 3])  # the longest first, as micro_batches puts them

    def plant(module, arguments, hidden):
        padding = torch.arange(hidden.shape[1])[None] >= lengths[:, None]
        return hidden + 1e4 * padding[..., None]

    config, tiny.selects = Config(max_grad_norm=1e9), selects
    _, clean = gradients(tiny, rows, 7, config)
    handle = tiny.model.get_decoder().layers[-2].register_forward_hook(plant)
    metrics, planted = gradients(tiny, rows, 7, config)
    handle.remove()
    assert metrics["loss"] == pytest.approx(-(1 * 1.0 + 4 * -0.5 + 2 * 0.25) / 7)  # by hand: all ratios are 1
    for name in clean:
        assert torch.equal(clean[name], planted[name])


def test_the_expected_gradient_is_that_of_the_expected_reward(tiny):
    """Bug: a bias that no single sample shows, such as a wrong baseline, or scoring another distribution than is sampled."""
    torch.manual_seed(0)
    actions, group, prompt = 12, 8, [5, 6, 7]
    policy = shaken(tiny, 3)
    policy.known_ids, policy.end_ids, policy.temperature = actions, set(range(actions)), 1.3  # every response is one token
    reward = torch.rand(actions)
    config = Config(max_grad_norm=1e9, micro_batch_tokens=10**5)

    [of_all] = distributions(policy, prompt, [0])  # of every one-token response
    exact = of_all.exp() @ reward
    policy.zero_grad()
    exact.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])

    random.seed(0)
    policy.encode = lambda observations: [prompt] * len(observations)
    drawn = policy.respond([None] * 1500 * group)
    advantages = grpo.group_advantages(reward[[response.ids[0] for response in drawn]].view(-1, group)).flatten().tolist()
    rows = [(prompt, response.ids, response.logprobs, advantage) for response, advantage in zip(drawn, advantages)]
    metrics, found = gradients(policy, rows, len(rows), config)
    found = -torch.cat([found[name].flatten() for name, _ in policy.named_parameters()])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    # the group's mean holds the sample itself, which shortens the gradient to (G - 1) / G
    assert found.norm() / expected.norm() == pytest.approx((group - 1) / group, rel=0.05)
    assert metrics["gap"] < 1e-4
