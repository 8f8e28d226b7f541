"""What things cost, each beside another way to do the same, in one run: ratios of times, with their spread over repeats.

    python bench.py                  all parts, some minutes on two CPU cores
    python bench.py store rollouts   some of them

Peers are installed for this alone: pip install trl datasets langchain-community faiss-cpu. One that is missing is left out, and said so.
A ratio is the peer's time divided by ours, so above 1 ours is faster: the median over the repeats, and the smallest and largest. The two
take turns, so that a machine that is busy for a while slows down both.
"""

import copy
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import Qwen3Config, Qwen3ForCausalLM

import grpo
from config import BadInput, Config
from demonstrations import demonstrate
from memory import HashedEmbedder, Memory
from optim import make_optimizers
from policy import LanguageModel, open_policy, train_tokenizer
from tasks import corpus, load_tasks


def against(name, ours, peers, repeats=5):
    """Time `ours` and each of `peers`, {label: function}, in turn, and print the ratios."""
    times = {label: [] for label in ("ours", *peers)}
    for _ in range(repeats + 1):
        for label, work in (("ours", ours), *peers.items()):
            started = time.perf_counter()
            work()
            times[label].append(time.perf_counter() - started)
    print(f"\n{name}: ours {np.median(times['ours'][1:]):.3g} s")  # the first of each warms up
    for label in peers:
        ratios = np.array(times[label][1:]) / np.array(times["ours"][1:])
        print(f"    {label:58} {np.median(ratios):8.2f} x  ({ratios.min():.2f} to {ratios.max():.2f})")


def unit(rng, *shape):
    """Random vectors of unit length, float32."""
    vectors = rng.standard_normal(shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


# --- the store -----------------------------------------------------------------------------------------------------


def store(count=1_000_000):
    """A wave of 64 episodes against one LangChain FAISS store that all share; and one store of `count` entries."""
    episodes, entries, dimensions, rng = 64, 100, 1024, np.random.default_rng(0)
    vectors, news = unit(rng, episodes, entries, dimensions), unit(rng, 3, episodes, dimensions)
    memories = [Memory() for _ in range(episodes)]
    for memory, rows in zip(memories, vectors):
        for number, row in enumerate(rows):
            memory.create(f"entry {number}", row)

    def wave():
        for number, memory in enumerate(memories):
            memory.search(news[0, number], 6)
            memory.delete(memory.create("new", news[1, number]))  # so that the next repeat finds as many
            memory.update(number, "changed", news[2, number])

    peers = {}
    try:
        peers["LangChain FAISS, one store with a metadata filter"] = shared_faiss(vectors, news)
    except ImportError as error:
        print(f"left out: LangChain FAISS: {error}")
    against(f"store: a Read, a Create, a Delete and an Update in each of {episodes} episodes with {entries} entries", wave, peers)

    memory = Memory()
    for _ in range(0, count, 1000):
        for row in unit(rng, 1000, dimensions):
            memory.create("", row)
    query = unit(rng, dimensions)
    matrix = memory._vectors[:count]
    against(f"store: a Read among {count:,} entries of {dimensions} dimensions", lambda: memory.search(query, 6),
            {"one matrix-vector product": lambda: matrix @ query})

    def change(memory):
        for _ in range(100):
            memory.delete(memory.create("", query))

    small = Memory()
    small.create("", query)
    against(f"store: 100 Creates and Deletes among {count:,} entries", lambda: change(memory), {"among 1": lambda: change(small)})


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


# --- rollouts ------------------------------------------------------------------------------------------------------


def town_policy():
    """(the town's tiny policy with random weights, the observations of 64 demonstrated episodes' fourth turns)."""
    config = Config(cpu=not torch.cuda.is_available())
    device = torch.device("cpu" if config.cpu else "cuda")
    policy = open_policy("", config).to(device)
    stream = load_tasks(config, "train", policy.count)
    episodes = demonstrate([stream(index) for index in range(64)], config, HashedEmbedder(), policy.count, quiet=True)
    return policy, [turn.observation for episode in episodes for turn in episode.turns[3:4]]


def rollouts():
    """One wave of responses, all of 20 tokens in every way to sample."""
    policy, observations = town_policy()
    policy.end_ids = torch.tensor([-1])  # no token ends a response, as min_new_tokens has it for the peers
    new = policy.config.max_response_tokens
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, pad_token_id=policy.tokenizer.pad_token_id)

    def generate(prompts):
        """transformers' generate with left padding: what TRL's trainers call where there is no vLLM."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=policy.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
        policy.model.generate(input_ids=ids, attention_mask=mask, **settings)

    def one_at_a_time():
        for prompt in policy.encode(observations):
            generate([prompt])

    against(f"rollouts: a wave of {len(observations)} responses of {new} tokens", lambda: policy.respond(observations), {
        "generate, one response at a time": one_at_a_time,
        "generate, all in one batch (TRL's way without vLLM)": lambda: generate(policy.encode(observations))}, repeats=3)
    print("\nrollouts: tokens per second against responses side by side")
    for width in (1, 8, 16, 32, 64, 128, 256):
        wave = (observations * 4)[:width]
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            policy.respond(wave)
            seconds.append(time.perf_counter() - started)
        print(f"    {width:4d} {new * width / np.median(seconds):10.0f}")


# --- the GRPO step -------------------------------------------------------------------------------------------------


def grpo_steps():
    """{label: a function that takes one optimiser step, AdamW, on the same 16 rows}: ours, and TRL's GRPOTrainer where it is installed.

    A random-weight Qwen3 with the vocabulary of the real ones, 151,936, and rows of 64 to 512 + 8 to 128 tokens, as reading turns are.
    Micro-batches: ours by --micro_batch_tokens 4096, TRL's of 8 rows.
    """
    config = Config(cpu=not torch.cuda.is_available(), micro_batch_tokens=4096, optimizer="adamw", max_prompt_tokens=600, max_response_tokens=128)
    device, rng = torch.device("cpu" if config.cpu else "cuda"), random.Random(0)
    tokenizer = train_tokenizer(corpus(config), config, word_level=True)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
                                         head_dim=64, intermediate_size=256, eos_token_id=tokenizer.eos_token_id)).to(device)
    rows = []
    for _ in range(16):
        prompt, response = ([rng.randrange(5, 100) for _ in range(rng.randint(*size))] for size in ((64, 512), (8, 128)))
        rows.append((prompt, response, [-5.0] * len(response), rng.choice((-0.5, 0.5))))
    policy = LanguageModel(copy.deepcopy(model), tokenizer, config)
    optimizers, accelerator = make_optimizers(policy, 1e-6, "adamw"), Accelerator(cpu=config.cpu)
    tokens = sum(len(row[1]) for row in rows)
    steps = {"ours": lambda: grpo.update(policy, None, rows, tokens, optimizers, accelerator, config)}
    try:
        steps["TRL's GRPOTrainer"] = trl_step(model, tokenizer, rows, config.cpu)
    except ImportError as error:
        print(f"left out: TRL: {error}")
    return steps


def trl_step(model, tokenizer, rows, cpu):
    """One step of TRL's GRPOTrainer on the rows, from the point where they have been sampled: its loss, in its padding."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, num_generations=8, gradient_accumulation_steps=2, beta=0.0,
                          loss_type="dapo", max_completion_length=128, report_to="none", use_cpu=cpu, bf16=not cpu, gradient_checkpointing=False)
    trainer = GRPOTrainer(model=model, reward_funcs=lambda **_: [0.0], args=settings, processing_class=tokenizer,
                          train_dataset=Dataset.from_dict({"prompt": ["x"] * 8}))
    optimizer, device = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0), trainer.model.device
    trainer.current_gradient_accumulation_steps = 2
    (left, right), count = (max(len(row[side]) for row in rows) for side in (0, 1)), sum(len(row[1]) for row in rows)
    batches = []
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batches.append({name: torch.tensor(values, device=device) for name, values in {
            "prompt_ids": [[0] * (left - len(p)) + p for p, *_ in part], "prompt_mask": [[0] * (left - len(p)) + [1] * len(p) for p, *_ in part],
            "completion_ids": [r + [0] * (right - len(r)) for _, r, *_ in part], "completion_mask": [[1] * len(r) + [0] * (right - len(r)) for _, r, *_ in part],
            "advantages": [row[3] for row in part], "num_items_in_batch": count}.items()})

    def step():
        for batch in batches:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def update():
    """The time of one optimiser step, and the memory that it takes."""
    steps = grpo_steps()
    against("GRPO: one optimiser step on 16 rows, 151,936 words", steps.pop("ours"), steps, repeats=3)
    peaks = {label: float(subprocess.run([sys.executable, __file__, "--peak", label], capture_output=True, text=True, check=True).stdout.split()[-1])
             for label in ("ours", *steps)}
    for label, most in peaks.items():
        print(f"    peak memory of {label:43} {most:8.2f} GB, of which ours takes {peaks['ours'] / most:.2f}")


def peak(label):
    """Print the memory, in GB, that two of grpo_steps' steps take at most above what is there before them. For a process of its own."""
    steps = grpo_steps()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        steps[label](), steps[label]()
        print((torch.cuda.max_memory_allocated() - before) / 1e9)
    else:
        def read(name):
            return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1e6

        before = read("VmRSS")
        steps[label](), steps[label]()
        print(read("VmHWM") - before)


PARTS = {"store": store, "rollouts": rollouts, "update": update}


def main():
    if sys.argv[1:2] == ["--peak"]:
        return peak(sys.argv[2])
    names = sys.argv[1:] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise BadInput(f"bench.py: there is no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
