"""The quickstart in its tiny form: every phase runs and hands on to the next; and its task is what it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shared.dataset import LogitDataset
from shared.verification import verify

QUICKSTART = Path(__file__).parents[2] / "examples/quickstart"
sys.path[:0] = [str(QUICKSTART), str(QUICKSTART.parent)]

import pictures  # noqa: E402
import task  # noqa: E402


@pytest.mark.cluster
def test_the_tiny_quickstart_runs_from_corpus_to_table_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    row = LogitDataset.open(output / "dumps/student_train").read_shard(0)[1]
    monkeypatch.setattr(pictures, "ROW", 1)
    monkeypatch.setattr(pictures, "SLIP", int(row.source_index_P[row.teacher.realised_logp_P.argmin()]) + 1)
    drawn = tmp_path / "pictures"
    drawn.mkdir()
    pictures.terminal_pictures(output, drawn)
    assert row.sample_id in (drawn / "inspect_dataset.svg").read_text()
    assert "ten" in (drawn / "inspect.svg").read_text(), "they have ten legs"
    addresses = pictures.pages(output, drawn)
    assert set(addresses) == {"inspect_page.png", "report.png"}
    if browser := next(filter(None, map(shutil.which, pictures.BROWSERS)), None):
        for name, (address, window) in addresses.items():
            pictures.photograph(browser, address, drawn / name, window)
            assert (drawn / name).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(pictures, "SLIP", 10_000)
    with pytest.raises(click.ClickException, match="another corpus"):
        pictures.pages(output, drawn)


def test_pictures_need_a_quickstart_and_say_so(tmp_path: Path):
    result = CliRunner().invoke(pictures.main, ["--quickstart", str(tmp_path), "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "make quickstart, then make pictures" in result.output


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
