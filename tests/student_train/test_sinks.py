"""TensorBoard and Weights & Biases get what the log gets, and a run survives their failures."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import ConfigError
from student_train.config import TrainSettings
from student_train.sinks import numbers_of, open_sinks
from student_train.train import Trainer
from tests.data import chat_records, write_jsonl
from tests.student_train.test_train import log_of, settings


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(12))


def run_settings(student: Path, chats: Path, output: Path, **changes: Any) -> TrainSettings:
    fixed = {"data__text": {"files": [str(chats)]}, "loss__kd_weight": 0, "steps": 5, "rows_per_step": 4}
    return settings(student, output, **fixed | changes)


def test_numbers_are_named_by_what_they_are_of():
    entry = {"step": 3, "ce": 1.5, "held_out": {"ce": 2.0, "kl": None}, "anomaly": {"reason": "x", "skipped": True}}
    assert numbers_of(entry) == {"train/ce": 1.5, "held_out/ce": 2.0}


def test_tensorboard_has_every_number_of_the_log_also_of_a_run_that_went_on(
    student_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    changes = {"log__tensorboard": True, "held_out__fraction": 0.3, "checkpoint__every_steps": 2}
    run = run_settings(student_folder, chats, tmp_path / "out", **changes)
    step = Trainer._step

    def stop(trainer: Trainer, batch: Any) -> Any:
        if batch.step == 3:
            raise KeyboardInterrupt
        return step(trainer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    Trainer(run).run()
    events = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    entries = log_of(tmp_path / "out")
    steps = [entry for entry in entries if "loss" in entry]
    looks = [{"step": entry["step"]} | entry["held_out"] for entry in entries if "held_out" in entry]
    for tag, key, of in (("train/ce", "ce", steps), ("train/lr", "lr", steps), ("held_out/ce", "ce", looks)):
        expected = [(entry["step"], entry[key]) for entry in of]
        got = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [each[0] for each in got] == [each[0] for each in expected], tag
        assert [each[1] for each in got] == pytest.approx([each[1] for each in expected], rel=1e-6)


class FakeWandb(SimpleNamespace):
    """What is used of the package, taking down what it is told."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__(asked={}, logged=[], finished=False, fails_at=fails_at)

    def init(self, **asked: Any) -> "FakeWandb":
        self.asked = asked
        return self

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, numbers: dict[str, float]) -> None:
        if self.fails_at is not None and numbers["step"] >= self.fails_at:
            raise ConnectionError("no network")
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_numbers_under_one_name_for_a_folder(
    student_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = run_settings(student_folder, chats, tmp_path / "out", log__wandb={"project": "p"})
    Trainer(run).run()
    assert [each["step"] for each in fake.logged] == [1, 2, 3, 4, 5]
    assert [each["train/ce"] for each in fake.logged] == [e["ce"] for e in log_of(tmp_path / "out")]
    assert (fake.asked["project"], fake.asked["name"], fake.asked["resume"]) == ("p", "out", "allow")
    assert fake.asked["config"]["steps"] == 5
    assert fake.finished
    name = fake.asked["id"]
    open_sinks(run, after=3)
    assert fake.asked["id"] == name


def test_a_sink_that_fails_is_left_away_and_the_run_goes_on(
    student_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake = FakeWandb(fails_at=3)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Trainer(run_settings(student_folder, chats, tmp_path / "out", log__wandb={"project": "p"})).run()
    assert len(fake.logged) == 2
    assert len(log_of(tmp_path / "out")) == 5
    assert caplog.text.count("Weights & Biases gets nothing from now on: ConnectionError: no network") == 1


@pytest.mark.parametrize(("package", "asked"), [("wandb", {"wandb": {"project": "p"}}),
                                                ("torch.utils.tensorboard.writer", {"tensorboard": True})])  # fmt: skip
def test_a_package_that_is_not_there_is_said_before_anything_is_trained(
    package: str, asked: Any, student_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="cannot be imported"):
        open_sinks(run_settings(student_folder, chats, tmp_path / "out", log=asked), after=None)
