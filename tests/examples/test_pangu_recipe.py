"""The recipe's example in its tiny form: every part hands on to the next, stops and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.config import load_settings
from shared.dataset import LogitDataset
from student_train.config import TrainSettings
from student_train.eval.config import EvalSettings
from student_train.lineage import writer_of
from student_train.recipe import Recipe, load_runs
from student_train.rollout.config import RolloutSettings
from teacher_dump.config import DumpSettings
from tests.data import write_jsonl
from tests.student_train.test_train import log_of

EXAMPLE = Path(__file__).parents[2] / "examples/pangu_recipe"


@pytest.mark.parametrize("form", ["", "large"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("dump", DumpSettings), ("eval", EvalSettings), ("rollout", RolloutSettings), ("round", TrainSettings)],
)
def test_configs_can_be_read(form: str, name: str, kind: Any):
    load_settings(kind, EXAMPLE / form / f"{name}.yaml")


@pytest.mark.parametrize("name", ["teacher", "recipe", "alternation", "large/recipe"])
def test_ready_made_recipes_can_be_read(name: str):
    assert isinstance(load_runs(EXAMPLE / f"{name}.yaml"), Recipe)


def run(*arguments: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.cluster
def test_the_tiny_pipeline_runs_from_corpus_to_rollouts_and_its_rounds_go_on(tmp_path: Path):
    run("pipeline", "--tiny", "--output", tmp_path)
    world = tmp_path / "seed-0"
    (cell,) = (world / "cells").glob("one-round*")
    dataset = LogitDataset.open(world / f"dumps/{cell.name}-rollouts-1")
    written = [json.loads(line) for part in sorted(cell.glob("rollouts-1/data/*")) for line in part.open()]
    rows = [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]
    assert [row.input_ids_L.tolist() for row in rows] == [each["input_ids"] for each in written]
    assert {writer_of(row.source) for row in rows} == {written[0]["student"]}
    steps = [entry for entry in log_of(cell / "round-1/kd") if "loss" in entry]
    assert any("stale_steps" in entry for entry in steps)
    assert all(entry["stale_steps"] == entry["step"] - 1 for entry in steps if "stale_steps" in entry)
    before = {path: path.stat().st_mtime_ns for path in cell.rglob("*") if path.is_file()}
    again = run("pipeline", "--tiny", "--output", tmp_path)
    assert '"reasoning"' in again
    assert {path: path.stat().st_mtime_ns for path in cell.rglob("*") if path.is_file()} == before


def test_an_output_is_of_one_size(tmp_path: Path):
    (tmp_path / "settings.json").write_text(json.dumps({"tiny": False}))
    done = subprocess.run(
        [sys.executable, EXAMPLE / "run.py", "pipeline", "--tiny", "--output", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "was made with {'tiny': False}" in done.stderr
    assert "give another --output" in done.stderr


@pytest.mark.full
def test_the_tiny_tables_have_a_line_for_every_cell(tmp_path: Path):
    for name, cells in (("table1", 12), ("table2", 15)):
        told = run(name, "--tiny", "--seeds", "0", "--output", tmp_path)
        tree = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(tree["cells"]) == cells
        assert told.count("\n| ") >= cells
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def problem(number: int) -> dict[str, str]:
    """As GSM8K writes them."""
    total = number + 2
    solution = f"She has {number}+2=<<{number}+2={total}>>{total} eggs.\n#### {total}"
    return {"question": f"Ann has {number} eggs and buys 2. How many?", "answer": solution}


PROBLEMS = [problem(number) for number in range(60)]


def gsm8k(folder: Path, problems: list[dict[str, str]]) -> list[Path]:
    train, test = problems[:50], problems[50:]
    return [write_jsonl(folder / "train.jsonl", train), write_jsonl(folder / "test.jsonl", test)]


def convert(folder: Path, problems: list[dict[str, str]]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE / "large/gsm8k.py", *gsm8k(folder, problems), folder / "corpus"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_gsm8k_becomes_both_manners_with_one_answer_and_no_problem_in_two_splits(tmp_path: Path):
    assert convert(tmp_path, PROBLEMS).returncode == 0
    splits = {
        split: [json.loads(line) for line in (tmp_path / f"corpus/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "dev", "test")
    }
    records = [record for split in splits.values() for record in split]
    assert len({record["id"] for record in records}) == len(records) == 2 * len(PROBLEMS)
    assert len(splits["test"]) == 20
    asked = [{record["messages"][0]["content"] for record in split} for split in splits.values()]
    questions = [{each.removesuffix("\n\nAnswer with the number alone.") for each in of_split} for of_split in asked]
    assert sum(map(len, asked)) == 2 * len(PROBLEMS)
    assert all(questions)
    assert sum(map(len, questions)) == len(PROBLEMS)
    fast = [record["messages"][1]["content"] for record in records if record["manner"] == "fast"]
    slow = [record["messages"][1]["content"] for record in records if record["manner"] == "reasoning"]
    assert [reply.rpartition("</think>\n\n")[2] for reply in slow] == fast
    assert slow[0].startswith("<think>\nShe has ")
    assert "<<" not in "".join(slow)


def test_a_solution_without_an_answer_is_named(tmp_path: Path):
    done = convert(tmp_path, [*PROBLEMS, {"question": "?", "answer": "I do not know."}])
    assert done.returncode == 1
    assert "test-00010: a solution ends in a line '#### answer'" in done.stderr


@pytest.mark.full
def test_the_large_form_goes_through_with_models_that_fit_a_cpu(
    tmp_path: Path, teacher_folder: Path, student_folder: Path
):
    small = "--set device=cpu --set rows_per_step=4 --set optimizer.warmup_steps=0"
    on_cpu = "--set teacher.engine=transformers --set teacher.device=cpu --set teacher.dtype=float32"
    variables = {
        "TEACHER": str(teacher_folder), "STUDENT": str(student_folder), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DUMP_ARGS": on_cpu, "TRAIN_ARGS": small,
        "ROUND_ARGS": small, "ROLLOUT_ARGS": "--set engine=transformers --set device=cpu --set max_new_tokens=8",
        "EVAL_ARGS": "--set device=cpu --set generate.max_new_tokens=8",
    }  # fmt: skip
    command = ["bash", EXAMPLE / "large/run.sh", *gsm8k(tmp_path, PROBLEMS), tmp_path / "out"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out/eval").iterdir())) == 8
    assert (tmp_path / "out/students/report.html").exists()
