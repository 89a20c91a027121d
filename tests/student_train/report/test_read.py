"""What the report reads of a run: all that was logged, of any release, and nothing that is damaged."""

import json

import numpy as np
import pytest

from shared.errors import ConfigError, DamagedDataError
from student_train.report.read import read_stage
from tests.student_train.report.made import config, held_out_line, log_lines, made_run, step_line


def test_read_gives_steps_looks_and_how_long_each_step_took(tmp_path):
    stage = read_stage(made_run(tmp_path / "kd"), "kd")
    assert stage.steps == stage.planned_steps == 400
    assert stage.is_finished
    assert not stage.is_cut
    np.testing.assert_allclose(stage.of("ce"), [2 - step / 400 for step in range(1, 401)])
    np.testing.assert_allclose(stage.of("took_s"), 2.0)
    assert stage.held("ce") == (
        [0, 100, 200, 300, 400],
        [pytest.approx(2.1 - step / 400) for step in range(0, 401, 100)],
    )
    assert not stage.has("mfu")


def test_read_takes_older_and_later_logs(tmp_path):
    lines = [{"step": 1, "loss": 1.5, "ce": 1.5, "novelty": [1, 2]}, held_out_line(1, ece=None, novelty=0.5)]
    stage = read_stage(made_run(tmp_path / "old", lines), "old")
    assert stage.of("ce").tolist() == [1.5]
    assert np.isnan(stage.of("kept_mass")).all()
    assert stage.held("ece") == ([], [])


def test_read_knows_steps_that_went_wrong_by_their_anomaly_or_a_loss_that_is_none(tmp_path):
    lines = [step_line(step) for step in range(1, 6)]
    lines[1] |= {"loss": None, "ce": None}
    rows = [{"sample_id": "bad", "ce": None, "kd": 3.0}]
    lines[3]["anomaly"] = {"reason": "gradient norm 80", "skipped": True, "rows": rows}
    stage = read_stage(made_run(tmp_path / "sick", lines), "sick")
    assert stage.step_S[stage.bad_S].tolist() == [2, 4]
    assert stage.anomalies[4].rows[0].sample_id == "bad"


@pytest.mark.parametrize(
    "tail", ['{"step": 6, "loss": 1.2, "c', '{"step": 6}\0\0\0', '{"step": 6, "loss": 1.2, "c\n\0\0\n']
)
def test_read_stops_before_a_line_that_was_being_written(tmp_path, tail):
    folder = made_run(tmp_path / "killed", [step_line(step) for step in range(1, 6)], finished=False)
    with (folder / "log.jsonl").open("a") as file:
        file.write(tail)
    if tail.endswith("\n"):
        with pytest.raises(DamagedDataError, match=r"log\.jsonl:6"):
            read_stage(folder, "killed")
        return
    stage = read_stage(folder, "killed")
    assert stage.steps == 5
    assert stage.is_cut
    assert not stage.is_finished


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"step": 3, "lo', "Invalid JSON"),
        ('{"step": 3, "loss": "much"}', "loss: Input should be a valid number"),
        ('{"step": -1}', "step: Input should be greater"),
        ('["step", 3]', "Input should be an object"),
        ('{"step": 1, "loss": 1.0}', "step 1 stands behind step 2"),
    ],
)
def test_read_names_the_damaged_line_in_the_middle(tmp_path, line, says):
    folder = made_run(tmp_path / "kd", [step_line(step) for step in range(1, 6)])
    lines = (folder / "log.jsonl").read_text().splitlines()
    lines[2] = line
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DamagedDataError) as raised:
        read_stage(folder, "kd")
    assert f"{folder}/log.jsonl:3: " in str(raised.value)
    assert says in str(raised.value)


def test_read_takes_a_run_that_has_logged_nothing(tmp_path):
    folder = made_run(tmp_path / "new", [step_line(1)], finished=False)
    for content in ("", "\n"):
        (folder / "log.jsonl").write_text(content)
        assert read_stage(folder, "new").steps == 0
    (folder / "log.jsonl").unlink()
    stage = read_stage(folder, "new")
    assert stage.steps == 0
    assert stage.newest_look == {}


def test_read_finds_the_planned_steps_of_epochs_in_the_newest_checkpoint(tmp_path):
    tree = config(epochs=2.0)
    del tree["steps"]
    folder = made_run(tmp_path / "kd", log_lines(10), tree=tree, finished=False)
    assert read_stage(folder, "kd").planned_steps is None
    for step, planned in ((5, 70), (10, 77)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"identity": {"stage": {"steps": planned}}}))
    assert read_stage(folder, "kd").planned_steps == 77


def test_read_says_what_it_expected_and_what_to_run(tmp_path):
    folder = made_run(tmp_path / "runs" / "kd")
    (tmp_path / "empty").mkdir()
    for path, says in (
        (tmp_path / "nowhere", "it is not there\n  next: name the `output` of a config"),
        (tmp_path / "empty", "it has no config.yaml"),
        (folder.parent, f"next: name the runs in it, first stage first, as: student-train report {folder}"),
        (folder / "log.jsonl", f"it is a file\n  next: student-train report {folder}"),
    ):
        with pytest.raises(ConfigError, match="is no run's folder") as raised:
            read_stage(path, "x")
        assert says in str(raised.value)


@pytest.mark.parametrize(("name", "content"), [("run.json", "{"), ("run.json", "[]"), ("held_out.json", '{"rows": 3}')])
def test_read_refuses_files_that_hold_something_else(tmp_path, name, content):
    folder = made_run(tmp_path / "kd")
    (folder / name).write_text(content)
    with pytest.raises(DamagedDataError, match=name):
        read_stage(folder, "kd")


def test_read_refuses_a_config_of_something_else(tmp_path):
    folder = made_run(tmp_path / "kd")
    (folder / "config.yaml").write_text("teacher: x\n")
    with pytest.raises(ConfigError, match="teacher: unknown key"):
        read_stage(folder, "kd")
