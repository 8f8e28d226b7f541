"""A chat model behind a server that speaks OpenAI's protocol (vLLM, llama.cpp, Ollama, a hub provider): as policy, teacher or judge.

    python evaluate.py --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-8B --task hotpotqa --data hotpot_dev.json

The key, where the server wants one, is taken from the environment: OPENAI_API_KEY. Every answer is written to a file at once, and a
question that stands there is not asked again, so that a job that was stopped, or lost its server, goes on where it was.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from huggingface_hub import InferenceClient

from agent import Response, fit, instruction, render
from config import BadInput

TIMEOUT = 600  # seconds for one answer
PAUSES = (1, 4, 15, 60)  # seconds before each new try
FINAL = {400, 401, 403, 404, 405, 413, 422}  # HTTP errors that another try cannot mend


class Endpoint:
    """The server at `url`, and the `model` it serves under that name. `file`: where the answers are kept (JSONL); fresh: not those of before."""

    def __init__(self, url, model, file, in_flight, seed=0, fresh=False):
        self.url, self.model, self.file, self.in_flight, self.seed = url, model, Path(file), in_flight, seed
        self.client = InferenceClient(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=TIMEOUT)
        self.extra = {"chat_template_kwargs": {"enable_thinking": False}}  # as for a local model; not every server takes it
        self.asked, self.known, self.lock, self.told = Counter(), {}, threading.Lock(), False  # told: of a fault that may pass
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.file.unlink(missing_ok=True)
        if self.file.exists():
            self.known = {row.pop("key"): Response(**row) for row in kept_rows(self.file, "key")}
        if self.known:
            print(f"{self.file} holds {len(self.known)} answers, which are not asked for again; --overwrite begins it anew")

    def complete(self, conversations, max_tokens, temperature):
        """An agent.Response for each list of messages; see serve."""
        served = self.serve(deque(enumerate(conversations)), lambda item: item[1], max_tokens, temperature)
        answers = {number: response for some in served for (number, _), response in some}
        return [answers[number] for number in range(len(conversations))]

    def serve(self, waiting, conversation, max_tokens, temperature):
        """Yields [(item, its agent.Response)], some at a time, until the deque `waiting`, to which the caller may append between two
        yields, is empty. conversation(item) -> a list of messages; `in_flight` of them are asked for at the same time.

        The same conversation asked for again gets another sample, unless `temperature` is 0. BadInput when the server cannot be
        reached or refuses; what others answer meanwhile is kept.
        """
        asked = {}  # key: (Future, the items that wait for it)
        with open(self.file, "a", encoding="utf-8") as file, ThreadPoolExecutor(self.in_flight) as threads:
            try:
                while waiting or asked:
                    while waiting:
                        messages = conversation(item := waiting.popleft())
                        key = self.key(messages, max_tokens, temperature)
                        if key not in asked:
                            known = key in self.known
                            asked[key] = self.at_hand(key) if known else threads.submit(self.answer, key, file, messages, max_tokens, temperature), []
                        asked[key][1].append(item)
                    wait([future for future, _ in asked.values()], return_when=FIRST_COMPLETED)
                    done = [asked.pop(key) for key in list(asked) if asked[key][0].done()]
                    yield [(item, future.result()) for future, items in done for item in items]
            finally:
                threads.shutdown(cancel_futures=True)

    def at_hand(self, key):
        """A Future of the answer that is known by that key, which nothing has to be waited for."""
        future = Future()
        future.set_result(self.known[key])
        return future

    def answer(self, key, file, *question):
        """The server's answer, which is kept in the file."""
        response = self.ask(*question)
        with self.lock:
            self.known[key] = response
            file.write(json.dumps({"key": key, "text": response.text, "tokens": response.tokens, "truncated": response.truncated}) + "\n")
            file.flush()
        return response

    def key(self, messages, max_tokens, temperature):
        """What names a question in the file; of questions asked again the number of times counts."""
        question = json.dumps([self.url, self.model, messages, max_tokens, temperature, self.seed if temperature else 0])
        name = hashlib.sha256(question.encode()).hexdigest()
        self.asked[name] += temperature > 0
        return f"{name} {self.asked[name]}"

    def ask(self, messages, max_tokens, temperature):
        """One agent.Response from the server; what may be a passing fault is tried again."""
        pauses = list(PAUSES)
        while True:
            extra = self.extra
            try:
                answer = self.client.chat_completion(messages, model=self.model, max_tokens=max_tokens, temperature=temperature, extra_body=extra)
                [choice], usage = answer.choices, answer.usage
                # Of a model that thinks all the same, the thoughts are no operations.
                text = re.sub(r"<think>.*?(</think>|$)", "", choice.message.content or "", flags=re.DOTALL)
                return Response(text, usage.completion_tokens if usage else rough_count([text])[0], truncated=choice.finish_reason == "length")
            except Exception as error:  # the transport's own types differ from version to version
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status in (400, 422) and extra:
                    self.extra = None
                elif not pauses or status in FINAL:
                    raise BadInput(f"--endpoint {self.url}, model {self.model}: {' '.join(str(error).split())}; answers so far are in {self.file}") from error
                else:
                    if not self.told:
                        self.told = True
                        print(f"{self.url}: {' '.join(str(error).split())}; trying again for {sum(PAUSES)} seconds")
                    time.sleep(pauses.pop(0))


def kept_rows(path, mark):
    """The rows of a JSONL file that is being written; half a last line, which a stopped job may have left, is cut off.

    BadInput if it is something else: its first row has to be a dictionary with the key `mark`.
    """
    *lines, rest = path.read_bytes().split(b"\n")
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise BadInput(f"{path} is damaged, or another kind of file: {error}") from error
    if not (rows and isinstance(rows[0], dict) and mark in rows[0]) and (rows or rest):
        raise BadInput(f"{path} is another kind of file: its first line has no {mark!r}")
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return rows


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

    def serve(self, waiting):
        """See agent.waves; here each episode goes on as soon as it has its answer."""
        return self.endpoint.serve(waiting, lambda item: self.encode([item[1]])[0], self.config.max_response_tokens, self.temperature)

    def respond(self, observations):
        """One sampled Response for each observation."""
        return self.endpoint.complete(self.encode(observations), self.config.max_response_tokens, self.temperature)

    def count(self, texts, written=False):
        """rough_count, in place of the tokenizer that is not here."""
        return rough_count(texts)


def rough_count(texts):
    """About the number of tokens of each text: four bytes to a token, which is rather too many tokens for English."""
    return [-(-len(text.encode()) // 4) for text in texts]
