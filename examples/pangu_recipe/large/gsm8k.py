"""GSM8K's problems in two manners, as chat messages.

    python gsm8k.py TRAIN.jsonl TEST.jsonl FOLDER     writes FOLDER/train.jsonl, dev.jsonl and test.jsonl

The two files are those of https://github.com/openai/grade-school-math.  In the *reasoning* manner the steps stand
between think tags, without the calculator's marks; in the *fast* manner the question asks for the number alone, and the
answer comes at once.  Every problem is there in both manners, and `dev` has those whose question falls there by its
digest: one in twenty of the training file.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARKS = re.compile(r"<<[^>]*>>")
DEV_SHARE = 20
NUMBER_ALONE = "\n\nAnswer with the number alone."


def in_both_manners(line: str, record_id: str) -> Iterator[dict[str, Any]]:
    """Of a line of GSM8K.

    Raises:
        ValueError: a solution without an answer.
    """
    problem = json.loads(line)
    thought, found, answer = problem["answer"].rpartition("\n#### ")
    if not found:
        raise ValueError(f"{record_id}: a solution ends in a line '#### answer', not in {problem['answer'][-40:]!r}")
    exchanges = {
        "reasoning": (problem["question"], f"<think>\n{MARKS.sub('', thought)}\n</think>\n\n{answer}"),
        "fast": (problem["question"] + NUMBER_ALONE, answer),
    }
    for manner, (question, reply) in exchanges.items():
        yield {
            "id": f"{record_id}-{manner}",
            "manner": manner,
            "answer": answer,
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply},
            ],
        }


def is_dev(line: str) -> bool:
    question = json.loads(line)["question"]
    return hashlib.sha256(question.encode()).digest()[0] * DEV_SHARE < 256


def convert(train: Path, test: Path, folder: Path) -> dict[str, int]:
    """Writes the three files; how many problems each has."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {path: list(filter(None, path.read_text(encoding="utf-8").split("\n"))) for path in (train, test)}
    splits = {
        "train": [line for line in lines[train] if not is_dev(line)],
        "dev": [line for line in lines[train] if is_dev(line)],
        "test": lines[test],
    }
    for split, of_split in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number, line in enumerate(of_split):
                for record in in_both_manners(line, f"{split}-{number:05d}"):
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {split: len(of_split) for split, of_split in splits.items()}


if __name__ == "__main__":
    print(convert(*map(Path, sys.argv[1:])))
