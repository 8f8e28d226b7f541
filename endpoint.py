"""A chat model behind a server that speaks OpenAI's protocol (vLLM, llama.cpp, Ollama, a hub provider): as policy, teacher or judge.

    python evaluate.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B --task hotpotqa --data hotpot_dev.json

The key, where the server wants one, is taken from the environment: OPENAI_API_KEY. Every answer is written to a file at once, and a
question that stands there is not asked again, so that a job that was stopped, or lost its server, goes on where it was.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from huggingface_hub import InferenceClient

from agent import Response, fit, instruction, render
from config import BadInput

TIMEOUT = 600  # seconds for one answer
PAUSES = (1, 4, 15, 60)  # seconds before each new try
FINAL = {400, 401, 403, 404, 405, 413, 422}  # HTTP errors that another try cannot mend


@dataclass(frozen=True)
class Completion:
    """One answer of the model, and its number of tokens. `truncated`: stopped by the token limit."""

    text: str
    tokens: int
    truncated: bool


class Endpoint:
    """The server at `url`, and the `model` it serves under that name. `file`: where the answers are kept (JSONL)."""

    def __init__(self, url, model, file, in_flight, seed=0):
        self.url, self.model, self.file, self.in_flight, self.seed = url, model, Path(file), in_flight, seed
        self.client = InferenceClient(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=TIMEOUT)
        self.asked, self.known = Counter(), {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            text = self.file.read_bytes()
            os.truncate(self.file, text.rfind(b"\n") + 1)  # a stopped job may have left half a line
            for line in text.split(b"\n")[:-1]:
                key, *values = json.loads(line).values()
                self.known[key] = Completion(*values)

    def complete(self, conversations, max_tokens, temperature):
        """A Completion for each list of messages, `in_flight` of them asked for at the same time.

        The same conversation asked for again gets another sample, unless `temperature` is 0. BadInput when the server cannot be
        reached or refuses.
        """
        keys = [self.key(messages, max_tokens, temperature) for messages in conversations]
        missing = {key: messages for key, messages in zip(keys, conversations) if key not in self.known}
        with ThreadPoolExecutor(self.in_flight) as threads, open(self.file, "a", encoding="utf-8") as file:
            waiting = {threads.submit(self.ask, messages, max_tokens, temperature): key for key, messages in missing.items()}
            try:
                for done in as_completed(waiting):
                    self.known[waiting[done]] = done.result()
                    file.write(json.dumps({"key": waiting[done], **asdict(done.result())}) + "\n")
                    file.flush()
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
        return [self.known[key] for key in keys]

    def key(self, messages, max_tokens, temperature):
        """What names a question in the file; of questions asked again the number of times counts."""
        question = json.dumps([self.model, messages, max_tokens, temperature, self.seed if temperature else 0])
        self.asked[question] += temperature > 0
        return hashlib.sha256(f"{question} {self.asked[question]}".encode()).hexdigest()

    def ask(self, messages, max_tokens, temperature):
        """One Completion from the server; what may be a passing fault is tried again."""
        for pause in (*PAUSES, None):
            try:
                answer = self.client.chat_completion(messages, model=self.model, max_tokens=max_tokens, temperature=temperature)
                [choice], usage = answer.choices, answer.usage
                # Of a thinking model the thoughts are no operations.
                text = re.sub(r"<think>.*?(</think>|$)", "", choice.message.content or "", flags=re.DOTALL)
                return Completion(text, usage.completion_tokens if usage else rough_count([text])[0], choice.finish_reason == "length")
            except Exception as error:  # the transport's own types differ from version to version
                status = getattr(getattr(error, "response", None), "status_code", None)
                if pause is None or status in FINAL:
                    raise BadInput(f"--endpoint {self.url}, model {self.model}: {error}; answers so far are in {self.file}") from error
                time.sleep(pause)


class EndpointPolicy:
    """A policy that is played by a server. Its tokens are known by number alone, so it cannot be trained."""

    def __init__(self, endpoint, config):
        self.endpoint, self.config, self.temperature = endpoint, config, config.temperature

    def encode(self, observations):
        """The conversation for each observation, shortened by agent.fit where it does not fit."""
        system = {"role": "system", "content": instruction(self.config)}
        for observation in observations:
            fit(observation, lambda o: sum(self.count([system["content"], render(o)])), self.config.max_prompt_tokens)
        return [[system, {"role": "user", "content": render(observation)}] for observation in observations]

    def respond(self, observations):
        """One sampled Response for each observation."""
        completions = self.endpoint.complete(self.encode(observations), self.config.max_response_tokens, self.temperature)
        return [Response(c.text, c.tokens, truncated=c.truncated) for c in completions]

    def count(self, texts, written=False):
        """rough_count, in place of the tokenizer that is not here."""
        return rough_count(texts)


def rough_count(texts):
    """About the number of tokens of each text: four bytes to a token, which is rather too many tokens for English."""
    return [-(-len(text.encode()) // 4) for text in texts]
