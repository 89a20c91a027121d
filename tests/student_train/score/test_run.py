"""`student-train score` as a shell sees it: what plain transformers says of every row, and a curriculum of it."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
import zstandard

import student_train.cli
from shared.dataset import LogitDataset
from student_train.student import Student
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.test_train import log_of


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Write a config and run a verb on it: exit code, standard output, standard error."""

    def run_verb(verb: str, tree: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        path = tmp_path / f"{verb}.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["student-train", verb, str(path), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            student_train.cli.main()
        return end.value.code, *capsys.readouterr()

    return run_verb


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = chat_records(17)
    for record in records[::4]:
        record["messages"][-1]["content"] = "<think>Hm.</think>" + record["messages"][-1]["content"]
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", records)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, chats: Path) -> Path:
    return sealed_dump(dump_settings(teacher_folder, chats, tmp_path_factory.mktemp("kept") / "out")).folder


@pytest.fixture(scope="module")
def by_hand(student_folder: Path, dataset: Path) -> dict[str, Any]:
    """Of each row −log p of its labels, from the whole logits in fp32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    opened, found = LogitDataset.open(dataset), {}
    for row in (row for index in range(len(opened.manifest.shards)) for row in opened.read_shard(index)):
        ids = torch.tensor(row.input_ids_L, dtype=torch.long)[None]
        with torch.no_grad():
            logits = model(ids).logits[0, row.source_index_P]
        ce = torch.nn.functional.cross_entropy(logits, ids[0, row.source_index_P + 1], reduction="none")
        found[row.sample_id] = row, ce.numpy()
    return found


def tree(student: Path, output: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "student": {"model": str(student)}, "data": data, "output": str(output), "batch_tokens": 400,
        "device": "cpu", **changes,
    }  # fmt: skip


def scores_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("packing", [True, False])
def test_score_says_what_the_whole_logits_say(run, packing, student_folder, dataset, by_hand, tmp_path):
    config = tree(student_folder, tmp_path / "out", {"dataset": str(dataset)}, packing=packing)
    code, out, err = run("score", config, "--json")
    assert code == 0, err
    scores = scores_in(tmp_path / "out")
    assert [each["sample_id"] for each in scores] == list(by_hand), "in the order of the dataset"
    for each in scores:
        row, ce = by_hand[each["sample_id"]]
        assert each["nll"] == pytest.approx(ce.mean(), abs=1e-5)
        assert each["max_nll"] == pytest.approx(ce.max(), abs=1e-5)
        assert each["teacher_nll"] == pytest.approx(-row.teacher.realised_logp_P.mean(), abs=1e-6)
        assert each["teacher_entropy"] == pytest.approx(row.teacher.entropy_P.mean(), abs=1e-6)
        assert (each["source"], each["tokens"], each["positions"]) == (row.source, row.num_tokens, row.num_positions)
        assert each["manner"] == ("reasoning" if int(each["sample_id"].split("-")[1]) % 4 == 0 else "fast")
        assert "pass_rate" not in each
    said = json.loads(out)
    assert said == json.loads((tmp_path / "out" / "score.json").read_text())
    every = np.concatenate([ce for _, ce in by_hand.values()])
    assert said["nll"]["of_tokens"] == pytest.approx(every.mean(), abs=1e-5)
    assert said["nll"]["quantiles"]["50 %"] == pytest.approx(np.median([each["nll"] for each in scores]))
    assert (said["rows"], said["positions"], said["manners"]) == (17, len(every), {"reasoning": 5, "fast": 12})
    assert said["student"]["model"]["weights_sha256"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["score.json", "scores.jsonl"]


def test_score_of_text_has_no_teacher_and_of_one_manner_that_alone(run, student_folder, chats, by_hand, tmp_path):
    data = {"text": {"files": [str(chats)]}, "manner": "reasoning"}
    code, out, err = run("score", tree(student_folder, tmp_path / "out", data))
    assert code == 0, err
    scores = scores_in(tmp_path / "out")
    assert [each["sample_id"] for each in scores] == [f"chat-{n}" for n in range(0, 17, 4)]
    assert {each["manner"] for each in scores} == {"reasoning"}
    for each in scores:
        assert each["nll"] == pytest.approx(by_hand[each["sample_id"]][1].mean(), abs=1e-5)
        assert not each.keys() & {"teacher_nll", "teacher_entropy", "pass_rate"}
    assert f"{tmp_path}/out/scores.jsonl: 5 rows (5 reasoning)" in out
    assert (
        f"next: data.curriculum: {{scores: {tmp_path}/out/scores.jsonl, difficulty: nll, order: easy_to_hard}}" in out
    )


def test_score_of_one_manner_of_a_dataset_has_its_rows_alone(run, student_folder, dataset, by_hand, tmp_path):
    config = tree(student_folder, tmp_path / "out", {"dataset": str(dataset), "manner": "fast"})
    code, _, err = run("score", config)
    assert code == 0, err
    scores = scores_in(tmp_path / "out")
    assert [each["sample_id"] for each in scores] == [f"chat-{n}" for n in range(17) if n % 4]
    for each in scores:
        assert each["nll"] == pytest.approx(by_hand[each["sample_id"]][1].mean(), abs=1e-5)


def test_scores_are_a_curriculum_for_a_run(run, student_folder, dataset, by_hand, tmp_path):
    code, _, err = run("score", tree(student_folder, tmp_path / "scored", {"dataset": str(dataset)}))
    assert code == 0, err
    curriculum = {"scores": str(tmp_path / "scored/scores.jsonl"), "difficulty": "nll", "order": "easy_to_hard"}
    data = {"dataset": str(dataset), "curriculum": curriculum | {"quantiles": [0.25, 1]}}
    config = tree(student_folder, tmp_path / "run", data, rows_per_step=4, epochs=1, seed=3)
    code, _, err = run("run", config)
    assert code == 0, err
    assert ": 17 rows, 13 taken; dropped: 4 easier than nll" in err
    ce = [entry["ce"] for entry in log_of(tmp_path / "run") if "ce" in entry]
    hardness = sorted((ce.mean(), ce.sum(), len(ce)) for _, ce in by_hand.values())[4:]
    first = hardness[:4]
    assert ce[0] == pytest.approx(sum(each[1] for each in first) / sum(each[2] for each in first), rel=1e-4)
    assert ce[-2] > ce[0]
    record = json.loads((tmp_path / "run/run.json").read_text())["data"][0]["rows"]
    assert (record["rows"], record["taken"], list(record["dropped"].values())) == (17, 13, [4])


def test_rollouts_say_how_often_a_row_was_right(run, student_folder, dataset, tmp_path):
    """Replies that were not kept count as well; unmarked ones do not; rows that nobody asked have null."""
    rollouts = tmp_path / "rollouts"
    marks = {"data/part-00000.jsonl": [("chat-0", True), ("chat-0", True), ("chat-1", None), ("elsewhere", True)]}
    marks |= {
        "dropped/part-00000.jsonl": [("chat-0", False), ("chat-2", False)],
        "data/part-1.jsonl.zst": [("chat-0", False)],
    }
    for path, records in marks.items():
        text = "".join(json.dumps({"prompt_id": name, "right": right, "reply": "…"}) + "\n" for name, right in records)
        (rollouts / path).parent.mkdir(parents=True, exist_ok=True)
        data = text.encode()
        (rollouts / path).write_bytes(zstandard.compress(data) if path.endswith(".zst") else data)
    config = tree(student_folder, tmp_path / "out", {"dataset": str(dataset)}, rollouts=str(rollouts))
    code, out, err = run("score", config)
    assert code == 0, err
    found = {each["sample_id"]: each for each in scores_in(tmp_path / "out")}
    rates = {name: (each["pass_rate"], each["failure_rate"], each["num_samples"]) for name, each in found.items()}
    assert (rates["chat-0"], rates["chat-2"]) == ((0.5, 0.5, 4), (0.0, 1.0, 1))
    assert rates["chat-1"] == rates["chat-3"] == (None, None, 0)
    assert "pass rate: 25.0 % on average of 2 rows" in out
    glob = str(rollouts / "data/*.jsonl")
    code, _, err = run("score", config | {"rollouts": glob})
    assert code == 0, err
    assert scores_in(tmp_path / "out")[0]["num_samples"] == 2
    curriculum = {"scores": str(tmp_path / "out/scores.jsonl"), "difficulty": "failure_rate", "values": [0, 0.5]}
    data = {"dataset": str(dataset), "curriculum": curriculum}
    code, _, err = run("run", tree(student_folder, tmp_path / "run", data, rows_per_step=1, steps=1))
    assert code == 0, err
    assert ": 17 rows, 1 taken; dropped: 16 of unknown failure_rate" in err


REFUSED: dict[str, tuple[str, int, str]] = {
    "no mark": ('{"prompt_id": "chat-0", "right": null}', 2, "no reply is marked right or wrong"),
    "other prompts": ('{"prompt_id": "x", "right": true}', 2, "no marked reply is to a prompt of these rows"),
    "no prompt": ('{"right": true}', 3, "part.jsonl:1: expected a prompt_id and right"),
    "a mark that is none": ('{"prompt_id": "chat-0", "right": 1}', 3, "part.jsonl:1: expected a prompt_id and right"),
    "a line that is cut": ('{"prompt_id": "chat-0", "ri', 3, "part.jsonl:1: not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rollouts_that_say_nothing_of_these_rows_are_refused(run, name, student_folder, dataset, tmp_path):
    text, exit_code, message = REFUSED[name]
    (tmp_path / "part.jsonl").write_text(text + "\n")
    config = tree(student_folder, tmp_path / "out", {"dataset": str(dataset)}, rollouts=str(tmp_path / "part.jsonl"))
    code, _, err = run("score", config)
    assert code == exit_code
    assert message in err
    assert not list((tmp_path / "out").iterdir())


def test_score_refuses_sample_ids_that_come_from_two_sources(run, student_folder, dataset, chats, tmp_path):
    data = {"mix": [{"dataset": str(dataset)}, {"text": {"files": [str(chats)]}}]}
    code, _, err = run("score", tree(student_folder, tmp_path / "out", data))
    assert code == 2
    assert "17 sample ids are in several sources of the mix, first 'chat-0'" in err


def test_an_interrupted_score_leaves_what_was_there(run, student_folder, dataset, tmp_path, monkeypatch):
    config = tree(student_folder, tmp_path / "out", {"dataset": str(dataset)})
    code, _, err = run("score", config)
    assert code == 0, err
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    measured = Student.measured

    def interrupted(self: Student, passes: Any, objective: Any) -> Any:
        yield next(measured(self, passes, objective))
        raise KeyboardInterrupt

    monkeypatch.setattr(Student, "measured", interrupted)
    code, _, err = run("score", config)
    assert code == 75
    assert "run the same command again" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_student_without_numbers_is_refused_by_its_rows(run, student_folder, dataset, tmp_path, monkeypatch):
    measured = Student.measured

    def broken(self: Student, passes: Any, objective: Any) -> Any:
        for each, measures in measured(self, passes, objective):
            measures.values_MN[:, 0] = torch.nan
            yield each, measures

    monkeypatch.setattr(Student, "measured", broken)
    code, _, err = run("score", tree(student_folder, tmp_path / "out", {"dataset": str(dataset)}))
    assert code == 1
    assert "the student's logits are no numbers on" in err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "m", "lora": {}}}, "student.lora is for training"),
        (
            {"data": {"dataset": "d", "curriculum": {"deduplicate": True}}},
            "a curriculum is for rows that are trained on",
        ),
        ({"rolouts": "r"}, "did you mean rollouts"),
    ],
)
def test_score_refuses_what_it_would_not_do(run, changes, message, student_folder, tmp_path):
    code, _, err = run("score", tree(student_folder, tmp_path / "out", {"dataset": "d"}) | changes)
    assert code == 2
    assert message in err


def test_score_writes_to_no_folder_of_somebody_else(run, student_folder, dataset, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    code, _, err = run("score", tree(student_folder, tmp_path / "out", {"dataset": str(dataset)}))
    assert code == 2
    assert "it is not ours to write to" in err
