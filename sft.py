"""Supervised fine-tuning: a first policy from demonstrations.

    python sft.py                                                       the town, a tiny model, on a CPU: runs/town/sft
    python sft.py --task hotpotqa --data hotpot_train.json --documents 50
    python sft.py --model Qwen/Qwen3-0.6B --task hotpotqa --data hotpot_train.json

1. Scripted demonstrators play training tasks through the agent loop, from the observation alone. In the town they follow a
   mixture of workflows, one per episode, most of them poor: SFT learns the mixture, and GRPO has to find what pays.
2. Episodes with a task score below `keep_score` are dropped, as the paper drops its teacher's.
3. Every turn of the others is one row, (prompt, response), and the loss is the cross-entropy of the response tokens:

       L = - sum_rows sum_t log pi(response_t | prompt, response_<t) / (response tokens of the batch)
"""

import itertools
import math
import random
import re
import time

from tqdm import tqdm

import tasks as town
import parallel
from agent import TAGS, Response, run_episodes, summarize, tally
from config import RESUME, BadInput, parse_args
from memory import load_embedder
from policy import check_prompts, clip_and_step, count_bad_steps, make_optimizers, open_policy, scale_lr, schedule
from run import Run
from tasks import load_tasks, scorer, sentence

# --- the town's demonstrator ---------------------------------------------------------------------------------------

NAME = "(?P<name>" + "|".join(town.NAMES) + ")"
PATTERNS = [(kind, re.compile(template.format(name=NAME, value=r"(?P<value>\w+)"))) for kind, template in town.SENTENCES.items()]
PATTERNS.append(("pet", re.compile(town.RETRACTION.format(name=NAME))))

# Which share of the demonstrations each workflow has, as long as the operations that it needs are switched on.
WORKFLOWS = {
    "full": 0.4,  # Reads the asked person's name first; Updates and Deletes the entries that this brings into view
    "append": 0.2,  # never Reads while reading: old and new facts stand side by side
    "lazy": 0.4,  # like append, and stores nothing about people whom no question names
}  # and "notes", everything in the scratchpad, rewritten at each chunk (MemAgent's workflow), where there is no store


def facts_in(text):
    """[(kind, name, value)] of the town's sentences in `text`; value is None for a retraction, "" for an event."""
    found = []
    for part in text.split("."):
        for kind, pattern in PATTERNS:
            if match := pattern.fullmatch(part.strip()):
                value = match.groupdict().get("value", "" if kind == "market" else None)
                found.append((kind, match["name"], value))
    return found


class Demonstrator:
    """A scripted policy. `read` and `answer` write the response to one observation."""

    def __init__(self, config):
        self.config = config

    def respond(self, observations):
        return [Response(self.read(o) if o.question is None else self.answer(o)) for o in observations]

    def write(self, kind, text):
        """The operation as text, in the words of the configured dialect."""
        if self.config.dialect == "released":
            text = {"answer": f"\\boxed{{{text}}}", "update": f"Memory {text}", "delete": f"Memory {text}"}.get(kind, text)
        tag = TAGS[self.config.dialect][kind]
        return f"<{tag}>{text}</{tag}>"


class TownDemonstrator(Demonstrator):
    """Plays one workflow, from the observation alone. With probability `noise` it overlooks a sentence."""

    def __init__(self, workflow, config, noise=0.02):
        super().__init__(config)
        self.workflow, self.noise, self.rng = workflow, noise, random.Random(f"{workflow} {config.seed}")

    def read(self, o):
        asked = " ".join(o.questions)
        person = re.search(NAME, asked)[0]
        if self.workflow == "full" and not o.query:
            return self.write("read", person)
        news, visits = {}, 0  # of two sentences about the same thing in one chunk, the later one counts
        for kind, name, value in facts_in(o.chunk):
            if self.rng.random() < self.noise:
                continue
            if kind == "market":
                visits += name == person
            elif name == person or ("boss" in asked and kind != "boss" and self.workflow != "lazy"):
                news[kind, name] = value  # whoever turns out to be the boss, these facts may be asked for
        if self.workflow == "notes":
            return self.rewrite_notes(o, asked, news, visits)
        operations = [self.record(o, kind, name, value) for (kind, name), value in news.items()]
        if visits and "market" in asked:
            if self.config.enabled("scratchpad"):
                operations.append(self.write("scratchpad", int(o.scratchpad or 0) + visits))
            else:
                operations += [self.write("create", sentence("market", person, ""))] * visits
        return "".join(operations)

    def record(self, o, kind, name, value):
        """The operations that bring one fact into the store."""
        shown = {fact[:2]: number for number, entry in enumerate(o.entries, 1) for fact in facts_in(entry.text)}
        number, text = shown.get((kind, name)), sentence(kind, name, value)
        if self.workflow != "full":
            return self.write("create", text)
        if number and value is None and self.config.enabled("delete"):
            return self.write("delete", number)
        if number and self.config.enabled("update"):
            return self.write("update", f"{number}: {text}")
        if number and self.config.enabled("delete"):
            return self.write("delete", number) + self.write("create", text)
        return self.write("create", text) if value is not None else ""

    def rewrite_notes(self, o, asked, news, visits):
        """The scratchpad with the news worked in: what is asked of the person, and of the boss once that is known."""
        person, notes = re.search(NAME, asked)[0], {fact[:2]: fact[2] for fact in facts_in(o.scratchpad)}
        count = re.search(r"market (\d+)", o.scratchpad)
        count = int(count[1] if count else 0) + (visits if "market" in asked else 0)
        news = {**notes, **news}
        boss = news.get(("boss", person))
        kept = {key: value for key, value in news.items() if value is not None and key[1] in (person, boss)}
        text = ". ".join([sentence(*key, value) for key, value in kept.items()][:3] + [f"market {count}"] * (count > 0))
        return self.write("scratchpad", text) if text != o.scratchpad.replace(" .", ".") else ""

    def answer(self, o):
        person = re.search(NAME, o.question)[0]
        kind = next(kind for kind, text in town.QUESTIONS.items() if text.format(name=person) == o.question)
        facts = [fact for text in [o.scratchpad, *(entry.text for entry in o.entries)] for fact in facts_in(text)]
        if kind == "market" and self.config.enabled("scratchpad"):
            return self.write("answer", re.sub(r".*\D", "", o.scratchpad) or "0")
        if kind == "market":
            return self.look_up(o, "market", person, [str(facts.count(("market", person, "")))] if "market" in o.query else [])
        *hop, kind = kind.split()
        if hop:
            bosses = [value for k, name, value in facts if (k, name) == ("boss", person)]
            second = [name for name in town.NAMES if o.query == query_for(kind, name) and name != person]
            if not bosses and not second:
                return self.look_up(o, "boss", person, [])
            person = second[0] if second else self.rng.choice(bosses)
        return self.look_up(o, kind, person, [value for k, name, value in facts if (k, name) == (kind, person)])

    def look_up(self, o, kind, name, values):
        """Answer with one of `values`; if there is none, Read for it once, then give in."""
        if not values and self.config.enabled("read") and o.query != query_for(kind, name):
            return self.write("read", query_for(kind, name))
        return self.write("answer", (values and self.rng.choice(values)) or "none")


def query_for(kind, name):
    """The words that the sentences of one kind about one person share, without the fillers: 'Anna lives'."""
    return " ".join(sentence(kind, name, "").split()[:2])


# --- the demonstrator for QA files ---------------------------------------------------------------------------------


class GoldDemonstrator(Demonstrator):
    """Plays QA tasks with the help of the file's gold facts, so that no paid teacher is needed.

    Reading: it Creates an entry for each supporting sentence in the chunk. Answering: it Reads by the question's words, then
    by these and what they brought; it gives the gold answer if all the supporting sentences are in view, else none.
    """

    def __init__(self, tasks, config, count):
        super().__init__(config)
        self.questions, self.count = {question.text: question for task in tasks for question in task.questions}, count

    def read(self, o):
        response = ""
        for support in dict.fromkeys(fact for text in o.questions for fact in self.questions[text].support):
            operation = self.write("create", ": ".join(support))
            if support[1] in o.chunk and self.fits(response + operation):
                response += operation
        return response

    def answer(self, o):
        question = self.questions[o.question]
        shown = {entry.text for entry in o.entries}
        found = [": ".join(support) for support in question.support if ": ".join(support) in shown]
        if len(found) == len(question.support):
            return self.write("answer", question.answers[0])
        query = " ".join([question.text, *found])
        return self.write("read", query) if query != o.query and self.fits(self.write("read", query)) else ""

    def fits(self, response):
        return self.count(response, written=True) < self.config.max_response_tokens  # below the limit: the end token comes on top


# --- from demonstrations to rows -----------------------------------------------------------------------------------


def workflow_shares(config):
    """{workflow: share} of the demonstrations. Where the full one is impossible, the best of the others plays them all."""
    if not config.enabled("create"):
        return {"notes": 1.0}
    if not config.enabled("read") or not (config.enabled("update") or config.enabled("delete")):
        return {"append": 1.0}
    return WORKFLOWS


def demonstrate(tasks, config, embed, count, quiet=False):
    """Demonstrated episodes of `tasks`, unfiltered; which workflow plays a task of the town is drawn from the shares.

    quiet: without a progress bar.
    """
    if config.task != "town":
        groups = [(GoldDemonstrator(tasks, config, count), tasks)]
    else:
        shares, rng = workflow_shares(config), random.Random(config.seed)
        drawn = rng.choices(list(shares), list(shares.values()), k=len(tasks))
        groups = [(TownDemonstrator(name, config), [task for task, one in zip(tasks, drawn) if one == name]) for name in shares]
    episodes = []
    with tqdm(total=len(tasks), desc="demonstrations", disable=quiet or None, unit="episode") as bar:
        for demonstrator, tasks in groups:
            for start in range(0, len(tasks), 500):
                episodes += run_episodes(tasks[start : start + 500], demonstrator, config, embed, scorer(config))
                bar.update(len(tasks[start : start + 500]))
    return episodes


def lessons(config, stream):
    """[(share of the steps, tasks)]: in the town, stories without two-hop questions come first.

    In those every sentence about somebody else is to be passed over, so they teach the comparison of names, on which
    all else rests, several times as fast as the full mixture does.
    """
    if config.task != "town" or not config.easy_share:
        return [(1.0, [stream(index) for index in range(config.demonstrations)])]
    easy = math.ceil(config.easy_share * config.demonstrations)
    return [(config.easy_share, [stream(index, hops=False) for index in range(easy)]),
            (1 - config.easy_share, [stream(index) for index in range(easy, config.demonstrations)])]


def batches(taught, config):
    """The batch of rows of each step. taught: [(share of the steps, rows)]; each lesson's rows come in passes, shuffled."""
    rng, step = random.Random(config.seed), 0
    for number, (share, rows) in enumerate(taught, start=1):
        until = config.sft_steps if number == len(taught) else step + round(share * config.sft_steps)
        order = []
        for step in range(step, until):
            while len(order) < config.sft_batch:
                order += rng.sample(rows, len(rows))
            yield order[: config.sft_batch]
            order = order[config.sft_batch :]
        step = until


def rows_of(episodes, policy):
    """(prompt ids, response ids) of every turn, with the end token that tells the policy to stop."""
    turns = [turn for episode in episodes for turn in episode.turns]
    rows = []
    for start in range(0, len(turns), 1000):
        part = turns[start : start + 1000]
        texts = policy.tokenizer([turn.response.text for turn in part], add_special_tokens=False)["input_ids"]
        prompts = policy.encode([turn.observation for turn in part])
        rows += [(prompt, text + [policy.tokenizer.eos_token_id]) for prompt, text in zip(prompts, texts)]
    return rows


# --- the trainer ---------------------------------------------------------------------------------------------------


def main():
    config, extra = parse_args("Supervised fine-tuning on demonstrations.", extra=[RESUME])
    run = Run(config, "sft", extra["resume"])
    accelerator = run.accelerator
    policy = open_policy(str(run.checkpoint or config.model), config)
    embed = load_embedder(config.embedder, accelerator.device)
    stream, dev, taught = load_tasks(config, "train", policy.count), load_tasks(config, "dev", policy.count), []
    held_out = [dev(index) for index in range(min(100, config.eval_tasks))]
    check_prompts(policy, held_out, config)
    for share, tasks in lessons(config, stream):
        episodes = demonstrate(tasks, config, embed, policy.count, quiet=not accelerator.is_main_process)
        kept = [episode for episode in episodes if episode.reward >= config.keep_score]
        if not kept:
            raise BadInput(f"no demonstration reached --keep_score {config.keep_score}: nothing to learn from")
        taught.append((share, rows_of(kept, policy)))
        accelerator.print(f"{len(episodes)} demonstrations, mean score {summarize(tally(episodes))['reward']:.3f}; "
                          f"{len(kept)} kept, which make {len(taught[-1][1])} rows")

    wrapped = parallel.distribute(accelerator, policy)
    optimizers = make_optimizers(policy, config.sft_lr, config.optimizer)
    run.begin(policy, optimizers)
    for step, batch in zip(run.steps(config.sft_steps), itertools.islice(batches(taught, config), run.step, None)):
        started = time.perf_counter()
        factor = schedule(step, config.sft_steps, warmup=config.sft_steps // 10, decay=0.6)
        scale_lr(optimizers, factor)
        tokens, sums = sum(len(response) for _, response in batch), {"loss": 0.0, "sure": 0}
        for rows in parallel.shared_batches(accelerator, wrapped, parallel.share(accelerator, batch), config):
            logprobs, _ = wrapped(rows)  # (N,)
            (-logprobs.sum() * accelerator.num_processes / tokens).backward()
            sums["loss"] -= logprobs.sum().item()
            sums["sure"] += (logprobs > math.log(0.5)).sum().item()
        norm = clip_and_step(wrapped, optimizers, config.max_grad_norm)
        sums = parallel.total(accelerator, sums)
        bad_steps = count_bad_steps(run.metrics.get("bad_steps", 0), [norm])
        seconds, trained_on = time.perf_counter() - started, sum(len(prompt) + len(response) for prompt, response in batch)
        metrics = {"loss": sums["loss"] / tokens, "sure": sums["sure"] / tokens, "lr": factor * config.sft_lr, "grad_norm": norm,
                   "bad_steps": bad_steps, "seconds": seconds, "tokens_per_second": trained_on / seconds}
        if step == config.sft_steps:
            player = parallel.rollout_policy(accelerator, policy)
            metrics["held_out_em"] = parallel.held_out_em(accelerator, player, held_out, config, embed)
        run.log(metrics)
    run.finish(config.sft_steps, f"python grpo.py --name {config.name}")


if __name__ == "__main__":
    main()
