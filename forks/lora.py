"""LoRA: train small adapters instead of all weights of a chat model (pip install peft).

    python -m forks.lora sft --preset smollm2 --sft_lr 2e-3 --name lora
    python -m forks.lora grpo --name lora --grpo_lr 2e-4
    python -m forks.lora evaluate --name lora

Always use these commands, also to resume. Adapters need about ten times the learning rate of full
training. A checkpoint holds the adapters alone: from_pretrained opens it together with the base
model, which must stay where it was. Rollouts use the same weights. For one process.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import load_file
from transformers import integrations

import evaluate
import grpo
import policy
import sft
from config import need
from training import distributed

RANK, ALPHA = 16, 32
load_all = policy.load_policy
# transformers 5.24 asks for peft 0.22, which is not published. This was tested with 0.21.2.
integrations.peft.MIN_PEFT_VERSION = "0.21"


def load_policy(name, config, *_):
    """policy.load_policy, with adapters. Only the adapters are trained, so the base model may
    be in bf16 wherever passes run in bf16."""
    from peft import LoraConfig, set_peft_model_state_dict  # here: the tests run without it

    adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    saved = (Path(name) / "adapter_config.json").exists()  # in a checkpoint
    if saved:
        adapters = LoraConfig.from_pretrained(name)
    base = adapters.base_model_name_or_path if saved else name
    loaded = load_all(base, config, policy.compute_dtype(config, PartialState().device))
    loaded.model.add_adapter(adapters)
    for key, parameter in loaded.model.named_parameters():
        parameter.requires_grad = "lora_" in key
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if saved:  # only now, because loading rounds to the parameters' dtype
        set_peft_model_state_dict(loaded.model, load_file(Path(name) / "adapter_model.safetensors"))
    return loaded


sft.load_policy = grpo.load_policy = evaluate.load_policy = load_policy
distributed.make_rollout_model = lambda trained, accelerator: trained

if __name__ == "__main__":
    scripts = {"sft": sft, "grpo": grpo, "evaluate": evaluate}
    need(sys.argv[1:] and sys.argv[1] in scripts, "say which script: sft, grpo or evaluate")
    scripts[sys.argv.pop(1)].main()
