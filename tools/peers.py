"""Other ways to do what the project does, for tools/bench.py. Their packages are optional."""

import tempfile

import torch
from torch.nn.utils.rnn import pad_sequence

from agent import Observation, Response
from config import Config
from policy import LanguageModel, Sample, compute_dtype


class Generate:
    """A policy sampled by transformers' generate, with all prompts in one batch.

    TRL samples like this without vLLM: left padding, and each response waits for the longest.
    """

    def __init__(self, policy: LanguageModel):
        self.policy = policy

    def respond(self, observations: list[Observation]) -> list[Response]:
        policy = self.policy
        with policy.model.device:
            ids, mask = pad([ids for _, ids in policy.encode(observations)], "left")  # (B, P)
        end, padding = sorted(policy.end_ids), policy.tokenizer.pad_token_id
        settings = {"do_sample": True, "temperature": policy.temperature, "top_k": 0, "top_p": 1.0}
        settings |= {"repetition_penalty": 1.0, "eos_token_id": end, "pad_token_id": padding}
        settings |= {"max_new_tokens": policy.config.max_response_tokens, "attention_mask": mask}
        with policy.autocast():
            sampled = policy.model.generate(ids, **settings)  # (B, P + T)
        responses = []
        for row in sampled[:, ids.shape[1] :].tolist():
            ends = [number for number, id in enumerate(row, start=1) if id in policy.end_ids]
            row = row[: ends[0]] if ends else row
            responses.append(Response(policy.tokenizer.decode(row), len(row)))
        return responses


def pad(rows: list[list[int]], side: str = "right", value: int = 0) -> tuple:
    """(the rows padded to the longest, their mask), both (B, T)."""
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    rows = list(map(torch.tensor, rows))
    return pad_sequence(rows, True, value, side), pad_sequence(masks, True, 0, side)


def trl_steps(model, tokenizer, batches: list[list[Sample]], kind: str, config: Config) -> dict:
    """{label: function that takes a step of TRL's trainer on micro-batches}. {} without TRL."""
    try:
        trainer = make_trainer(model, tokenizer, kind, config)
    except ImportError as error:
        print(f"left out: TRL: {error}")
        return {}
    trainer.current_gradient_accumulation_steps = len(batches)
    model = trainer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    with model.device:
        num_items = torch.tensor(sum(len(one.response_ids) for batch in batches for one in batch))
        batches = [collate(batch, kind) for batch in batches]
    if kind == "grpo":
        batches = [batch | {"num_items_in_batch": num_items} for batch in batches]

    def step():
        for batch in batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {f"TRL's {type(trainer).__name__}": step}


def make_trainer(model, tokenizer, kind, config):
    """TRL's trainer with a dummy data set: we pass batches. Raises ImportError without TRL."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "use_cpu": config.cpu}
    common |= {"bf16": compute_dtype(config, model.device) == torch.bfloat16}
    common |= {"gradient_checkpointing": config.gradient_checkpointing}
    data = Dataset.from_dict({"prompt": ["Anna"] * 8, "completion": ["Rome"] * 8})
    rest = {"processing_class": tokenizer, "train_dataset": data}
    if kind == "sft":
        return SFTTrainer(model=model, args=SFTConfig(**common), **rest)
    common |= {"num_generations": 8, "beta": 0.0, "loss_type": "dapo"}
    settings = GRPOConfig(max_completion_length=config.max_response_tokens, **common)
    return GRPOTrainer(model=model, reward_funcs=lambda **_: [0.0], args=settings, **rest)


def collate(samples: list[Sample], kind: str) -> dict[str, torch.Tensor]:
    """A batch for TRL. SFT pads whole rows. GRPO pads prompts left and responses right."""
    prompts = [sample.prompt_ids for sample in samples]
    responses = [sample.response_ids for sample in samples]
    if kind == "sft":
        rows = [prompt + response for prompt, response in zip(prompts, responses)]
        labels = [[-100] * len(p) + response for p, response in zip(prompts, responses)]
        ids, mask = pad(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": pad(labels, value=-100)[0]}
    batch = dict(zip(("prompt_ids", "prompt_mask"), pad(prompts, "left")))
    batch |= zip(("completion_ids", "completion_mask"), pad(responses))
    return batch | {"advantages": torch.tensor([sample.advantage for sample in samples])}
