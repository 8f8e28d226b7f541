"""A new task: where parcels were put. It writes 200 tasks to train on and 50 others to test on.

    python -m forks.shelves
    python sft.py --preset smollm2 --task saved --data shelves-train.jsonl --name shelves
    python grpo.py --name shelves
    python evaluate.py --name shelves --data shelves-test.jsonl

The `support` of a question lists (title, sentence) pairs that hold the answer. Only the scripted
demonstrator needs it. A teacher (tools/teach.py) does not.
"""

import json
import random
from pathlib import Path

from config import need


def make_task(rng: random.Random, id: str) -> dict:
    """A row of a saved set (tasks/formats.py): 40 parcels, one document each, 3 questions."""
    parcels = rng.sample(range(100, 1000), 40)
    shelves = {parcel: rng.randint(1, 99) for parcel in parcels}
    told = {one: f"Parcel {one} was put on shelf {shelf}." for one, shelf in shelves.items()}
    questions = [
        {
            "question": f"On which shelf is parcel {parcel}?",
            "answers": [str(shelves[parcel])],
            "support": [(f"Parcel {parcel}", told[parcel])],
        }
        for parcel in rng.sample(parcels, 3)
    ]
    documents = [f"Parcel {parcel}\n{told[parcel]}" for parcel in parcels]
    return {"id": id, "questions": questions, "documents": documents}


def main():
    for split, number in (("train", 200), ("test", 50)):
        path, rng = Path(f"shelves-{split}.jsonl"), random.Random(split)
        need(not path.exists(), f"{path} exists: delete it first, or go to another folder")
        lines = [json.dumps(make_task(rng, f"{split}-{index}")) for index in range(number)]
        path.write_text("\n".join(lines) + "\n")
        print(f"{number} tasks written to {path}")


if __name__ == "__main__":
    main()
