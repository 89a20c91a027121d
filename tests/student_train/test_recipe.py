"""Stages: what each of them is, and that several commands leave what one leaves."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner

from shared.config import check_settings, settings_yaml
from shared.errors import ConfigError, MismatchError
from student_train.cli import cli
from student_train.recipe import Recipe, chosen_stages, load_runs, stage_folders
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.test_train import log_of, weights_of


def tree(output: Path | str = "out", **stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "student": {"model": "base", "attention": "eager", "revision": "v1"},
        "data": {"text": {"files": ["all.jsonl"]}},
        "output": str(output),
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "steps": 10,
        "seed": 5,
        "stages": stages,
    }


def recipe_of(**stages: dict[str, Any]) -> Recipe:
    return check_settings(Recipe, tree(**stages), (), name="recipe.yaml")


def test_a_stage_is_the_rest_of_the_config_and_what_it_says_itself():
    recipe = recipe_of(
        think={"kind": "sft", "epochs": 2, "optimizer": {"learning_rate": 1e-2}},
        answer={"kind": "sft", "data": {"dataset": "d"}, "seed": 1},
        distil={"kind": "kd", "data": {"dataset": "d"}, "start": "think", "student": {"attention": "sdpa"}},
        anew={"kind": "kd", "data": {"dataset": "d"}, "student": {"model": "other"}},
    )
    think, answer, distil, anew = recipe.stages.values()
    assert (think.output, think.student.model, think.student.revision) == ("out/think", "base", "v1")
    assert (think.epochs, think.steps, think.loss.kd_weight) == (2, None, 0)
    assert (think.optimizer.learning_rate, think.optimizer.warmup_steps) == (1e-2, 2)
    assert (answer.student.model, answer.student.revision) == ("out/think/model", None)
    assert (answer.data.dataset, answer.data.text) == ("d", None)
    assert (answer.steps, answer.optimizer.learning_rate) == (10, 1e-3)
    assert (distil.student.model, distil.student.attention, distil.loss.kd_weight) == ("out/think/model", "sdpa", 0.9)
    assert (anew.student.model, anew.student.revision) == ("other", "v1")
    assert [stage.seed for stage in recipe.stages.values()] == [5, 1, 7, 8]


def test_the_effective_recipe_reads_back_as_itself():
    recipe = recipe_of(think={"kind": "sft"}, distil={"kind": "kd", "data": {"dataset": "d"}, "loss": {"agreement": 1}})
    again = check_settings(Recipe, yaml.safe_load(settings_yaml(recipe)), (), name="recipe.yaml")
    assert again == recipe
    assert again.stages["distil"].alone() == recipe.stages["distil"].alone()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({}, "at least 1 item"),
        ({"a": {"kind": "sft", "optimizer": {"betts": 1}}}, r"stages\.a\.optimizer\.betts.*mean betas\?"),
        ({"a": {"kind": "sft", "step": 1}}, r"stages\.a\.step: unknown key; did you mean steps\?"),
        ({"a": {"kind": "kd"}}, "kd_weight above 0 needs data.dataset"),
        ({"a": {"kind": "sft", "data": {"dataset": "d"}, "loss": {"kd_weight": 0.5}}}, "is 0 in a stage of kind: sft"),
        ({"a": {"kind": "kd", "data": {"dataset": "d"}, "loss": {"kd_weight": 0}}}, "above 0 in a stage of kind: kd"),
        ({"a": {"kind": "sft", "start": "b"}, "b": {"kind": "sft"}}, "is called 'b'; there are: none"),
        ({"a/b": {"kind": "sft"}}, "pattern"),
        ({"a": {"kind": "sft"}, "b": {"kind": "sft", "start": "a", "student": {"model": "m"}}}, "exclude each other"),
        ({"a": {"kind": "sft"}, "b": {"kind": "sft", "output": "out/a"}}, "two stages have the same output"),
        ({"a": {"kind": "sft"}, "b": {"kind": "sft", "device": "meta"}}, "on the same device"),
        ({"a": None}, r"1 setting cannot be used\n  stages\.a: .*\n  next"),
        ({"a": {"kind": "sft", "optimizer": 3}}, r"1 setting cannot be used\n  stages\.a\.optimizer: "),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_refused(stages: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        recipe_of(**stages)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Of three short stages, but for `output`."""
    folder = tmp_path_factory.mktemp("recipe")
    chats = write_jsonl(folder / "chats.jsonl", chat_records(24))
    dataset = sealed_dump(dump_settings(teacher_folder, chats, folder / "dump")).folder
    return {
        "student": {"model": str(student_folder)},
        "data": {"text": {"files": [str(chats)]}},
        "held_out": {"fraction": 0.2},
        "optimizer": {"learning_rate": 1e-3},
        "rows_per_step": 8,
        "steps": 4,
        "device": "cpu",
        "stages": {
            "long": {"kind": "sft"},
            "short": {"kind": "sft", "steps": 2},
            "distil": {"kind": "kd", "data": {"dataset": str(dataset)}},
        },
    }


def as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False)


def run(config: dict[str, Any], output: Path, *arguments: str, code: int = 0) -> str:
    path = output.with_suffix(".yaml")
    path.write_text(as_yaml(config | {"output": str(output)}))
    done = CliRunner().invoke(cli, ["run", str(path), *arguments])
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.stdout


def test_stages_run_in_order_each_from_the_model_of_the_one_before(config: dict[str, Any], tmp_path: Path):
    told = json.loads(run(config, tmp_path / "out", "--json"))["stages"]
    assert [(name, result["steps"]) for name, result in told.items()] == [("long", 4), ("short", 2), ("distil", 4)]
    looks = {name: [e["held_out"] for e in log_of(tmp_path / "out" / name) if "held_out" in e] for name in told}
    for before, after in (("long", "short"), ("short", "distil")):
        assert looks[after][0]["ce"] == pytest.approx(looks[before][-1]["ce"], rel=1e-5)
    assert looks["distil"][-1]["kl"] < looks["distil"][0]["kl"]
    assert stage_folders(tmp_path / "out") == [tmp_path / "out" / name for name in told]
    page = CliRunner().invoke(cli, ["report", str(tmp_path / "out")])
    assert page.exit_code == 0, page.output
    assert "distil" in (tmp_path / "out/report.html").read_text()
    assert load_runs(tmp_path / "out/recipe.yaml") == load_runs(tmp_path / "out.yaml")


def test_a_stage_whose_start_is_not_there_names_the_stage_to_run_first(config: dict[str, Any], tmp_path: Path):
    path = tmp_path / "out.yaml"
    path.write_text(as_yaml(config | {"output": str(tmp_path / "out")}))
    with pytest.raises(ConfigError, match=r"stage short begins with .*out/long/model, which stage long has not left"):
        chosen_stages(cast(Recipe, load_runs(path)), ("short", "distil"))


def test_stages_one_at_a_time_leave_what_all_of_them_leave(config: dict[str, Any], tmp_path: Path):
    run(config, tmp_path / "whole")
    for name in ("long", "short"):
        run(config, tmp_path / "parts", "--stage", name)
    finished = os.stat(tmp_path / "parts/long/run.json").st_mtime_ns
    run(config, tmp_path / "parts")  # what is left
    assert os.stat(tmp_path / "parts/long/run.json").st_mtime_ns == finished
    whole, parts = (weights_of(tmp_path / name / "distil/model") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_what_the_last_stage_lacks_is_told_before_the_first_begins(config: dict[str, Any], tmp_path: Path):
    stages = config["stages"] | {"distil": {"kind": "kd", "data": {"dataset": str(tmp_path / "none")}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(config | {"output": str(tmp_path / "out"), "stages": stages}))
    done = CliRunner().invoke(cli, ["run", str(path)])
    assert "none" in str(done.exception)
    assert not (tmp_path / "out/long").exists()
    assert CliRunner().invoke(cli, ["run", str(path), "--stage", "long"]).exit_code == 0


def test_a_stage_is_not_taken_as_done_when_the_one_before_it_was_made_anew(config: dict[str, Any], tmp_path: Path):
    run(config, tmp_path / "out", "--stage", "long", "--stage", "short")
    shutil.rmtree(tmp_path / "out/long")
    run(config | {"optimizer": {"learning_rate": 2e-3}}, tmp_path / "out", "--stage", "long")
    path = tmp_path / "out.yaml"
    path.write_text(as_yaml(config | {"output": str(tmp_path / "out")}))
    done = CliRunner().invoke(cli, ["run", str(path), "--stage", "short"])
    assert isinstance(done.exception, MismatchError)
    assert "has not come of" in str(done.exception)
    assert f"remove {tmp_path / 'out/short'}" in str(done.exception)


def test_scores_that_the_last_stage_lacks_are_told_before_the_first_begins(config: dict[str, Any], tmp_path: Path):
    curriculum = {"scores": str(tmp_path / "none.jsonl"), "difficulty": "nll", "order": "easy_to_hard"}
    stages = config["stages"] | {"again": {"kind": "sft", "data": config["data"] | {"curriculum": curriculum}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(config | {"output": str(tmp_path / "out"), "stages": stages}))
    done = CliRunner().invoke(cli, ["run", str(path)])
    assert "none.jsonl" in str(done.exception)
    assert not (tmp_path / "out/long").exists()


def test_a_stage_that_is_not_there_is_told(config: dict[str, Any], tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(as_yaml(config | {"output": str(tmp_path / "out")}))
    done = CliRunner().invoke(cli, ["run", str(path), "--stage", "shrt"])
    assert isinstance(done.exception, ConfigError)
    assert "take one of long, short, distil" in str(done.exception)


def test_report_shows_all_stages_of_a_recipe(config: dict[str, Any], tmp_path: Path):
    run(config, tmp_path / "out", "--stage", "long", "--stage", "short")
    done = CliRunner().invoke(cli, ["report", str(tmp_path / "out"), "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "long" in page
    assert "short" in page
    assert "distil" not in page
