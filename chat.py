"""Prompts: the chat template and the tokenizer, from texts to token ids and back."""

from collections.abc import Callable
from dataclasses import replace

from jinja2 import TemplateError

from agent import Observation
from config import BadInput, need

ANSWER = "@answer@"  # stands for a response while the template is examined
# Put before a template that would print today's date: a resumed run has to see the same prompts.
FIXED_DATE = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}"
NO_INSTRUCTION = "{# no instruction #}"  # in a template that leaves out the system message


def conversation(instruction: str, text: str, system_role: bool) -> list[dict[str, str]]:
    """The messages of a prompt. Without a system role, the instruction precedes the text."""
    if not system_role:
        return [{"role": "user", "content": f"{instruction}\n\n{text}"}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": text}]


def fit(observation: Observation, num_tokens: Callable, limit: int) -> Observation:
    """A copy of the observation, shortened until num_tokens(copy) is at most `limit`.

    First, in the full-context baseline, it cuts the end of the text. Then it drops entries, the
    least similar first. Then it cuts scratchpad and query. Raises BadInput if that is not enough.
    """
    while (tokens := num_tokens(observation)) > limit:
        if observation.question and observation.chunk:
            kept = len(observation.chunk) * limit // tokens * 99 // 100
            observation = replace(observation, chunk=observation.chunk[:kept])
        elif observation.entries:
            observation = replace(observation, entries=observation.entries[:-1])
        elif observation.scratchpad or observation.query:
            name = max(("scratchpad", "query"), key=lambda name: len(getattr(observation, name)))
            text = getattr(observation, name)
            observation = replace(observation, **{name: text[: len(text) // 2]})
        else:
            raise BadInput(
                f"the text and questions alone make a prompt of {tokens} tokens, longer than "
                f"--max_prompt_tokens {limit}: raise it, or lower --chunk_tokens or --questions"
            )
    return observation


class Chat:
    """A tokenizer, its chat template, and the instruction that every prompt begins with.

    end_id: the token that the template puts after a response. SFT teaches it, sampling stops at it.
    It need not be the tokenizer's eos_token. Raises BadInput if the template cannot be used.
    """

    def __init__(self, tokenizer, instruction: str):
        self.tokenizer, self.instruction = tokenizer, instruction
        self.name = tokenizer.name_or_path
        try:
            self.template = tokenizer.get_chat_template()
        except (ValueError, NotImplementedError) as error:  # none, or Mistral's tekken.json alone
            raise BadInput(
                f"{self.name} has no chat template: use an instruction-tuned model, or add the "
                "tokenizer.json and chat_template.jinja of its repository to the folder"
            ) from error
        if "strftime_now" in self.template:
            self.template = FIXED_DATE + self.template
        text = reason = ""
        for self.system_role in (True, False):  # Gemma 2 and Mistral 7B refuse a system message
            prompt = conversation(instruction, "x", self.system_role)
            try:
                chat = [*prompt, {"role": "assistant", "content": ANSWER}]
                [text] = self.apply_template([chat], tokenize=False)
            except (TemplateError, TypeError, ValueError) as error:
                reason = f": {error}"
            if instruction in text or NO_INSTRUCTION in self.template:
                break
        else:
            what = f"its chat template refuses the instruction, or drops it{reason}"
            raise BadInput(f"{self.name}: {what}")
        end = text.rpartition(ANSWER)[2].strip() if ANSWER in text else ""
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        special = ids and ids[0] in tokenizer.added_tokens_decoder
        self.end_id = ids[0] if special else tokenizer.eos_token_id
        need(self.end_id is not None, f"{self.name} has no end token: no response could end")

    def apply_template(self, chats: list[list[dict]], tokenize: bool = True, **settings) -> list:
        """The ids of each chat, or its text. Control tokens in the messages are encoded as text."""
        settings |= {"tokenize": tokenize, "sanitize_control_tokens": tokenize}
        settings |= {"chat_template": self.template, "enable_thinking": False}
        return self.tokenizer.apply_chat_template(chats, return_dict=False, **settings)

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text inside the template. Raises BadInput if the template refuses it."""
        chats = [conversation(self.instruction, text, self.system_role) for text in texts]
        try:  # a tokenizer refuses an empty list
            return self.apply_template(chats, add_generation_prompt=True) if chats else []
        except (TemplateError, ValueError) as error:
            raise BadInput(f"{self.name}: its template refuses the prompt: {error}") from error

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text. A control token that a text names is encoded as plain text."""
        settings = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(texts, **settings)["input_ids"] if texts else []

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        """The ids of each response, followed by the end token."""
        return [ids + [self.end_id] for ids in self.encode(texts)]

    def decode(self, ids: list[int]) -> str:
        """The text exactly as it was sampled."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
