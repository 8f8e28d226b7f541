"""Other ways to do what the project does, for bench.py to time beside it. What they need is imported where it is used."""

import tempfile

import torch

from agent import Response


def shared_faiss(vectors, news):
    """The same wave in one store for all episodes, searched with a filter: the released code's way."""
    from langchain_community.docstore.in_memory import InMemoryDocstore
    from langchain_community.vectorstores import FAISS
    import faiss

    episodes, entries, dimensions = vectors.shape
    store = FAISS(embedding_function=lambda text: None, index=faiss.IndexFlatIP(dimensions), docstore=InMemoryDocstore(), index_to_docstore_id={})

    def add(episode, id, vector):
        store.add_embeddings([(f"entry {id}", vector.tolist())], metadatas=[{"episode": episode}], ids=[f"{episode} {id}"])

    for episode in range(episodes):
        store.add_embeddings([(f"entry {number}", row.tolist()) for number, row in enumerate(vectors[episode])],
                             metadatas=[{"episode": episode}] * entries, ids=[f"{episode} {number}" for number in range(entries)])

    def wave():
        for episode in range(episodes):
            found = store.similarity_search_by_vector(news[0, episode].tolist(), k=6, filter={"episode": episode}, fetch_k=episodes * entries)
            assert len(found) == 6
            add(episode, "new", news[1, episode])
            store.delete([f"{episode} new"])
            store.delete([f"{episode} {episode}"])
            add(episode, episode, news[2, episode])

    return wave


class Generate:
    """The policy played by transformers' generate with left padding: what TRL's trainers call where there is no vLLM. All side by side
    in one batch, of which each waits for the longest; or with batch=1 one after the other.
    """

    def __init__(self, policy, batch=None):
        self.policy, self.batch, self.config = policy, batch, policy.config

    def respond(self, observations):
        prompts, responses = self.policy.encode(observations), []
        for start in range(0, len(prompts), self.batch or len(prompts)):
            part = prompts[start : start + (self.batch or len(prompts))]
            longest = max(map(len, part))
            ids, mask = (torch.tensor(rows, device=self.policy.device) for rows in (
                [[0] * (longest - len(p)) + p for p in part], [[0] * (longest - len(p)) + [1] * len(p) for p in part]))
            new = self.policy.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.config.max_response_tokens, do_sample=True, temperature=1.0, top_k=0,
                eos_token_id=sorted(self.policy.end_ids), pad_token_id=self.policy.tokenizer.pad_token_id)[:, longest:].tolist()
            for row in new:
                length = next((n for n, id in enumerate(row, start=1) if id in self.policy.end_ids), len(row))
                responses.append(Response(self.policy.tokenizer.decode(row[:length]), length))
        return responses


def trl_steps(model, tokenizer, rows, kind, config):
    """{label: one step of TRL's trainer on the rows, from the point where they have been sampled: its loss, in its padding}, if it is there."""
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
    except ImportError as error:
        print(f"left out: TRL: {error}")
        return {}
    common = dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, gradient_accumulation_steps=2, report_to="none",
                  use_cpu=config.cpu, bf16=not config.cpu, gradient_checkpointing=config.recompute)
    if kind == "sft":
        name, trainer = "TRL's SFTTrainer", SFTTrainer(
            model=model, args=SFTConfig(**common), processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": ["Anna"] * 8, "completion": ["Rome"] * 8}))
    else:
        settings = GRPOConfig(**common, num_generations=8, beta=0.0, loss_type="dapo", max_completion_length=max(len(row[1]) for row in rows))
        name, trainer = "TRL's GRPOTrainer", GRPOTrainer(
            model=model, reward_funcs=lambda **_: [0.0], args=settings, processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": ["x"] * 8}))
    optimizer, device = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0), trainer.model.device
    trainer.current_gradient_accumulation_steps = 2
    left, right, whole = (max(map(len, side)) for side in ([p for p, *_ in rows], [r for _, r, *_ in rows], [p + r for p, r, *_ in rows]))
    count, batches = sum(len(row[1]) for row in rows), []
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batches.append({name: torch.tensor(values, device=device) for name, values in ({
            "input_ids": [p + r + [0] * (whole - len(p + r)) for p, r, *_ in part],
            "attention_mask": [[1] * len(p + r) + [0] * (whole - len(p + r)) for p, r, *_ in part],
            "labels": [[-100] * len(p) + r + [-100] * (whole - len(p + r)) for p, r, *_ in part]} if kind == "sft" else {
            "prompt_ids": [[0] * (left - len(p)) + p for p, *_ in part], "prompt_mask": [[0] * (left - len(p)) + [1] * len(p) for p, *_ in part],
            "completion_ids": [r + [0] * (right - len(r)) for _, r, *_ in part], "completion_mask": [[1] * len(r) + [0] * (right - len(r)) for _, r, *_ in part],
            "advantages": [row[3] for row in part], "num_items_in_batch": count}).items()})

    def step():
        for batch in batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch, **({"num_items_in_batch": torch.tensor(count, device=device)} if kind == "sft" else {}))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {name: step}
