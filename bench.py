"""What things cost, each beside another way to do the same, in one run: ratios of times, with their spread over repeats.

    python bench.py                  all parts but the last; on two CPU cores 12 minutes, and ten more for TRL's GRPO step
    python bench.py store rollouts   some of them: store, rollouts, grpo, sft (an optimiser step), length
    python bench.py gpu              on a GPU, under ten minutes; on a CPU a trial with tiny sizes

Peers are installed for this alone: pip install trl datasets langchain-community faiss-cpu. One that is missing is left out, and said so.
A ratio is the peer's time divided by ours, so above 1 ours is faster: the median over the repeats, and the smallest and largest. The two
take turns, so that a machine that is busy for a while slows down both.
"""

import copy
import json
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
import sft
from agent import Observation, run_episodes
from config import PRESETS, BadInput, Config
from memory import HashedEmbedder, Memory, TransformerEmbedder
from optim import make_optimizers
from peers import Generate, shared_faiss, trl_steps
from policy import LanguageModel, open_policy, train_tokenizer
from scoring import exact_match
from tasks import corpus, load_tasks
from town import NAMES


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


# --- rollouts ------------------------------------------------------------------------------------------------------


def rollouts():
    """Whole episodes of the town, by a policy with random weights whose responses are as long as a trained one's, about 7 tokens."""
    config = Config(cpu=not torch.cuda.is_available())
    policy = open_policy("", config).to("cpu" if config.cpu else "cuda")
    policy.end_ids = set(range(0, policy.known_ids, 7))
    stream, embed = load_tasks(config, "train", policy.count), HashedEmbedder()

    def play(player, episodes, group=8):
        return run_episodes([stream(number // group) for number in range(episodes)], player, config, embed, exact_match)

    against("rollouts: 8 tasks, 8 episodes each", lambda: play(policy, 64), {
        "generate, one response at a time": lambda: play(Generate(policy, 1), 64),
        "generate, all in one batch (TRL's way without vLLM)": lambda: play(Generate(policy), 64)}, repeats=3)
    print("\nrollouts: turns and sampled tokens per second against episodes side by side, each of its own task")
    for width in (1, 8, 16, 32, 64, 128, 256):
        rates = []
        for _ in range(4):
            started = time.perf_counter()
            turns = [turn for episode in play(policy, width, 1) for turn in episode.turns]
            seconds = time.perf_counter() - started
            rates.append((len(turns) / seconds, sum(turn.response.tokens for turn in turns) / seconds))
        print("    {:4d} {:8.0f} {:8.0f}".format(width, *np.median(rates[1:], axis=0)))


def length():
    """What an episode costs against the number of its documents, with a tiny policy that has random weights, on made-up texts."""
    rng, cpu = random.Random(0), not torch.cuda.is_available()
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(300)]

    def paragraph():
        return [" ".join(rng.choices(words, k=25)) + "." for _ in range(4)]

    with tempfile.TemporaryDirectory() as folder:
        file, costs, counts = Path(folder) / "made.json", [], (200, 400, 800, 1600)
        file.write_text(json.dumps([{"question": f"What is {n}?", "answer": "it", "supporting_facts": [[f"{n} 0", 0]],
                                     "context": [[f"{n} {k}", paragraph()] for k in range(10)]} for n in range(250)]))
        for count in counts:
            config = Config(**PRESETS["qa"] | dict(task="hotpotqa", data=str(file), documents=count, questions=2, max_response_tokens=64, cpu=cpu))
            policy = open_policy("", config).to("cpu" if cpu else "cuda")
            policy.end_ids = set(range(0, policy.known_ids, 7))  # short responses
            task = load_tasks(config, "test", policy.count)(0)
            started = time.perf_counter()
            [episode] = run_episodes([task], policy, config, HashedEmbedder(), exact_match)
            seconds, read = time.perf_counter() - started, [len(turn.response.prompt_ids) for turn in episode.turns]
            costs.append([len(read), sum(read) + sum(turn.response.tokens for turn in episode.turns), seconds, max(read)])
    print("\nlength: per episode, against documents\n    documents    turns   tokens  seconds  longest prompt")
    for count, cost in zip(counts, costs):
        print("    {:9d} {:8.1f} {:8.0f} {:8.2f} {:15d}".format(count, *cost))
    for name, values in zip(("turns", "tokens", "seconds"), np.array(costs).T):
        slope = np.polyfit(counts, values, 1)[0]
        print(f"    {name}: {slope:.3g} per document; correlation {np.corrcoef(counts, values)[0, 1]:.5f}")


# --- the optimiser step --------------------------------------------------------------------------------------------


def made_policy(config, **shape):
    """(random-weight Qwen3 of that shape, a policy of a copy of it): the vocabulary has the size of the real one, 151,936 words."""
    tokenizer = train_tokenizer(corpus(Config()), Config(), word_level=True)
    device = torch.device("cpu" if config.cpu else "cuda")
    torch.manual_seed(0)
    with device:
        model = Qwen3ForCausalLM(Qwen3Config(**{"vocab_size": 151_936, "eos_token_id": tokenizer.eos_token_id, "head_dim": 64} | shape))
    return model, LanguageModel(copy.deepcopy(model), tokenizer, config)


def made_rows(count, prompt, response, rng):
    """Rows of random tokens, whose prompts and responses have between prompt[0] and prompt[1], response[0] and response[1] of them."""
    rows = []
    for _ in range(count):
        ids = [[rng.randrange(5, 100) for _ in range(rng.randint(*size))] for size in (prompt, response)]
        rows.append((*ids, [-5.0] * len(ids[1]), rng.choice((-0.5, 0.5))))
    return rows


def steps(kind):
    """{label: a function that takes one optimiser step, AdamW, on the same 16 rows}: ours, and TRL's where it is installed.

    kind: "grpo" or "sft". Rows of 64 to 512 + 8 to 128 tokens, as reading turns are. Micro-batches: ours by --micro_batch_tokens
    4096, TRL's of 8 rows.
    """
    config = Config(cpu=not torch.cuda.is_available(), micro_batch_tokens=4096, optimizer="adamw", max_prompt_tokens=600, max_response_tokens=128)
    model, policy = made_policy(config, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=256)
    rows = made_rows(16, (64, 512), (8, 128), random.Random(0))
    return {"ours": our_step(policy, rows, kind)} | trl_steps(model, policy.tokenizer, rows, kind, config)


def our_step(policy, rows, kind):
    config, optimizers, accelerator = policy.config, make_optimizers(policy, 1e-6, "adamw"), Accelerator(cpu=policy.config.cpu)
    tokens = sum(len(row[1]) for row in rows)
    if kind == "sft":
        return lambda: sft.update(policy, rows, tokens, optimizers, accelerator, config)
    return lambda: grpo.update(policy, None, rows, tokens, optimizers, accelerator, config)


def update(kind):
    """The time of one optimiser step, and the memory that it takes. kind: as for `steps`."""
    peers = steps(kind)
    against(f"{kind.upper()}: one optimiser step on 16 rows, 151,936 words", peers.pop("ours"), peers, repeats=3)
    peaks = {label: float(subprocess.run([sys.executable, __file__, "--peak", kind, label], capture_output=True, text=True, check=True).stdout.split()[-1])
             for label in ("ours", *peers)}
    for label, most in peaks.items():
        print(f"    peak memory of {label:43} {most:8.2f} GB, of which ours takes {peaks['ours'] / most:.2f}")


def peak(kind, label):
    """Print the memory, in GB, that two of the steps take at most above what is there before them. For a process of its own."""
    step = steps(kind)[label]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(), step()
        print((torch.cuda.max_memory_allocated() - before) / 1e9)
    else:
        def read(name):
            return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1e6

        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of making it all, does not count
        before = read("VmRSS")
        step(), step()
        print(read("VmHWM") - before)


# --- a GPU ---------------------------------------------------------------------------------------------------------

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 products without sparsity, per second
SHAPES = {  # Qwen3's
    "Qwen3-0.6B": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072),
    "Qwen3-1.7B": dict(hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=6144)}


def model_flops(model, rows):
    """Floating-point operations of one training step on rows of (prompt, response), as the model needs them, recomputation left out:

        sum over rows of  6 W T  +  6 V D R  +  6 L A T^2

    W the weights of the L layers, T the tokens of a row, R those of its response, V the vocabulary, D the width, A heads times head
    dimension: twice for each product (a multiplication and an addition), three times for forward and backward. Attention is causal, so
    that its 12 L A T^2 are halved; the last layer counts in full, as is usual, though policy.LastLayer does less. Model-FLOPs
    utilisation (MFU) is this, divided by the time and by what the GPU can do.
    """
    config = model.config
    weights = sum(p.numel() for p in model.model.layers.parameters())
    return sum(6 * weights * (len(p) + len(r)) + 6 * config.vocab_size * config.hidden_size * len(r)
               + 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (len(p) + len(r)) ** 2 for p, r, *_ in rows)


def gpu():
    """On a GPU, under ten minutes: the default run end to end, then Qwen3-0.6B and 1.7B with random weights at the paper's shapes. On a
    CPU the same with tiny sizes, to see that it works.
    """
    cpu = not torch.cuda.is_available()
    small = "--sft_tasks 40 --sft_steps 4 --grpo_steps 2 --eval_tasks 8 --overwrite".split() if cpu else []
    with tempfile.TemporaryDirectory() as folder:
        for script in ("sft.py", "grpo.py"):
            started = time.perf_counter()
            subprocess.run([sys.executable, str(Path(__file__).parent / script), *small], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
            last = json.loads((Path(folder) / f"runs/town/{script[:-3]}/metrics.jsonl").read_text().splitlines()[-1])
            print(f"\ngpu: {script}: {time.perf_counter() - started:.0f} s, held-out EM {last['held_out_em']:.3f}")
    shapes = {"a tiny Qwen3": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=128)} if cpu else SHAPES
    for name, shape in shapes.items():
        one_size(name, shape, cpu)


def one_size(name, shape, cpu):
    """Rollout, embedding and update of one model: 32 reading turns with chunks of 4096 tokens and responses of 256."""
    turns, chunk, response = (4, 200, 8) if cpu else (32, 4096, 256)
    config = Config(cpu=cpu, chunk_tokens=chunk, max_prompt_tokens=chunk + 1024, max_response_tokens=response, sample_rows=turns, optimizer="adamw",
                    micro_batch_tokens=2 * chunk, recompute=True)
    model, policy = made_policy(config, **shape, max_position_embeddings=2 * chunk + 2048)
    player, rng = LanguageModel(copy.deepcopy(model).to(torch.float32 if cpu else torch.bfloat16), policy.tokenizer, config), random.Random(0)
    player.end_ids, texts = set(), [" ".join(rng.choices(list(NAMES), k=chunk)) for _ in range(turns)]
    observations = [Observation(("Where does Anna live?",), "", "", [], chunk=text) for text in texts]
    player.respond(observations[:2])  # warms up
    seconds, responses = timed(lambda: player.respond(observations), cpu)
    rows = [(one.prompt_ids, one.ids, one.logprobs, rng.choice((-0.5, 0.5))) for one in responses]
    rolled, sampled = seconds, sum(len(row[1]) for row in rows)
    with tempfile.TemporaryDirectory() as folder:  # entries of 50 words, by an encoder of this shape
        player.save(folder)
        embed = TransformerEmbedder(folder, player.device)
    embed(["warm up"])
    embedded, _ = timed(lambda: embed([text[:300] for text in texts]), cpu)
    step = our_step(policy, rows, "grpo")
    if not cpu:
        torch.cuda.reset_peak_memory_stats()
    step()
    seconds, metrics = timed(step, cpu)
    share = model_flops(policy.model, rows) / seconds / next((most for key, most in PEAKS.items() if not cpu and key in torch.cuda.get_device_name()), float("nan"))
    print(f"\ngpu: {name}, {turns} turns: rollout {rolled:.2f} s ({sampled / rolled:.0f} sampled tokens/s), embed {embedded:.2f} s, update {seconds:.2f} s "
          f"({sum(len(row[0]) + len(row[1]) for row in rows) / seconds:.0f} tokens/s, MFU {share:.1%}), gap {metrics['gap']:.2g}"
          + ("" if cpu else f", its peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"))
    for label, peer in trl_steps(model, policy.tokenizer, rows, "grpo", config).items():
        peer()
        print(f"    {label}: update {timed(peer, cpu)[0]:.2f} s")


def timed(work, cpu):
    """(seconds, what `work` returns)."""
    started = time.perf_counter()
    result = work()
    if not cpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


PARTS = {"store": store, "rollouts": rollouts, "grpo": lambda: update("grpo"), "sft": lambda: update("sft"), "length": length, "gpu": gpu}


def main():
    if sys.argv[1:2] == ["--peak"]:
        return peak(*sys.argv[2:])
    names = sys.argv[1:] or [name for name in PARTS if name != "gpu"]
    if unknown := [name for name in names if name not in PARTS]:
        raise BadInput(f"bench.py: there is no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    for name in names:
        PARTS[name]()


if __name__ == "__main__":
    main()
