"""Shared fixtures. Everything runs on a CPU, without network."""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))

import endpoint
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

    config = None

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


class Server(ThreadingHTTPServer):  # in the place of an OpenAI-compatible one
    """Answers by `reply(conversation)`: a text, or a number, the HTTP error. `most` counts the
    questions it had at the same time; a `strict` one refuses fields that OpenAI's do not have."""

    def __init__(self, reply):
        self.reply, self.seen, self.now, self.most, self.lock, self.strict = reply, [], 0, 0, threading.Lock(), False
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append({"path": self.path, **body})
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(0.02)
        reply = 400 if server.strict and "chat_template_kwargs" in body else server.reply(body["messages"])
        with server.lock:
            server.now -= 1
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "system_fingerprint": "",
                  "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}, "choices": [
                      {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply}}]}
        data = json.dumps(answer if isinstance(reply, str) else {"error": "no"}).encode()
        self.send_response(200 if isinstance(reply, str) else reply)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSES", (0.01, 0.01, 0.01))
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown(), server.server_close()
