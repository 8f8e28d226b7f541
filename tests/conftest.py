"""Shared fixtures. Everything runs on a CPU, without network."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpo
from agent import Response
from config import Config
from memory import HashedEmbedder
from policy import create_tiny, train_tokenizer
from tasks import Question, Task, corpus

DATA = Path(__file__).parent / "data"
# Settings with which a script is done in a moment.
TINY = "--cpu --hidden_size 32 --layers 1 --heads 1 --sft_tasks 24 --sft_steps 4 --sft_batch 16 --tasks_per_step 2 " \
       "--group_size 2 --grpo_steps 2 --save_every 1 --eval_tasks 4".split()


class Scripted:
    """A policy that writes given texts, one list per episode, and keeps what it was shown.

    Episodes are told apart by their first question, so give every task its own.
    """

    def __init__(self, scripts):
        self.scripts = {question: iter(texts) for question, texts in scripts.items()}
        self.seen = {question: [] for question in scripts}

    def respond(self, observations):
        responses = []
        for observation in observations:
            self.seen[observation.questions[0]].append(observation)
            responses.append(Response(next(self.scripts[observation.questions[0]], "")))
        return responses


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    gradients = ()

    def step(self):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def gradients(policy, rows, tokens, config, reference=None):
    """Metrics of one update of grpo.py, and the gradients {name: tensor} that it computes."""
    policy.zero_grad()
    recorder = Recorder(policy.parameters(), lr=0.0)
    metrics = grpo.update(policy, reference, rows, tokens, [recorder], Accelerator(cpu=True), config)
    return metrics, {name: gradient for (name, _), gradient in zip(policy.named_parameters(), recorder.gradients)}


def make_task(chunks, questions=("Who?",), answers=("Ben",)):
    return Task("made-0", tuple(Question(q, (a,)) for q, a in zip(questions, answers)), tuple(chunks), tuple(chunks))


@pytest.fixture
def config():
    return Config()


@pytest.fixture
def embed():
    return HashedEmbedder()


def tiny_policy(seed=42):
    """A very small policy for the town, with random weights."""
    config = Config(hidden_size=32, layers=2, heads=1, seed=seed)
    return create_tiny(train_tokenizer(corpus(config), config, word_level=True), config)


@pytest.fixture
def tiny():
    return tiny_policy()
