"""Let a strong model play training tasks, and write its episodes to a file for sft.py.

    python -m tools.teach --preset qwen3 --model Qwen/Qwen3-32B --demonstrations taught.jsonl ...
    python sft.py --preset qwen3 --demonstrations taught.jsonl ...      both with --task and --data

With --endpoint URL the model runs on a server. If it is started again, the tool continues its file
(format: tasks/demonstrators.py). Episodes below --keep_score are written without their turns.
"""

import json
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from agent import Episode, Policy, observe, render, run_episodes, without_thoughts
from config import Config, check_new_file, need, parse_args
from evaluate import open_contestants
from memory import Embedder, load_embedder
from tasks import Stream, load_tasks
from tasks.demonstrators import RECORDED, read_file
from tasks.scoring import score_function


def record(teacher: Policy, stream: Stream, config: Config, embed: Embedder) -> list[float]:
    """Play the first config.sft_tasks tasks, except those already in config.demonstrations.

    Returns all scores in the file. Raises BadInput if it has other settings or another format.
    """
    path, lines = Path(config.demonstrations), []
    settings = {"teacher": config.model} | {name: getattr(config, name) for name in RECORDED}
    if path.exists():
        made_with, lines = read_file(path)
        different = [name for name in settings if made_with.get(name) != settings[name]]
        need(not different, f"{path} was made with another {', '.join(different)}: name a new file")
    else:
        path.write_text(json.dumps({"settings": settings}) + "\n")
    scores = {line["task"]: line["score"] for line in lines}
    score = score_function(config)
    block = config.in_flight if config.endpoint else config.sample_rows  # episodes side by side
    with open(path, "a", encoding="utf-8") as file:
        for start in tqdm(range(0, config.sft_tasks, block), unit="block", disable=None):
            indices = range(start, min(start + block, config.sft_tasks))
            # A dictionary, because a short file gives the same task again within a block.
            new = {task.id: task for task in map(stream, indices) if task.id not in scores}
            for episode in run_episodes(list(new.values()), teacher, config, embed, score):
                scores[episode.task.id] = episode.reward
                file.write(json.dumps(as_line(episode, config), ensure_ascii=False) + "\n")
            file.flush()
    return list(scores.values())


def as_line(episode: Episode, config: Config) -> dict:
    """The episode as a line of the file, without thoughts and responses that were cut off."""
    good = episode.reward >= config.keep_score
    kept = [turn for turn in episode.turns if good and not turn.response.truncated]
    pairs = [(render(one.observation), without_thoughts(one.response.text)) for one in kept]
    turns = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    return {"task": episode.task.id, "score": episode.reward, "turns": turns}


def main():
    config, args = parse_args("Write demonstrations of a strong model.")
    need(not args.start, "--from: a run cannot be the teacher: give its checkpoint to --model")
    need(config.model, "--model is missing: the model that plays, such as Qwen/Qwen3-32B")
    need(config.demonstrations, "--demonstrations FILE is missing: the file for the episodes")
    check_new_file("--demonstrations", config.demonstrations, overwrite=True)  # it is continued
    device = Accelerator(cpu=config.cpu).device
    [contestant] = open_contestants(config, [], device)
    teacher = contestant.model.with_config(config, config.temperature)
    stream = load_tasks(config, "train", teacher.count)
    # Raises BadInput, before long work, if a prompt cannot fit.
    teacher.shorten(observe(Episode(stream(0)), config))
    scores = record(teacher, stream, config, load_embedder(config.embedder, device))
    good = sum(score >= config.keep_score for score in scores)
    print(f"{config.demonstrations}: {good} of {len(scores)} episodes are good enough")


if __name__ == "__main__":
    main()
