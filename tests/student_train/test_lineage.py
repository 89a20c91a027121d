"""How many steps lie between the one who wrote and the one who learns."""

import json
from pathlib import Path

import pytest

from shared.errors import DamagedDataError
from shared.pretrained import model_identity
from shared.records import asked_of
from student_train.config import StudentSettings
from student_train.lineage import LINEAGE_NAME, Lineage, source_of, writer_name, writer_of
from student_train.stream import is_held_out
from student_train.train import Trainer
from tests.data import chat_records, write_jsonl
from tests.student_train.test_train import log_of, settings

A, B, C = ("".join([digit] * 12) for digit in "abc")


def name_of(folder: Path) -> str:
    """What a rollout of that model says of its writer."""
    return writer_name(vars(model_identity(StudentSettings(model=str(folder)), dtype="float32", engine="transformers")))


def test_every_run_leaves_the_lineage_of_its_weights(student_folder: Path, tmp_path: Path):
    text = {"files": [str(write_jsonl(tmp_path / "chats.jsonl", chat_records(24)))]}
    models = [student_folder]
    for steps in (3, 2):
        run = settings(models[-1], tmp_path / str(steps), data__text=text, loss__kd_weight=0, steps=steps)
        Trainer(run).run()
        models.append(tmp_path / str(steps) / "model")
    lineage = Lineage.of(str(models[-1]), {"weights_sha256": name_of(models[-1])})
    assert lineage.steps_of == {name_of(models[0]): 0, name_of(models[1]): 3, name_of(models[2]): 5}
    assert lineage.steps == 5


def test_a_run_logs_how_stale_the_rollouts_of_its_steps_are(student_folder: Path, tmp_path: Path):
    own = name_of(student_folder)
    records = chat_records(6)
    for record, source in zip(
        records, [*[source_of(own, "a")] * 3, source_of("0123456789ab", "a"), "a", "b"], strict=True
    ):
        record["from"] = source
    text = {"files": [str(write_jsonl(tmp_path / "chats.jsonl", records))], "source_field": "from"}
    Trainer(
        settings(student_folder, tmp_path / "out", data__text=text, loss__kd_weight=0, steps=3, rows_per_step=6)
    ).run()
    steps = [entry for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert [(entry["rollouts"], entry["stale_steps"]) for entry in steps] == [(4 / 6, 0), (4 / 6, 1), (4 / 6, 2)]


def test_staleness_counts_the_steps_since_an_ancestor_wrote():
    lineage = Lineage(steps_of={A: 0, B: 100})
    sources = [source_of(A, "x"), source_of(B, "x"), source_of(C, "x"), "x"]
    assert lineage.staleness(sources, 7) == {"rollouts": 0.75, "stale_steps": (107 + 7) / 2}
    assert lineage.staleness(sources[2:], 7) == {"rollouts": 0.5}, "by a student that is no ancestor"
    assert lineage.staleness(sources[3:], 7) == {}


def test_weights_that_other_hands_changed_have_no_ancestors(tmp_path: Path):
    (tmp_path / LINEAGE_NAME).write_text(json.dumps({"version": 1, "weights": [{"weights": A, "steps": 9}]}))
    assert Lineage.of(str(tmp_path), {"weights_sha256": B}).steps_of == {B: 0}
    (tmp_path / LINEAGE_NAME).write_text("{")
    with pytest.raises(DamagedDataError, match=LINEAGE_NAME):
        Lineage.of(str(tmp_path), {"weights_sha256": B})


def test_a_source_says_who_wrote_a_row():
    assert writer_of(source_of("3f2a9c017b55", "chats.jsonl")) == "3f2a9c017b55"
    assert writer_of("chats.jsonl") is None
    assert writer_of("student-notes.jsonl") is None
    assert writer_of("student-a/notes.jsonl") is None
    assert asked_of("task~7.0") == "task~7.0", "an id of somebody's own"


def test_weights_of_the_hub_have_a_name_of_digits_too():
    known = {"name": "owner/model", "revision": "main"}
    assert writer_of(source_of(writer_name(known), "x")) == writer_name(known) != writer_name(known | {"name": "other"})


def test_rollouts_are_held_out_with_the_row_whose_prompt_they_answer():
    for number in range(50):
        assert asked_of(f"row~{number}~3f2a9c017b55.2") == f"row~{number}"
        assert is_held_out(f"row~{number}~3f2a9c017b55.2", 0.5) == is_held_out(f"row~{number}", 0.5)
