"""`student-train eval` as a shell sees it."""

import json
import math
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import student_train.cli
from student_train.eval.generation import Writer
from student_train.evaluation import Evaluation
from tests.data import dump_settings, sealed_dump

ANSWER = r"####\s*(\S+)"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Write a config and run the verb on it: exit code, standard output, standard error."""

    def run_verb(tree: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        path = tmp_path / "eval.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["student-train", "eval", str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            student_train.cli.main()
        return end.value.code, *capsys.readouterr()

    return run_verb


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, asked: Path) -> Path:
    return sealed_dump(dump_settings(teacher_folder, asked, tmp_path_factory.mktemp("kept") / "out")).folder


def tree(student: Path, tmp_path: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "student": {"model": str(student)},
        "data": data,
        "output": str(tmp_path / "out"),
        "batch_tokens": 300,
        "generate": {"max_new_tokens": 20, "answer": ANSWER, "batch_rows": 4},
        "worst": 2,
        "device": "cpu",
        **changes,
    }


def test_eval_measures_and_asks_on_a_dataset(run, learnt_folder, dataset, tmp_path):
    config = tree(learnt_folder, tmp_path, {"dataset": str(dataset)})
    code, out, err = run(config, "--json")
    assert code == 0, err
    said = json.loads(out)
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert set(written) == {"evaluation", "exact_match", "lm_eval", "settings", "versions"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["eval.json"]
    evaluation = Evaluation.model_validate(written["evaluation"])
    assert (evaluation.rows, len(evaluation.worst)) == (7, 2)
    assert evaluation.means.kl is not None
    assert evaluation.means.kl > 0.1
    assert said["evaluation"]["means"] == written["evaluation"]["means"]
    assert "worst" not in said["evaluation"]
    assert (said["exact_match"]["right"], said["exact_match"]["checkable"]) == (4, 6)
    assert "examples" not in said["exact_match"]
    assert len(written["exact_match"]["examples"]) == 6
    assert written["settings"]["generate"]["answer"] == ANSWER
    assert written["settings"]["seed"] == 0  # defaults included
    assert set(written["versions"]) >= {"logitferry", "torch", "transformers"}


def test_eval_asks_the_same_of_a_text_as_of_its_dataset(run, learnt_folder, asked, dataset, tmp_path):
    found = []
    for data in ({"dataset": str(dataset)}, {"text": {"files": [str(asked)]}}):
        code, out, err = run(tree(learnt_folder, tmp_path, data), "--json")  # the second writes over the first
        assert code == 0, err
        found.append(json.loads(out))
    from_dataset, from_text = found
    assert from_text["evaluation"]["means"]["kl"] is None
    assert math.isclose(from_text["evaluation"]["means"]["ce"], from_dataset["evaluation"]["means"]["ce"], rel_tol=1e-5)
    timings = {"seconds", "tokens_per_s"}
    asked_text, asked_dataset = (
        {name: value for name, value in each["exact_match"].items() if name not in timings} for each in found
    )
    assert asked_text == asked_dataset


def test_eval_shows_people_a_table(run, learnt_folder, asked, tmp_path):
    config = tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}})
    code, out, err = run(config)
    assert code == 0, err
    assert out.splitlines()[0] == str(tmp_path / "out" / "eval.json")
    assert "  cross-entropy  " in out
    assert "exact match: 66.7 % ± 19.2, 4 of 6" in out
    assert "  without a checkable answer  1\n" in out
    assert "teacher" not in out  # nor a line of anything else that there is none of
    assert "None" not in out
    assert "cut" not in out


def test_eval_does_what_it_is_asked_alone(run, learnt_folder, asked, tmp_path):
    config = tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}})
    code, out, err = run(config, "--json", "--set", "measure=false", "--set", "generate.rows=3")
    assert code == 0, err
    assert json.loads(out)["evaluation"] is None
    assert json.loads(out)["exact_match"]["rows"] == 3
    code, out, err = run(config, "--json", "--set", "generate=null")
    assert code == 0, err
    assert json.loads(out)["exact_match"] is None
    assert json.loads(out)["evaluation"]["rows"] == 7


def test_eval_prints_its_config(run, learnt_folder, asked, tmp_path):
    config = tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}})
    code, out, _ = run(config, "--print-config", "--set", "generate.rows=50")
    assert code == 0
    shown = yaml.safe_load(out)
    assert (shown["generate"]["rows"], shown["generate"]["examples"], shown["lm_eval"]) == (50, 20, None)
    assert not (tmp_path / "out").exists()


def test_eval_leaves_a_folder_alone_that_is_not_its_own(run, learnt_folder, asked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = run(tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}}))
    assert code == 2
    assert "is not empty and holds none of eval.json" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({"student": {"model": "/not/here"}}, 2, "model folder /not/here does not exist"),
        ({"data": {"text": {"files": ["/not/here.jsonl"]}}}, 2, "/not/here.jsonl"),
        ({"generate": {"answer": "boxed(.*)"}}, 2, "7 of 7 references have no answer"),
        ({"generate": {"answer": "("}}, 2, "generate.answer: no regular expression"),
        ({"genrate": {}}, 2, "did you mean generate?"),
    ],
)
def test_eval_says_what_is_wrong_and_writes_nothing(run, learnt_folder, asked, tmp_path, changes, expected, said):
    config = tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}}) | changes
    code, out, err = run(config, "--json")
    assert (code, out) == (expected, ""), err
    assert said in err
    assert not (tmp_path / "out" / "eval.json").exists()


def test_eval_runs_in_one_process(run, learnt_folder, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}}))
    assert code == 2
    assert "start it without torchrun" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_eval_that_is_interrupted_leaves_what_was_there(run, learnt_folder, asked, tmp_path, monkeypatch, number):
    config = tree(learnt_folder, tmp_path, {"text": {"files": [str(asked)]}})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("earlier")
    write, batches = Writer._write_batch, []

    def interrupted(*arguments):
        if batches:
            signal.raise_signal(number)
        batches.append(write(*arguments))
        return batches[-1]

    monkeypatch.setattr(Writer, "_write_batch", interrupted)
    code, out, err = run(config, "--json")
    assert (code, out) == (75, ""), err
    assert "next: run the same command again" in err
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {"eval.json": "earlier"}
    monkeypatch.undo()


def test_eval_of_a_model_of_two_dtypes(run, learnt_folder, dataset, tmp_path):
    config = tree(learnt_folder, tmp_path, {"dataset": str(dataset)})
    config["student"] |= {"compute_dtype": "bfloat16"}
    code, out, err = run(config, "--json")
    assert code == 0, err
    assert json.loads(out)["exact_match"]["right"] == 4
