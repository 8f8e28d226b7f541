"""The objective, checked from outside: against a slow reference, by hand, and by statistics."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import gradients

import grpo
from agent import Observation
from config import Config
from policy import Sample


def shaken(policy, seed):
    """A copy with other weights."""
    other, generator = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return other


def distributions(policy, prompt, ids):
    """Log-probs (n, known ids) at each position of one response: one row, no padding."""
    logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return (logits[:, : policy.known_ids] / policy.temperature).log_softmax(-1)


def logprobs(policy, sample):
    """Log-probs (n,) of the tokens of one response."""
    ids = torch.tensor(sample.response_ids)
    found = distributions(policy, sample.prompt_ids, sample.response_ids)
    return found.gather(1, ids[:, None])[:, 0]


def random_samples(rng, vocabulary, number=23):
    """Samples of random lengths, ids and advantages."""
    samples = []
    for _ in range(number):
        prompt = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 30))]
        response = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 9))]
        advantage = rng.choice([-0.75, -0.25, 0.0, 0.5])
        samples.append(Sample(prompt, response, [0.0] * len(response), advantage))
    return samples


def slow_loss(policy, old, reference, samples, num_tokens, kl):
    """Eq. 9, token by token. old: the policy of the ratio's denominator, None for `policy`."""
    loss = 0.0
    for sample in samples:
        new, target = logprobs(policy, sample), logprobs(reference, sample).detach()
        before = logprobs(old, sample).detach() if old else new.detach()
        for t in range(len(new)):
            ratio = (new[t] - before[t]).exp()
            clipped = min(max(ratio, torch.tensor(0.8)), torch.tensor(1.28))
            gain = min(ratio * sample.advantage, clipped * sample.advantage)
            penalty = (target[t] - new[t]).exp() - (target[t] - new[t]) - 1
            loss = loss - (gain - kl * penalty) / num_tokens
    return loss


@pytest.mark.parametrize("kl, updates", [(0.0, 1), (0.0, 2), (0.3, 2)])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_loss_and_gradients_equal_a_slow_reference(tiny, kl, updates, temperature):
    """Bug: anything between samples and gradient depends on padding, order or micro-batches, or a
    term is detached."""
    rng, policy = random.Random(0), tiny.double()
    policy.temperature = temperature
    old, reference = shaken(policy, 1), shaken(policy, 2)
    samples = random_samples(rng, len(policy.tokenizer))
    num_tokens = 7 + sum(len(one.response_ids) for one in samples)  # 7: of skipped samples
    old_or_none = old if updates > 1 else None
    loss = slow_loss(policy, old_or_none, reference, samples, num_tokens, kl)
    policy.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters()}

    config = Config(kl=kl, max_grad_norm=1e9)
    for budget in (1, 100, 10**6):
        shuffled, now = (
            rng.sample(samples, len(samples)),
            replace(config, micro_batch_tokens=budget),
        )
        if updates > 1:
            shuffled = grpo.with_old_logprobs(old, shuffled, Accelerator(cpu=True), now)
        metrics, found = gradients(policy, shuffled, num_tokens, now, reference)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7), name
    assert (metrics["clipped"] > 0.1) == (updates > 1)


def test_padding_cannot_be_seen(tiny):
    """Bug: the loss, or a layer, reads a position of the padding, which here holds garbage."""
    samples = [
        Sample([5, 6], [7, 8, 9, 10], [0.0] * 4, -0.5),
        Sample([5, 6, 7], [8], [0.0], 1.0),
        Sample([5], [6, 7], [0.0] * 2, 0.25),
    ]
    lengths = torch.tensor([6, 4, 3])  # the longest first, as micro_batches sorts them

    def plant(module, arguments, hidden):
        padding = torch.arange(hidden.shape[1])[None] >= lengths[:, None]
        planted.append(padding.sum().item())
        return hidden + 1e4 * padding[..., None]

    planted, config = [], Config(max_grad_norm=1e9)
    _, clean = gradients(tiny, samples, 7, config)
    handle = tiny.model.get_decoder().layers[-2].register_forward_hook(plant)
    metrics, found = gradients(tiny, samples, 7, config)
    handle.remove()
    assert planted == [5]
    by_hand = -(1 * 1.0 + 4 * -0.5 + 2 * 0.25) / 7  # all ratios are 1
    assert metrics["loss"] == pytest.approx(by_hand)
    for name in clean:
        assert torch.equal(clean[name], found[name])


def test_the_expected_gradient_is_that_of_the_expected_reward(tiny):
    """Bug: a bias that no single sample shows, such as a wrong baseline, or scoring another
    distribution than is sampled."""
    torch.manual_seed(0)
    actions, group, prompt = 12, 8, [5, 6, 7]
    policy = shaken(tiny, 3)
    # Every response is one of `actions` tokens.
    policy.known_ids, policy.end_ids, policy.temperature = actions, set(range(actions)), 1.3
    reward = torch.rand(actions)
    [of_all] = distributions(policy, prompt, [0])
    exact = of_all.exp() @ reward
    policy.zero_grad()
    exact.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])

    policy.encode = lambda observations: [(one, prompt) for one in observations]
    number = 1500 * group
    observations = [Observation((), "", "", (), rng=random.Random(n)) for n in range(number)]
    drawn = policy.respond(observations)
    rewards = reward[[response.ids[0] for response in drawn]].view(-1, group)
    samples = [
        Sample(prompt, response.ids, response.logprobs, advantage)
        for response, advantage in zip(drawn, grpo.group_advantages(rewards).flatten().tolist())
    ]
    config = Config(max_grad_norm=1e9, micro_batch_tokens=10**5)
    metrics, found = gradients(policy, samples, len(samples), config)
    found = -torch.cat([found[name].flatten() for name, _ in policy.named_parameters()])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.99
    # The group's mean holds the sample itself, which shortens the gradient to (G - 1) / G.
    assert found.norm() / expected.norm() == pytest.approx((group - 1) / group, rel=0.05)
    assert metrics["logprob_diff"] < 1e-4
