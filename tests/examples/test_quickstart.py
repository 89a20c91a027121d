"""The quickstart in its tiny form: every phase runs and hands on to the next; and its task is what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.dataset import LogitDataset
from shared.verification import verify

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
sys.path.insert(0, str(QUICKSTART))

import task  # noqa: E402


@pytest.mark.cluster
def test_the_tiny_quickstart_runs_from_corpus_to_table(tmp_path: Path):
    output = tmp_path / "quickstart"
    done = subprocess.run(
        [sys.executable, QUICKSTART / "run.py", "--tiny", "--output", output],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # beside other tests more threads than cores are slower than one
    )
    assert done.returncode == 0, done.stderr
    assert "| student, SFT + KD |" in done.stdout
    result = json.loads((output / "result.json").read_text())
    assert set(result["table"]) == {"teacher", "sft", "kd"}
    assert result["table"]["teacher"]["kl"] == pytest.approx(0, abs=1e-4), "the teacher is its own teacher"
    assert result["table"]["kd"]["kl"] < result["table"]["sft"]["kl"]
    assert verify(LogitDataset.open(output / "dumps/student_train"), deep=True).faults == []
    assert (output / "curves.png").stat().st_size > 10_000
    logs = {arm: (output / arm / "log.jsonl").read_text().splitlines() for arm in ("sft", "kd")}
    steps = {arm: [json.loads(line) for line in lines] for arm, lines in logs.items()}
    trained = {arm: [e["positions"] for e in entries if "loss" in e] for arm, entries in steps.items()}
    assert trained["sft"] == trained["kd"], "both arms saw the same rows in the same order"


def test_no_problem_is_in_two_splits():
    splits = task.make_problems({"teacher_train": 500, "student_train": 300, "dev": 100, "test": 100}, seed=3)
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert len(questions) == len(set(questions)) == 1000


def test_dev_and_test_replies_are_right_and_checkable():
    problems = task.make_problems({"dev": 200}, seed=1)["dev"]
    for record in task.make_records("dev", problems, seed=1):
        assert task.is_correct(record["messages"][1]["content"], record["answer"])


def test_a_corpus_is_a_function_of_its_seed(tmp_path: Path):
    sizes = {"student_train": 20, "dev": 5}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        task.write_corpus(tmp_path / name, seed, sizes)
    read = {name: (tmp_path / name / "student_train.jsonl").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("12", "12"),
        ("<think>3+4=7</think>7", "7"),
        ("<think>3+4=7", None),
        ("<think>3+4=7</think>", None),
        ("seven", None),
        ("7 8", None),
    ],
)
def test_an_answer_is_the_number_behind_the_thought(reply: str, answer: str | None):
    assert task.extract_answer(reply) == answer
