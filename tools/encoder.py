"""An encoder as the embedder: --embedder NAME, a hub name or a folder.

The vectors are those of sentence-transformers, normalised. The encoder's folder describes them:
pooling in modules.json and 1_Pooling/config.json, prompts and truncate_dim in
config_sentence_transformers.json, max_seq_length and do_lower_case in sentence_bert_config.json.

Without modules.json, causal encoders are pooled at the last token and others by the mean. Without
a file of prompts, causal encoders use Qwen3-Embedding's. Others, such as most E5 models, use none.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from config import need

INSTRUCTION = (
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
)


def read_json(model: str, name: str) -> dict | list | None:
    """A file of the encoder's folder or hub repository. None if there is no such file."""
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def pooling_of(model: str) -> str | None:
    """'cls', 'mean' or 'lasttoken'; None without a Pooling module. BadInput for other modules."""
    mode = None
    for module in read_json(model, "modules.json") or []:
        kind = module["type"].split(".")[-1]
        known = kind in ("Transformer", "Pooling", "Normalize")
        need(known, f"its modules.json has a module {module['type']}, which is not supported")
        if kind != "Pooling":
            continue
        name = f"{module['path']}/config.json"
        settings = read_json(model, name)
        need(settings is not None, f"its modules.json refers to {name}, which is missing")
        on = [key for key in settings if key.startswith("pooling_mode_") and settings[key]]
        flags = [re.sub("pooling_mode_|_tokens?", "", key) for key in on]  # of older versions
        modes = settings.get("pooling_mode", flags or "mean")
        mode = modes if isinstance(modes, str) else " + ".join(modes)
        known = mode in ("cls", "mean", "lasttoken")
        need(known, f"its {name} asks for {mode} pooling, not for cls, mean or lasttoken")
        need(settings.get("include_prompt", True), f"its {name} has include_prompt: false")
    return mode


def pool(hidden: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """(B, T, d) -> (B, d). mask: (B, T), 0 for padding, which is on the right."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class TransformerEmbedder:
    """An encoder that transformers can load. Raises BadInput, OSError or ValueError if not."""

    def __init__(self, model: str, device="cpu", batch_size: int = 64):
        self.device, self.batch_size = device, batch_size
        pooling = pooling_of(model)
        settings = read_json(model, "config_sentence_transformers.json")
        limits = read_json(model, "sentence_bert_config.json") or {}
        chat = "message" in limits.get("modality_config", ())
        need(not chat, "its sentence_bert_config.json asks for a chat template: not supported")
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="right")
        self.model = AutoModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
        causal = any("CausalLM" in name for name in self.model.config.architectures or [])
        self.pooling = pooling or ("lasttoken" if causal else "mean")
        if settings is None:
            settings = {"prompts": {"query": INSTRUCTION}} if causal else {}
        prompts = settings.get("prompts") or {}
        self.query_prompt = prompts.get("query") or ""
        self.entry_prompt = prompts.get("document", prompts.get("passage")) or ""
        config = self.model.config.get_text_config()
        self.dimensions = settings.get("truncate_dim") or config.hidden_size
        self.lower_case = limits.get("do_lower_case")
        length = limits.get("max_seq_length") or self.tokenizer.model_max_length
        positions = getattr(config, "max_position_embeddings", length)
        self.tokenizer.model_max_length = min(length, positions)

    def __call__(self, texts: list[str], query: bool = False) -> np.ndarray:
        """(B, d) float32 of unit length."""
        prompt = self.query_prompt if query else self.entry_prompt
        texts = [prompt + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        order = np.argsort([len(text) for text in texts])  # similar lengths need little padding
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            vectors[rows] = self._embed([texts[row] for row in rows])
        return vectors

    @torch.no_grad()
    def _embed(self, texts):
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        batch = batch.to(self.device)
        hidden = self.model(**batch).last_hidden_state.float()  # (B, T, d)
        pooled = pool(hidden, batch["attention_mask"], self.pooling)[:, : self.dimensions]
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
