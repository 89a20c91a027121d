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
from tests.student_train.test_train import log_of

EXAMPLE = Path(__file__).parents[2] / "examples/pangu_recipe"


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
