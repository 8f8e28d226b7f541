"""Shared fixtures. Everything runs on a CPU, without network."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import grpo
from agent import Response
from config import Config
from memory import HashedEmbedder
from tasks import Question, Task
from tools.server import PROBE
from training.tiny import create_policy, town_texts

torch.set_num_threads(1)  # tiny models are faster so, and a busy machine does not stall them
ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
# Settings with which a script takes a moment.
TINY = (
    "--cpu --hidden_size 32 --layers 1 --heads 1 --sft_tasks 24 --sft_steps 4 --sft_batch 16 "
    "--tasks_per_step 2 --group_size 2 --grpo_steps 2 --save_every 1 --eval_tasks 4 "
    "--max_response_tokens 10"
).split()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template=CHATML, vocab_size=600):
    """A byte-level BPE with the control tokens and the template of Qwen's chat models."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(town_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=template,
    )


QWEN3_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def save_qwen3(folder):
    """A small model of Qwen3's kind: chat template, thinking, and <|im_end|> as the end token."""
    tokenizer = chat_tokenizer(QWEN3_TEMPLATE, vocab_size=2000)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
    sizes |= dict(num_key_value_heads=1, head_dim=32, max_position_embeddings=6000)
    end = tokenizer.eos_token_id
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), eos_token_id=end, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_set(tasks, path):
    """Write tasks in the format of saved sets."""
    with open(path, "w", encoding="utf-8") as file:
        for task in tasks:
            questions = [
                {"question": one.text, "answers": one.answers, "support": one.support}
                for one in task.questions
            ]
            row = {"id": task.id, "questions": questions, "documents": task.documents}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


class Scripted:
    """A policy that writes given texts, one list per task, and keeps what it was shown.

    Tasks are told apart by their first question, so give every task its own.
    """

    def __init__(self, scripts: dict[str, list[str]]):
        self.scripts = {question: iter(texts) for question, texts in scripts.items()}
        self.seen = {question: [] for question in scripts}

    def respond(self, observations):
        responses = []
        for observation in observations:
            name = observation.questions[0]
            self.seen[name].append(observation)
            responses.append(Response(next(self.scripts[name], "")))
        return responses


class Recorder(torch.optim.SGD):
    """Keeps the gradients of its last step."""

    gradients = ()

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def gradients(policy, samples, num_tokens, config, reference=None):
    """Metrics of one grpo_step, and the gradients {name: tensor} that it computes."""
    policy.zero_grad()
    recorder = Recorder(policy.parameters(), lr=0.0)
    accelerator = Accelerator(cpu=True)
    metrics = grpo.grpo_step(
        policy, reference, samples, num_tokens, [recorder], accelerator, config
    )
    names = [name for name, _ in policy.named_parameters()]
    return metrics, dict(zip(names, recorder.gradients))


def make_task(chunks, questions=("Who?",), answers=("Ben",)):
    asked = tuple(Question(text, (answer,)) for text, answer in zip(questions, answers))
    return Task("made-0", asked, tuple(chunks), tuple(chunks))


@pytest.fixture
def config():
    return Config()


@pytest.fixture
def embed():
    return HashedEmbedder()


def tiny_policy(seed=42, **settings):
    """A very small policy for the town, with random weights."""
    config = Config(hidden_size=32, layers=2, heads=1, seed=seed, **settings)
    return create_policy(config)


@pytest.fixture
def tiny():
    return tiny_policy()


def is_probe(body: dict) -> bool:
    return body["messages"][-1]["content"].endswith(PROBE)


class Server(ThreadingHTTPServer):
    """Stands in for an OpenAI-compatible server.

    It answers by reply(messages): a text, None, or an HTTP error (status, body). `refuses` are
    fields that it refuses, with a `complaint` that may name one. `seen` are the questions that it
    got, `probes` what came before them. `most` counts the requests it had at the same time.
    """

    def __init__(self, reply):
        self.reply, self.seen, self.probes, self.now, self.most = reply, [], [], 0, 0
        self.lock, self.refuses, self.status = threading.Lock(), (), 200
        self.complaint = "Unsupported parameter: '{}' is not supported with this model."
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def result(self, body):
        """The answer's text, or (status, body) of an HTTP error."""
        for name in self.refuses:
            if name in body or name == body["messages"][0]["role"]:
                message = self.complaint.format(name)
                return 400, json.dumps({"error": {"message": message, "code": "bad_value"}})
        if self.status != 200:
            return self.status, "no"
        return "yes" if is_probe(body) else self.reply(body["messages"])

    def handle_error(self, *_):  # a client that went away
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            seen = server.probes if is_probe(body) else server.seen
            seen.append({"path": self.path, **body})
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(0.02)
        result = server.result(body)
        with server.lock:
            server.now -= 1
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "system_fingerprint": "",
            "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
            "choices": [{"index": 0, "finish_reason": "stop"}],
        }
        answer["choices"][0]["message"] = {"role": "assistant", "content": result}
        status, text = result if isinstance(result, tuple) else (200, json.dumps(answer))
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) starts a Server. Retries come at once."""
    monkeypatch.setattr("tools.server.PAUSES", (0.01, 0.01, 0.01))
    servers = []

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
