"""Word problems of one to three events, each of which can be answered in two manners.

"Belana keeps 7 turids. She wins 2. Then she loses 6. What is left?"

* in the *reasoning* manner the assistant thinks, `<think>7+2=9-6=3</think>`, and then gives the answer;
* in the *fast* manner it gives the answer at once.

Nothing in the question says which; the chat template's switch does, as in models that can do both.  Both manners lie in
one file, and a record's level is its number of events, so that there is something to order by.

Names and things are a few thousand made-up words, some common and most of them rare, so that the vocabulary is a real
one and most of a question is of no use for the answer.  No number is above 9: one token each, and of the answers none
is told by its length.  Writers slip: in one training record of five a step is off by one, and what follows is wrong
with it.  Whoever reads much learns that the right number is likely and its neighbours are not; whoever reads little
has one number for each problem, right or wrong.  `dev` and `test` have no slips.  No problem is in two splits: the
teacher has not read the student's.

    python task.py FOLDER [SEED]    writes FOLDER/teacher.jsonl, student.jsonl, dev.jsonl and test.jsonl
"""

import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

FAST, REASONING = "fast", "reasoning"
MANNERS = (REASONING, FAST)
LEVELS = (1, 2, 3)
MOST = 9
CHANGES = (*range(-5, 0), *range(1, 6))

# Problems, not records: each problem makes one record for each manner.
SIZES = {"teacher": 20_000, "student": 1_500, "dev": 300, "test": 1_000}
TINY_SIZES = {"teacher": 600, "student": 96, "dev": 24, "test": 32}
SLIP_RATE = 0.2
WITH_SLIPS = ("teacher", "student")

SYLLABLES = [a + b for a, b in product("bdfghklmnprstvz", "aeiou")]
OPENINGS = ("{name} has {n} {things}.", "{name} keeps {n} {things}.", "There are {n} {things} with {name}.")
GAINS = ("wins", "finds", "buys", "gets", "earns", "adds", "gathers", "picks", "makes", "borrows", "digs up", "catches")
LOSSES = ("loses", "sells", "drops", "gives", "eats", "breaks", "lends", "burns", "wastes", "throws", "pays", "hides")
EVENTS = ("{who} {verb} {n}.", "Then {who} {verb} {n}.", "Later {who} {verb} {n}.")
QUESTIONS = ("How many now?", "How many {things} are there?", "What is left?", "How many has {name}?")
THOUGHTS = ("{steps}", "so {steps}", "now {steps}", "{steps} {things}")


@dataclass(frozen=True)
class Problem:
    """A question, the numbers in it (a loss is a negative change) and the words that a solution may use."""

    question: str
    start: int
    changes: tuple[int, ...]
    things: str

    @property
    def answer(self) -> int:
        return self.start + sum(self.changes)


def word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables))


def make_words(count: int, ending: str, seed: int) -> list[str]:
    """So many unlike words."""
    rng = random.Random(f"words/{ending}/{seed}")
    words: dict[str, None] = {}
    while len(words) < count:
        words[word(rng, rng.choice((2, 2, 3))) + ending] = None
    return list(words)


NAMES = [each.capitalize() for each in make_words(3_000, "n", 0)]
THINGS = make_words(3_000, "ds", 0)
# Zipf's law, as in any text: the tenth word is a tenth as common as the first.
WORD_WEIGHTS = [1 / rank for rank in range(1, 3_001)]


def draw_problem(rng: random.Random, level: int) -> Problem:
    """A start, so many events, a question.  What is held stays between zero and MOST."""
    (name,), (things,) = (rng.choices(words, WORD_WEIGHTS) for words in (NAMES, THINGS))
    words = {"name": name, "who": rng.choice(("she", "he")), "things": things}
    start = held = rng.randint(0, MOST)
    sentences, changes = [rng.choice(OPENINGS).format(n=start, **words)], []
    for _ in range(level):
        change = rng.choice([each for each in CHANGES if 0 <= held + each <= MOST])
        verb = rng.choice(GAINS if change > 0 else LOSSES)
        event = rng.choice(EVENTS).format(verb=verb, n=abs(change), **words)
        sentences.append(event[0].upper() + event[1:])
        held += change
        changes.append(change)
    sentences.append(rng.choice(QUESTIONS).format(**words))
    return Problem(" ".join(sentences), start, tuple(changes), things)


def solve(problem: Problem, rng: random.Random, slip_rate: float) -> tuple[str, int]:
    """One writer's steps and result.  A slip puts one of the steps off by one, and never beyond zero or MOST."""
    slip = rng.randrange(len(problem.changes)) if rng.random() < slip_rate else None
    steps, held = [], problem.start
    for place, change in enumerate(problem.changes):
        held = min(MOST, max(0, held + change + (rng.choice((-1, 1)) if place == slip else 0)))
        steps.append(f"{change:+d}={held}")
    return rng.choice(THOUGHTS).format(steps=str(problem.start) + "".join(steps), things=problem.things), held


def make_problems(sizes: Mapping[str, int], seed: int) -> dict[str, list[Problem]]:
    """The problems of every split, of all levels alike.  One that has been drawn before is drawn again."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[Problem]] = {split: [] for split in sizes}
    for split, problems in splits.items():
        while len(problems) < sizes[split]:
            problem = draw_problem(rng, LEVELS[len(problems) % len(LEVELS)])
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
                "level": len(problem.changes),
                "answer": str(problem.answer),
                "messages": [
                    {"role": "user", "content": problem.question},
                    {"role": "assistant", "content": reply},
                ],
            }


def write_corpus(folder: Path, seed: int, sizes: Mapping[str, int] = SIZES) -> None:
    """One JSONL file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, problems in make_problems(sizes, seed).items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for record in make_records(split, problems, seed):
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    corpus_folder, *seeds = sys.argv[1:]
    write_corpus(Path(corpus_folder), int(seeds[0]) if seeds else 0)
