"""The world of the recipe's example: its problems can be checked, its writers slip, its switch and its sizes hold."""

import json
import re
import sys
from collections import Counter
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLE = Path(__file__).parents[2] / "examples/pangu_recipe"
SIZES = {"teacher": 18_000, "student": 402, "dev": 60, "test": 60}


def module(name: str) -> ModuleType:
    """One of the example's, by a name of its own: the quickstart has modules of the same names."""
    spec = util.spec_from_file_location(f"pangu_{name}", EXAMPLE / f"{name}.py")
    assert spec
    assert spec.loader
    found = util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


task, models = module("task"), module("models")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that is large enough for a whole vocabulary, and the models made from it."""
    folder = tmp_path_factory.mktemp("world")
    task.write_corpus(folder / "corpus", 5, SIZES)
    models.write_models(folder / "corpus", folder / "models", 5)
    return folder


def records(world: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / f"corpus/{split}.jsonl").read_text().splitlines()]


def question(record: dict[str, Any]) -> str:
    return record["messages"][0]["content"]


def reply(record: dict[str, Any]) -> str:
    return record["messages"][1]["content"]


def answer_in(question_: str) -> int:
    """The right answer, from the words of a question alone."""
    held = int(re.findall(r"\d", question_)[0])
    for verb, number in re.findall(rf"({'|'.join(task.GAINS + task.LOSSES)}) (\d)", question_):
        held += int(number) if verb in task.GAINS else -int(number)
    return held


def test_a_problem_is_in_one_split_and_there_in_both_manners_and_all_levels(world: Path):
    seen: Counter[str] = Counter()
    ids: Counter[str] = Counter()
    for split, size in SIZES.items():
        found = records(world, split)
        ids.update(record["id"] for record in found)
        questions = {question(record) for record in found}
        assert len(found) == 2 * len(questions) == 2 * size
        assert {(question(r), r["manner"]) for r in found} == {(q, m) for q in questions for m in task.MANNERS}
        assert Counter(r["level"] for r in found) == dict.fromkeys(task.LEVELS, 2 * size // len(task.LEVELS))
        seen.update(questions)
    assert set(seen.values()) == set(ids.values()) == {1}


def test_answers_are_what_the_words_of_the_question_say(world: Path):
    for split in SIZES:
        for record in records(world, split):
            assert int(record["answer"]) == answer_in(question(record)), question(record)
            assert 0 <= int(record["answer"]) <= task.MOST


def test_writers_slip_in_training_alone_and_conclude_what_they_thought(world: Path):
    slips: dict[str, float] = {}
    for split in SIZES:
        found = records(world, split)
        written = [int(re.findall(r"\d", reply(record))[-1]) for record in found]
        slips[split] = sum(wrote != int(r["answer"]) for wrote, r in zip(written, found, strict=True)) / len(found)
        for record in found:
            if record["manner"] == task.REASONING:
                first, *steps = re.findall(r"\d", reply(record).partition("</think>")[0])
                assert first == re.findall(r"\d", question(record))[0]
                assert len(steps) == 2 * record["level"]
                assert reply(record).endswith(f"</think>{steps[-1]}")
    assert slips["dev"] == slips["test"] == 0
    assert all(task.SLIP_RATE / 2 < slips[split] <= task.SLIP_RATE * 1.2 for split in task.WITH_SLIPS)


def test_the_prompt_is_the_beginning_of_the_whole_to_the_letter(world: Path):
    tokenizer = AutoTokenizer.from_pretrained(world / "models/student")
    prompts: dict[str, set[str]] = {}
    for record in records(world, "dev"):
        is_slow = record["manner"] == task.REASONING
        whole = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(
            record["messages"][:1], tokenize=False, add_generation_prompt=True, enable_thinking=is_slow
        )
        assert whole == f"{prompt}{reply(record)}<|im_end|>\n"
        assert tokenizer(prompt).input_ids == tokenizer(whole).input_ids[: len(tokenizer(prompt).input_ids)]
        assert prompt.endswith("<think></think>") != is_slow
        prompts.setdefault(question(record), set()).add(prompt)
    assert all(len(each) == 2 for each in prompts.values())


def test_the_vocabulary_is_whole_and_used_and_rows_are_short(world: Path):
    tokenizer = AutoTokenizer.from_pretrained(world / "models/teacher")
    assert len(tokenizer) == 8192
    ids = tokenizer([question(record) for record in records(world, "teacher")]).input_ids
    assert len({each for row in ids for each in row}) > 4_000
    rows = [tokenizer.apply_chat_template(record["messages"], return_dict=False) for record in records(world, "test")]
    assert max(map(len, rows)) <= 100
    assert [tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) for text in ("7", "</think>")] == [
        ["7"], ["</think>"],
    ]  # fmt: skip


def test_the_student_is_about_ten_times_smaller_than_the_teacher(world: Path):
    sizes = {
        name: AutoModelForCausalLM.from_pretrained(world / "models" / name).num_parameters()
        for name in ("teacher", "student")
    }
    assert 8 < sizes["teacher"] / sizes["student"] < 12


def test_a_world_is_a_function_of_its_seed(tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        task.write_corpus(tmp_path / name, seed, {"student": 20, "dev": 5})
    read = {name: (tmp_path / name / "student.jsonl").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
