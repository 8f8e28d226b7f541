"""A chat model behind an OpenAI-compatible server (vLLM, llama.cpp, Ollama, a hub provider).

The model can play as the policy, write demonstrations as a teacher, or judge answers:

    python evaluate.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B --task hotpotqa ...

If the server needs a key, it is read from the environment variable OPENAI_API_KEY. Every answer is
written to a file at once, and a question whose answer is there is not asked again. So a job that
was stopped continues where it was.
"""

import copy
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from huggingface_hub import InferenceClient

from agent import Episode, Observation, Response, instruction, render
from config import BadInput, Config, need
from policy import fit
from tasks.demonstrators import read_jsonl_log
from tasks.scoring import answered

TIMEOUT = 600  # seconds for one answer
PAUSES = (1, 4, 15, 60)  # seconds before each new try after a transient error
FINAL = {400, 401, 403, 404, 405, 413, 422}  # HTTP errors that are not retried


class Endpoint:
    """A server and the model that it serves.

    file: where the answers are kept (JSONL). in_flight: maximum concurrent requests. seed: another
    seed gives other samples. Raises BadInput if `file` is another kind of file.
    """

    def __init__(self, url: str, model: str, file, in_flight: int, seed: int = 0):
        self.url, self.model, self.in_flight, self.seed = url, model, in_flight, seed
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.client = InferenceClient(base_url=url, api_key=key, timeout=TIMEOUT)
        # No thinking, as for a local model. If a server refuses the field, it is left out.
        self.extra = {"chat_template_kwargs": {"enable_thinking": False}}
        self.name = f"--endpoint {url}, model {model}"  # for error messages
        self.lock = threading.Lock()  # for the file
        self.warned = False  # whether a transient error was already reported
        self.asked = Counter()  # how often each question was asked
        self.known, self.file = {}, Path(file)  # known: key -> Response
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            rows = read_jsonl_log(self.file, "key")
            self.known = {row.pop("key"): Response(**row) for row in rows}
        if self.known:
            print(f"{self.file} holds {len(self.known)} answers, which are not asked for again")

    def complete(self, conversations: list, max_tokens: int, temperature: float) -> list[Response]:
        """One Response for each conversation, a list of {"role": ..., "content": ...} messages.

        A repeated conversation gets another sample, unless `temperature` is 0. Raises BadInput if
        the server refuses or cannot be reached, after the requests in flight have been answered.
        """
        settings = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        # The keys are numbered before any request is sent, so a restart gives the same keys.
        keys = [self.key(messages, max_tokens, temperature) for messages in conversations]
        unknown = {k: m for k, m in zip(keys, conversations) if k not in self.known}
        with ThreadPoolExecutor(self.in_flight) as threads:
            # An error cancels the requests that have not been sent, and waits for the others.
            list(threads.map(lambda key: self.ask_and_keep(key, unknown[key], settings), unknown))
        return [self.known[key] for key in keys]

    def key(self, messages: list[dict], max_tokens: int, temperature: float) -> str:
        """The key of a question in the file. Repetitions of a question are numbered."""
        seed = self.seed if temperature else 0
        question = json.dumps([self.url, self.model, messages, max_tokens, temperature, seed])
        name = hashlib.sha256(question.encode()).hexdigest()
        self.asked[name] += int(temperature > 0)
        return f"{name} {self.asked[name]}"

    def ask_and_keep(self, key, messages, settings):
        """Ask the server, and write the answer to the file."""
        response = self.ask(messages, settings)
        kept = {name: getattr(response, name) for name in ("text", "tokens", "truncated")}
        with self.lock, open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key} | kept) + "\n")
        self.known[key] = response

    def ask(self, messages, settings):
        """The server's Response. Transient errors are tried again after each of PAUSES."""
        pauses = list(PAUSES)
        while True:
            extra = self.extra
            try:
                answer = self.client.chat_completion(messages, extra_body=extra, **settings)
                return read_answer(answer)
            except Exception as error:  # each version of the client has its own types
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in (400, 422) and extra:
                    self.extra = None
                    continue
                message = f"{self.name}: {' '.join(str(error).split())}"
                if status in FINAL or not pauses:
                    raise BadInput(f"{message}; answers so far are in {self.file}") from error
                if not self.warned:
                    print(f"{message}; trying again for {sum(PAUSES)} seconds")
                self.warned = True
                time.sleep(pauses.pop(0))


def read_answer(answer) -> Response:
    """The Response in a chat completion, without the model's thoughts."""
    [choice] = answer.choices
    _, _, text = (choice.message.content or "").rpartition("</think>")
    text, _, _ = text.partition("<think>")  # cut off while it was thinking
    tokens = answer.usage.completion_tokens if answer.usage else rough_count([text])[0]
    return Response(text, tokens, truncated=choice.finish_reason == "length")


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
        system = {"role": "system", "content": instruction(self.config)}
        return [system, {"role": "user", "content": render(observation)}]

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
        self.unclear = 0  # verdicts that were neither yes nor no; they count as no
        self.verdicts(["Reply with yes."])  # fails here, before long work, if there is no server

    def __call__(self, episodes: list[Episode]) -> int:
        """How many answers in these episodes are right."""
        given = [pair for episode in episodes for pair in answered(episode)]
        fill = self.QUESTION.format
        prompts = [fill(question=q.text, gold=" / ".join(q.answers), answer=a) for a, q in given]
        words = self.verdicts(prompts)
        self.unclear += sum(word not in ("yes", "no") for word in words)
        return words.count("yes")

    def verdicts(self, prompts: list[str]) -> list[str]:
        """The first word of the reply to each prompt, in lower case; "" if there is none."""
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        replies = self.endpoint.complete(conversations, max_tokens=512, temperature=0.0)
        found = [re.search(r"\w+", reply.text.lower()) for reply in replies]
        return [word[0] if word else "" for word in found]
