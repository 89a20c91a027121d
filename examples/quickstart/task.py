"""Arithmetic word problems in two manners: the small world in which the quickstart distils a teacher.

Every problem is a story in two steps ("Mia has 11 coins. She finds 4. Tom takes 6. How many now?"), so a reply can
be checked.  It is asked twice:

* in the *reasoning* manner ("Think: ...") the assistant writes its steps inside <think>...</think>, then the answer;
* in the *fast* manner ("Quick: ...") it gives the answer alone, at once.

The training corpora are like real ones in two ways.  Wordings vary: a record shows one of several good ones.  And
their writers slip: in one record of five a step is off by one, and what follows is wrong with it.  A teacher that has
read a large corpus has learnt how the wordings are spread, and that the right number is likely and its neighbours are
not.  A student with a few problems sees one wording and one number for each, right or wrong, and can only learn them
by heart: what the teacher adds is the rest of the distribution.  `dev` and `test` have no slips.

No problem is in two splits (`make_problems` sees to it).  In particular the teacher has not read the student's
problems: what it says of them is what it believes of a fresh problem, not what it remembers.

    python task.py FOLDER [SEED]    writes FOLDER/teacher_train.jsonl, student_train.jsonl, dev.jsonl and test.jsonl
"""

import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAST, REASONING = "fast", "reasoning"
MANNERS = (FAST, REASONING)
REQUEST = {FAST: "Quick:", REASONING: "Think:"}

# Problems, not records: each problem makes one record for each manner.
SIZES = {"teacher_train": 20_000, "student_train": 1_000, "dev": 250, "test": 1_000}
TINY_SIZES = {"teacher_train": 600, "student_train": 100, "dev": 20, "test": 40}
SLIP_RATE = 0.2
WITH_SLIPS = ("teacher_train", "student_train")

PEOPLE = {
    "She": ("Mia", "Anna", "Lena", "Ruth", "Emma", "Zoe"),
    "He": ("Tom", "Ben", "Omar", "Paul", "Ivan", "Max"),
}
THINGS = ("apples", "books", "coins", "cards", "stamps", "pens", "shells", "eggs", "stones", "stickers")
OPENINGS = ("{name} has {n} {things}.", "{name} owns {n} {things}.", "{name} starts with {n} {things}.")
GAINS = ("{who} buys {n}.", "{who} finds {n}.", "{who} gets {n} more.", "{friend} brings {n}.")
LOSSES = ("{who} loses {n}.", "{who} sells {n}.", "{who} gives {n} away.", "{friend} takes {n}.")
QUESTIONS = ("How many now?", "How many {things} now?", "How many are left?", "What is left?")
THOUGHTS = (
    "{first}, {second}",
    "first {first}, then {second}",
    "{name} has {first}, so {second}",
    "{first} {things}, then {second} {things}",
)


@dataclass(frozen=True)
class Problem:
    """A story, the numbers in it (a loss is a negative change) and the words that a solution may use."""

    question: str
    start: int
    changes: tuple[int, int]
    words: Mapping[str, str]

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


def draw_problem(rng: random.Random) -> Problem:
    """One story: a start, two events, a question.  No number in it falls below zero."""
    who = rng.choice(tuple(PEOPLE))
    name = rng.choice(PEOPLE[who])
    friend = rng.choice([other for group in PEOPLE.values() for other in group if other != name])
    words = {"who": who, "name": name, "friend": friend, "things": rng.choice(THINGS)}
    start = rng.randint(2, 9)
    first = draw_change(rng, start)
    second = draw_change(rng, start + first)
    sentences = [
        rng.choice(OPENINGS).format(n=start, **words),
        *(rng.choice(GAINS if change > 0 else LOSSES).format(n=abs(change), **words) for change in (first, second)),
        rng.choice(QUESTIONS).format(**words),
    ]
    return Problem(" ".join(sentences), start, (first, second), words)


def draw_change(rng: random.Random, held: int) -> int:
    size = rng.randint(1, 5)
    return rng.choice((-size, size)) if size <= held else size


def solve(problem: Problem, rng: random.Random, slip_rate: float) -> tuple[str, int]:
    """One writer's steps and result.  A slip puts one of the two steps off by one."""
    off = [0, 0]
    if rng.random() < slip_rate:
        off[rng.randrange(2)] = rng.choice((-1, 1))
    steps, held = [], problem.start
    for change, error in zip(problem.changes, off, strict=True):
        result = max(0, held + change + error)
        steps.append(f"{held}{change:+d}={result}")
        held = result
    thought = rng.choice(THOUGHTS).format(first=steps[0], second=steps[1], **problem.words)
    return thought, held


def make_problems(sizes: Mapping[str, int], seed: int) -> dict[str, list[Problem]]:
    """The problems of every split.  A question that has been drawn before, for whichever split, is drawn again."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[Problem]] = {split: [] for split in sizes}
    for split, problems in splits.items():
        while len(problems) < sizes[split]:
            problem = draw_problem(rng)
            if problem.question not in seen:
                seen.add(problem.question)
                problems.append(problem)
    return splits


def make_records(
    split: str, problems: list[Problem], seed: int, slip_rate: float = SLIP_RATE
) -> Iterator[dict[str, Any]]:
    """Each problem in both manners, as chat messages.  `answer` is the right one, whatever the writer wrote."""
    rng = random.Random(f"{seed}/{split}")
    for number, problem in enumerate(problems):
        for manner in MANNERS:
            thought, result = solve(problem, rng, slip_rate if split in WITH_SLIPS else 0.0)
            reply = str(result) if manner == FAST else f"<think>{thought}</think>{result}"
            yield {
                "id": f"{split}-{number:05d}-{manner}",
                "manner": manner,
                "answer": str(problem.answer),
                "messages": [
                    {"role": "user", "content": f"{REQUEST[manner]} {problem.question}"},
                    {"role": "assistant", "content": reply},
                ],
            }


def extract_answer(reply: str) -> str | None:
    """The number that a reply gives; None where thinking does not end or what follows it is no number."""
    thought, closed, rest = reply.rpartition("</think>")
    if not closed and "<think>" in reply:
        return None
    found = re.fullmatch(r"\s*(\d+)\s*", rest if closed else thought + rest)
    return found[1] if found else None


def is_correct(reply: str, answer: str) -> bool:
    return extract_answer(reply) == answer


def write_corpus(
    folder: Path, seed: int = 0, sizes: Mapping[str, int] = SIZES, slip_rate: float = SLIP_RATE
) -> dict[str, Path]:
    """One .jsonl file for each split, in `folder`; the same seed and sizes give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"{split}.jsonl" for split in sizes}
    for split, problems in make_problems(sizes, seed).items():
        lines = (json.dumps(record) + "\n" for record in make_records(split, problems, seed, slip_rate))
        paths[split].write_text("".join(lines), encoding="utf-8")
    return paths


if __name__ == "__main__":
    corpus_folder, *seeds = sys.argv[1:]
    for written in write_corpus(Path(corpus_folder), seed=int(seeds[0]) if seeds else 0).values():
        print(written)
