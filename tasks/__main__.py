"""Builds the test tasks of a QA file and saves them as a set.

    python -m tasks --preset qa --task hotpotqa --data hotpot_dev.json --documents 800 \
        --eval_tasks 500 --out hotpot800.jsonl
    python evaluate.py --name NAME --task saved --data hotpot800.jsonl

They are the tasks that evaluate.py builds from the original file with the same settings.
"""

import json
import os
from collections.abc import Iterable

from config import BUILT, check_new_file, need, parse_args
from tasks import Task
from tasks.qa import QATasks


def save_tasks(tasks: Iterable[Task], path: str):
    """Write tasks as a saved set. Chunks are not saved: they are cut when the set is read."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        for task in tasks:
            questions = [
                {"question": one.text, "answers": one.answers, "support": one.support}
                for one in task.questions
            ]
            row = {"id": task.id, "questions": questions, "documents": task.documents}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(f"{path}.part", path)


def main():
    out = ("--out", dict(required=True, metavar="FILE", help="the JSONL file to write"))
    config, args = parse_args("Build the test tasks of a QA file, and save them.", extra=[out])
    check_new_file("--out", args.out, config.overwrite)
    need(config.task in BUILT, f"--task has to be that of a QA file: {', '.join(BUILT)}")
    build, number = QATasks(config, "test"), config.eval_tasks
    save_tasks(map(build, range(number)), args.out)
    print(f"{number} tasks of {config.documents} documents, saved as {args.out}; next:")
    print(f"python evaluate.py --name NAME --task saved --data {args.out} --eval_tasks {number}")


if __name__ == "__main__":
    main()
