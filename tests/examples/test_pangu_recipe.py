"""The recipe's example in its tiny form: every part hands on to the next, stops and goes on; and its task is sound."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config import load_settings
from shared.dataset import LogitDataset
from shared.encode import BatchEncoder, EncodedRow
from shared.layout import Chat
from shared.records import Record
from shared.text_config import TextSettings
from student_train.config import TrainSettings
from student_train.eval.config import EvalSettings
from student_train.lineage import writer_of
from student_train.recipe import Recipe, load_runs
from student_train.rollout.config import RolloutSettings
from teacher_dump.config import DumpSettings
from tests.student_train.test_train import log_of

EXAMPLE = Path(__file__).parents[2] / "examples/pangu_recipe"


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


def records() -> Iterator[dict[str, Any]]:
    for split, problems in task.make_problems(task.TINY_SIZES, seed=3).items():
        yield from task.make_records(split, problems, seed=3)


def test_no_problem_is_in_two_splits_and_each_is_in_both_manners():
    splits = task.make_problems(task.TINY_SIZES, seed=3)
    questions = [problem.question for problems in splits.values() for problem in problems]
    assert len(questions) == len(set(questions)) == sum(task.TINY_SIZES.values())
    found = list(records())
    assert len({record["id"] for record in found}) == len(found)
    assert sum(record["manner"] == "fast" for record in found) == len(questions)


def test_answers_are_right_and_are_what_evaluation_finds():
    pattern = re.compile(yaml.safe_load((EXAMPLE / "eval.yaml").read_text())["generate"]["answer"])
    for record in records():
        (last,) = pattern.findall(record["messages"][1]["content"])
        if not record["id"].startswith(("teacher", "student")):
            assert last == record["answer"]
        numbers = [int(each) for each in re.findall(r"(?<!\w)\d+", record["messages"][0]["content"])]
        assert len(numbers) == record["level"] + 1


def test_the_switch_alone_tells_the_manner_and_the_vocabulary_is_a_real_one(tmp_path: Path):
    task.write_corpus(tmp_path / "corpus", 3, {"teacher": 6000, "dev": 4})
    paths = models.write_models(tmp_path / "corpus", tmp_path, 3, models.TINY_TEACHER, models.TINY_STUDENT)
    tokenizer = AutoTokenizer.from_pretrained(paths["student"])
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(paths["student"]).config.vocab_size == 8192
    by_manner = {}
    lines = (tmp_path / "corpus/dev.jsonl").read_text().splitlines()[:2]
    encoder = BatchEncoder(tokenizer, TextSettings(files=["-"]))
    for line in map(json.loads, lines):
        record = Record(sample_id=line["id"], source="dev", content=Chat(messages=line["messages"]), where="dev:1")
        (encoded,) = encoder.encode([record])
        assert isinstance(encoded, EncodedRow)
        ids, mask = encoded.row.input_ids_L, encoded.row.label_mask_L
        by_manner[line["manner"]] = tokenizer.decode(ids[: int(mask.argmax())]), tokenizer.decode(ids[mask])
        asked = {"enable_thinking": line["manner"] == "reasoning", "add_generation_prompt": True}
        prompt = tokenizer.apply_chat_template(line["messages"][:1], tokenize=False, **asked)
        assert by_manner[line["manner"]][0] == prompt
    (slow, thought), (fast, answer) = by_manner["reasoning"], by_manner["fast"]
    assert fast == f"{slow}<think></think>"
    assert thought.startswith("<think>")
    assert re.fullmatch(r"\d+<\|im_end\|>", answer)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dump", DumpSettings), ("eval", EvalSettings), ("rollout", RolloutSettings), ("round", TrainSettings)],
)
def test_configs_can_be_read(name: str, kind: Any):
    load_settings(kind, EXAMPLE / f"{name}.yaml")


@pytest.mark.parametrize("name", ["teacher", "recipe", "alternation"])
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


@pytest.mark.full
def test_the_tiny_tables_have_a_line_for_every_cell(tmp_path: Path):
    for name, cells in (("table1", 7), ("table2", 14)):
        told = run(name, "--tiny", "--seeds", "0", "--output", tmp_path)
        tree = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(tree["cells"]) == cells
        assert told.count("\n| ") >= cells
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
