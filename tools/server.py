"""A chat model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, a hub provider).

The model can play as the policy, write demonstrations as a teacher, or judge answers:

    python evaluate.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B --task hotpotqa ...

If the server needs a key, it is read from the environment variable OPENAI_API_KEY. Every answer is
saved in a file immediately. A question whose answer is there is not asked again, so a job that was
stopped continues where it was. The file also keeps which fields the server refuses.
"""

import copy
import hashlib
import json
import math
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from huggingface_hub import InferenceClient

from agent import Episode, Observation, Response, instruction, render, without_thoughts
from chat import conversation, fit
from config import BadInput, Config, need
from tasks.demonstrators import read_jsonl_log
from tasks.scoring import answered

TIMEOUT = 600  # seconds for one answer
PAUSES = (1, 4, 15, 60)  # seconds before each new try after a transient error
FINAL = {400, 401, 403, 404, 405, 413, 422}  # HTTP errors that are not retried
TOO_LONG = re.compile(r"(?i)too long|(exceed|maximum).*(length|token)|context.(length|size|limit)")
# What some servers refuse. If the error names none of them, they are left out in this order.
FIELDS = ("chat_template_kwargs", "system", "max_tokens", "temperature")
PROBE = "Reply with yes."


class Endpoint:
    """A server and the model that it serves.

    file: where the answers are kept (JSONL). in_flight: maximum concurrent requests. seed: another
    seed gives other samples. Raises BadInput if `file` is another kind of file.
    """

    def __init__(self, url: str, model: str, file, in_flight: int, seed: int = 0):
        self.url, self.model, self.in_flight, self.seed = url, model, in_flight, seed
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = InferenceClient(base_url=url, api_key=key, timeout=TIMEOUT)
        self.name = f"--endpoint {url}, model {model}"  # for error messages
        self.lock = threading.Lock()  # for the file
        self.gone = threading.Event()  # set if the server will not answer any question
        self.warned = False  # whether a transient error was already reported
        self.asked = Counter()  # how often each question was asked
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl_log(self.file, "key") if self.file.exists() else []
        self.known = {row.pop("key"): row for row in rows}

    def complete(self, conversations: list, max_tokens: int, temperature: float) -> list[Response]:
        """One Response for each conversation, a list of {"role": ..., "content": ...} messages.

        A repeated conversation gets another sample, unless `temperature` is 0. Raises BadInput if
        a question failed, after the others were asked, or if the server cannot be reached.
        """
        refused = self.probe(max_tokens)
        settings = self.settings(max_tokens, temperature, refused)
        # The keys are numbered before any request is sent, so a restart gives the same keys.
        keys = [self.key(messages, max_tokens, temperature, refused) for messages in conversations]
        unknown = {k: m for k, m in zip(keys, conversations) if k not in self.known}
        self.gone.clear()
        with ThreadPoolExecutor(self.in_flight) as threads:
            results = threads.map(lambda k: self.ask_and_keep(k, unknown[k], settings), unknown)
            errors = [error for error in results if error]
        if errors:
            raise errors[0]
        return [Response(**self.known[key]) for key in keys]

    def probe(self, max_tokens: int) -> list[str]:
        """Those of FIELDS that the server refuses. It is asked once, at temperature 0."""
        if self.name in self.known:
            return self.known[self.name]["refused"]
        refused, left, unexplained = [], list(FIELDS), None
        while True:
            messages = conversation("Be brief.", PROBE, "system" not in refused)
            try:
                self.ask(messages, self.settings(max_tokens, 0.0, refused))
                break
            except BadInput as error:
                status, body = http_error(error.__cause__)
                if status not in (400, 422) or TOO_LONG.search(body):
                    raise
                named = [field for field in left if field in body.lower()]
                if not named:
                    unexplained = unexplained or error
                if not left:
                    raise unexplained from error
                refused.append((named or left)[0])
                left.remove(refused[-1])
        self.keep(self.name, {"refused": refused})
        if refused:
            print(f"{self.name} answers without {', '.join(refused)}")
        return refused

    def settings(self, max_tokens: int, temperature: float, refused: list[str]) -> dict:
        """The settings of a request, without the fields that the server refuses."""
        limit = "max_completion_tokens" if "max_tokens" in refused else "max_tokens"
        fields = {"temperature": temperature, "chat_template_kwargs": {"enable_thinking": False}}
        accepted = {name: value for name, value in fields.items() if name not in refused}
        return {"model": self.model, "extra_body": {limit: max_tokens} | accepted}

    def key(self, messages: list[dict], max_tokens: int, temperature: float, refused) -> str:
        """The key of a question in the file. Repetitions of a question are numbered."""
        seed = self.seed if temperature else 0
        question = [self.url, self.model, messages, max_tokens, temperature, seed, *refused]
        name = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        self.asked[name] += int(temperature > 0)
        return f"{name} {self.asked[name]}"

    def ask_and_keep(self, key: str, messages: list[dict], settings: dict) -> BadInput | None:
        """Ask a question and keep the answer. Returns the error if there is one."""
        if self.gone.is_set():
            return None  # the request that set `gone` returns the error
        try:
            self.keep(key, self.ask(messages, settings))
        except BadInput as error:
            return error

    def keep(self, key: str, row: dict):
        self.known[key] = row
        with self.lock, open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key} | row) + "\n")

    def ask(self, messages: list[dict], settings: dict) -> dict:
        """The answer, as `read_answer` gives it. Tries again after transient errors."""
        pauses, timeouts = list(PAUSES), 0
        while True:
            try:
                return read_answer(self.client.chat_completion(messages, **settings))
            except Exception as error:  # each version of the client has its own types
                status, body = http_error(error)
                reason = f"HTTP {status}: {body}" if status else str(error)
                message = f"{self.name}: {' '.join(reason.split())[:500]}"
                if status in (400, 413, 422) and TOO_LONG.search(body):
                    message += ". Lower --max_prompt_tokens, or raise the server's context"
                timeouts += isinstance(error, TimeoutError)
                final = status in FINAL or timeouts == 2 or not pauses
                if status in (401, 403, 404) or final and type(error).__name__ == "ConnectError":
                    self.gone.set()
                if not final and not self.warned:
                    print(f"{message}; trying again for {sum(PAUSES)} seconds")
                    self.warned = True
                if final or self.gone.wait(pauses.pop(0)):
                    raise BadInput(f"{message}; answers so far are in {self.file}") from error


def http_error(error: Exception) -> tuple[int | None, str]:
    """The status and the body of an HTTP error, or (None, "") for another error."""
    # The client fails if the body is not a JSON object. The HTTP error is then the context.
    response = getattr(error, "response", None) or getattr(error.__context__, "response", None)
    return (response.status_code, response.text) if response else (None, "")


def read_answer(answer) -> dict:
    """The fields of a Response in a chat completion."""
    [choice] = answer.choices
    text = choice.message.content or ""
    tokens = answer.usage.completion_tokens if answer.usage else rough_count([text])[0]
    return {"text": text, "tokens": tokens, "truncated": choice.finish_reason == "length"}


def rough_count(texts: list[str]) -> list[int]:
    """About the number of tokens of each text: 4 bytes per token, a little high for English."""
    return [math.ceil(len(text.encode()) / 4) for text in texts]


class ServerPolicy:
    """The policy config.model at config.endpoint. A server gives no token ids to train on."""

    count = staticmethod(rough_count)  # the server's tokenizer is not here

    def __init__(self, config: Config, temperature: float):
        need(config.model, "--endpoint needs --model: the name of the model at that server")
        self.config, self.temperature = config, temperature
        file = f"runs/{config.name}/responses.jsonl"
        self.endpoint = Endpoint(config.endpoint, config.model, file, config.in_flight, config.seed)

    def with_config(self, config: Config, temperature: float) -> "ServerPolicy":
        """The same server and answers under other settings."""
        policy = copy.copy(self)
        policy.config, policy.temperature = config, temperature
        return policy

    def respond(self, observations: list[Observation]) -> list[Response]:
        """One sampled Response for each observation."""
        shown = [self.shorten(observation) for observation in observations]
        responses = self.endpoint.complete(
            [self.messages(o) for o in shown], self.config.max_response_tokens, self.temperature
        )
        return [replace(response, observation=o) for response, o in zip(responses, shown)]

    def messages(self, observation: Observation) -> list[dict]:
        refused = self.endpoint.probe(self.config.max_response_tokens)
        system = self.config.instruction or instruction(self.config)
        return conversation(system, render(observation), "system" not in refused)

    def shorten(self, observation: Observation) -> Observation:
        """The observation as the model sees it, shortened if it is too long."""
        return fit(observation, self.prompt_length, self.config.max_prompt_tokens)

    def prompt_length(self, observation: Observation) -> int:
        return sum(self.count([one["content"] for one in self.messages(observation)]))


class Judge:
    """A language model that decides whether answers are right, at `url` or at config.endpoint."""

    QUESTION = (
        "Question: {question}\nReference answers, each of them right: {gold}\n"
        "Answer to be judged: {answer}\n\nDoes the answer to be judged mean the same as one of the "
        "reference answers? Reply with yes or no alone."
    )

    def __init__(self, config: Config, model: str, url: str = ""):
        url = url or config.endpoint
        need(url, "--judge needs the URL of a server: --judge_endpoint, or --endpoint")
        self.endpoint = Endpoint(url, model, f"runs/{config.name}/verdicts.jsonl", config.in_flight)
        self.verdicts([])  # fails here, before long work, if the server was never reached

    def __call__(self, episodes: list[Episode]) -> int:
        """How many answers in these episodes are right. Any verdict but "yes" counts as no."""
        given = [pair for episode in episodes for pair in answered(episode)]
        fill = self.QUESTION.format
        prompts = [fill(question=q.text, gold=" / ".join(q.answers), answer=a) for a, q in given]
        return self.verdicts(prompts).count("yes")

    def verdicts(self, prompts: list[str]) -> list[str]:
        """The first word of the reply to each prompt, in lower case; "" if there is none."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        replies = self.endpoint.complete(conversations, max_tokens=512, temperature=0.0)
        found = [re.search(r"\w+", without_thoughts(one.text).lower()) for one in replies]
        return [word[0] if word else "" for word in found]
