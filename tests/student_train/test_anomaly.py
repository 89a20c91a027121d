"""Steps that are no numbers, or spikes: who stops, who skips, and that the rows are named."""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.dataset import LogitDataset
from shared.errors import DivergedError, NoMemoryError, NonFiniteError
from student_train.anomaly import Anomalies, RowLoss, worst_rows
from student_train.config import AnomalySettings
from student_train.data import Batch
from student_train.student import Student
from student_train.train import Trainer
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.test_train import log_of, settings, weights_of

ROWS = [RowLoss(sample_id="bad", ce=math.nan, kd=0.1), RowLoss(sample_id="odd", ce=9.0, kd=2.0)]


def watch(**changes: Any) -> Anomalies:
    return Anomalies(AnomalySettings.model_validate({"window": 8} | changes))


def test_what_is_no_number_is_a_fault_and_names_its_rows():
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)):
        fault = watch().fault(loss, norm)
        assert fault is not None
        with pytest.raises(NonFiniteError, match=r"step 5: loss .*; its worst rows: bad \(ce nan, kd 0.1\), odd"):
            watch().skip_or_stop(5, fault, ROWS)


def test_a_spike_is_measured_by_the_median_of_the_steps_before():
    anomalies = watch(spike_factor=5.0)
    for norm in (1.0, 2.0, 1.5, 900.0, 1.0, 1.0, 2.0):
        assert anomalies.fault(1.0, norm) is None, "there is no window yet"
    assert anomalies.fault(1.0, 1.5) is None
    fault = anomalies.fault(1.0, 8.0)
    assert fault == "gradient norm 8, 5.33 times the median of 8 steps"
    assert anomalies.fault(1.0, 7.0) is None, "and a spike is not among those before"
    with pytest.raises(DivergedError, match="step 9: gradient norm 8"):
        anomalies.skip_or_stop(9, fault, ROWS)
    assert watch().fault(1.0, 1e30) is None, "nothing is a spike unless asked for"


def test_only_so_many_steps_in_a_row_are_skipped():
    anomalies = watch(action="skip", max_skipped=2)
    anomalies.skip_or_stop(1, "loss nan", ROWS)
    assert anomalies.fault(1.0, 1.0) is None
    for step in (3, 4):
        anomalies.skip_or_stop(step, "loss nan", ROWS)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row were skipped before it"):
        anomalies.skip_or_stop(5, "loss nan", ROWS)


def test_the_worst_rows_come_first():
    rows = worst_rows([f"r{n}" for n in range(12)], [float(n) for n in range(11)] + [math.nan], [0.0] * 12)
    assert [row.sample_id for row in rows] == ["r11", *(f"r{n}" for n in range(10, 3, -1))]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    return sealed_dump(
        dump_settings(teacher_folder, write_jsonl(folder / "c.jsonl", chat_records(24)), folder / "out")
    ).folder


def run_with_a_bad_step(
    monkeypatch: pytest.MonkeyPatch, student: Path, dataset: Path, output: Path, bad: set[int], **changes: Any
) -> tuple[dict[str, Any], list[str]]:
    """A run in which one row's hidden states are no numbers in some steps; and what those rows are called."""
    run = settings(
        student, output, data__dataset=str(dataset), steps=8, rows_per_step=4, held_out__fraction=0.2, **changes
    )
    trainer, names = Trainer(run), list[str]()
    whole = Student.gradients

    def broken(self: Student, passes: Any, *arguments: Any, **named: Any) -> Any:
        loss, measures = whole(self, passes, *arguments, **named)
        step = len(log_of(output)) - 1  # with the look at the start
        if step in bad:
            measures[0].values_MN[0, : passes[0].positions[0]] = torch.nan
            self.model.get_input_embeddings().weight.grad.fill_(torch.nan)
            names.append(str(passes[0].rows[0]))
        return loss, measures

    with monkeypatch.context() as patched:
        patched.setattr(Student, "gradients", broken)
        return trainer.run(), names


def test_a_bad_step_is_skipped_as_if_its_gradient_were_not_there(
    monkeypatch: pytest.MonkeyPatch, student_folder: Path, dataset: Path, tmp_path: Path
):
    run_with_a_bad_step(monkeypatch, student_folder, dataset, tmp_path / "out", {3}, anomaly__action="skip")
    entries = [entry for entry in log_of(tmp_path / "out") if "loss" in entry]
    assert [("anomaly" in entry) for entry in entries] == [n == 3 for n in range(8)]
    bad = entries[3]
    assert (bad["ce"], bad["grad_norm"]) == (None, None), "JSON has no word for NaN"
    assert bad["anomaly"]["skipped"]
    assert bad["anomaly"]["rows"][0]["ce"] is None
    assert all(np.isfinite(each["ce"]) for each in bad["anomaly"]["rows"][1:])
    rates = [entry["lr"] for entry in entries]
    assert rates == sorted(rates, reverse=True), "the schedule goes on: a rate belongs to a step's number"
    assert all(weight.isfinite().all() for weight in weights_of(tmp_path / "out/model").values())


def test_a_bad_step_stops_the_run_and_leaves_what_was_before(
    monkeypatch: pytest.MonkeyPatch, student_folder: Path, dataset: Path, tmp_path: Path
):
    with pytest.raises(NonFiniteError, match=r"step 5: .*its worst rows: chat-\d+ \(ce nan"):
        run_with_a_bad_step(monkeypatch, student_folder, dataset, tmp_path / "out", {4})
    [checkpoint] = (tmp_path / "out/checkpoints").iterdir()
    assert checkpoint.name == "step-00000004"
    run = settings(
        student_folder, tmp_path / "out", data__dataset=str(dataset), steps=8, rows_per_step=4, held_out__fraction=0.2
    )
    Trainer(run).run()
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == list(range(1, 9))


def test_a_step_without_memory_says_what_to_lower_and_leaves_what_was_before(
    monkeypatch: pytest.MonkeyPatch, student_folder: Path, dataset: Path, tmp_path: Path
):
    run = settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=6, batch_tokens=300)
    whole = Student.gradients

    def starved(self: Student, passes: Any, *arguments: Any, **named: Any) -> Any:
        if len(log_of(tmp_path / "out")) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return whole(self, passes, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Student, "gradients", starved)
        with pytest.raises(NoMemoryError, match=r"step 5: cpu has no memory left, at a peak of .*: tried") as caught:
            Trainer(run).run()
    assert "lower batch_tokens" in str(caught.value)
    assert (tmp_path / "out/checkpoints/step-00000004/complete.json").is_file()
    Trainer(run.model_copy(update={"batch_tokens": 150})).run()
    assert [entry["step"] for entry in log_of(tmp_path / "out")] == list(range(1, 7))


def test_half_a_step_is_not_saved_as_the_state_before_it(
    monkeypatch: pytest.MonkeyPatch, student_folder: Path, dataset: Path, tmp_path: Path
):
    run = settings(student_folder, tmp_path / "out", data__dataset=str(dataset), steps=6, checkpoint__every_steps=2)
    trainer = Trainer(run)
    whole, steps = trainer._trained.optimizer.step, list[int]()

    def starved() -> None:
        steps.append(1)
        whole()
        if len(steps) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(trainer._trained.optimizer, "step", starved)
    with pytest.raises(NoMemoryError, match="step 4"):
        trainer.run()
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000002"]


def test_the_row_that_is_named_is_the_row_that_is_bad(student_folder: Path, dataset: Path, tmp_path: Path):
    """Whatever pass it stands in, and wherever in it."""
    trainer = Trainer(settings(student_folder, tmp_path / "out", data__dataset=str(dataset), batch_tokens=150))
    with closing(trainer.data.batches(0, 1)) as batches:
        batch: Batch = next(batches)
    _, measures = trainer.student.gradients(batch.passes, trainer.objective, denominator=1.0)
    assert len(batch.passes) > 1
    opened = LogitDataset.open(dataset)
    rows = {row.sample_id: row for n in range(len(opened.manifest.shards)) for row in opened.read_shard(n)}
    for place, (of, each) in enumerate(zip(batch.passes, measures, strict=True)):
        begin = sum(of.positions[:-1])
        assert of.positions[-1] == rows[batch.sample_ids[of.rows[-1]]].num_positions
        saved = each.values_MN.clone()
        each.values_MN[0, begin] = torch.nan
        named = trainer._stepper.worst_rows(batch, measures)
        assert named[0].sample_id == batch.sample_ids[of.rows[-1]], place
        assert math.isnan(named[0].ce)
        assert all(math.isfinite(row.ce) for row in named[1:])
        each.values_MN.copy_(saved)
