"""Runs that are interrupted and go on: the same losses, bit for bit, and every step once in the log."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import DamagedDataError, MismatchError, OutputError
from student_train.config import TrainSettings
from student_train.data import Batch, TrainingData
from student_train.evaluate import evaluate
from student_train.evaluation import Evaluation
from student_train.student import Student
from student_train.train import Trainer, finished_run
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.student_train.test_train import log_of, settings, weights_of
from tests.tiny import make_model, make_tokenizer

STEPS = 14


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that random numbers have a say."""
    folder = make_model(tmp_path_factory.mktemp("student"), num_hidden_layers=1, attention_dropout=0.3)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    chats = write_jsonl(folder / "chats.jsonl", chat_records(30))
    return sealed_dump(dump_settings(teacher_folder, chats, folder / "out")).folder


TIMES = ("elapsed_s", "tokens_per_s", "mfu", "wait", "peak_bytes")


def run_settings(student: Path, dataset: Path, output: Path, **changes: Any) -> TrainSettings:
    fixed: dict[str, Any] = {
        "data__dataset": str(dataset),
        "held_out__fraction": 0.2,
        "evaluate_every": 5,
        "steps": STEPS,
        "rows_per_step": 5,
        "optimizer__warmup_steps": 2,
        "optimizer__weight_decay": 0.1,
        "shuffle_blocks": 2,
        "deterministic": True,
    }
    return settings(student, output, **fixed | changes)


@pytest.fixture(scope="module")
def uninterrupted(student: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    Trainer(run_settings(student, dataset, output)).run()
    return output


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k not in TIMES} for e in entries]


def require_same(output: Path, other: Path) -> None:
    """The log, number by number, and every weight."""
    assert without_times(log_of(output)) == without_times(log_of(other))
    one, two = weights_of(output / "model"), weights_of(other / "model")
    assert all(torch.equal(one[name], two[name]) for name in one)


def stop_when(monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str], is_it: Callable[..., bool]) -> None:
    """Send this process SIGTERM when a method is called for the n-th time, and go on."""
    whole = getattr(*place)

    def stopped(*arguments: Any, **named: Any) -> Any:
        if is_it(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **named)

    monkeypatch.setattr(*place, stopped)


def interrupt_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def is_it(_: Trainer, batch: Batch) -> bool:
        return batch.step == step

    stop_when(monkeypatch, (Trainer, "_step"), is_it)


def test_interrupted_at_every_step_a_run_ends_where_one_that_was_left_alone_ends(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_settings(student, dataset, tmp_path / "out", loader_threads=3)
    for step in range(STEPS):
        with monkeypatch.context() as patched:
            interrupt_in_step(patched, step)
            with pytest.raises(KeyboardInterrupt):
                Trainer(run).run()
        assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == list(range(1, step + 2))
        assert finished_run(run) is None
    Trainer(run).run()
    require_same(tmp_path / "out", uninterrupted)
    assert len(list((tmp_path / "out/checkpoints").iterdir())) == 2


def test_interrupted_while_it_evaluates_it_evaluates_again(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At the start, when there is nothing to save, in the middle, and at the end."""
    run = run_settings(student, dataset, tmp_path / "out")
    with monkeypatch.context() as patched:
        stop_when(patched, (Trainer, "_evaluate"), lambda _, step, *__: step == 0)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    assert not (tmp_path / "out/checkpoints").exists()
    with monkeypatch.context() as patched:
        measured: list[None] = []
        stop_when(
            patched,
            (Student, "measured"),
            lambda *_: measured.append(None) or len(measured) == 3,
        )
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    assert len(measured) == 3, "the third look, at step 10, was broken off"
    assert [e["step"] for e in log_of(tmp_path / "out") if "held_out" in e] == [0, 5]
    with monkeypatch.context() as patched:
        stop_when(patched, (Trainer, "_evaluate"), lambda _, step, *__: step == STEPS)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    assert not (tmp_path / "out/model").exists()
    Trainer(run).run()
    require_same(tmp_path / "out", uninterrupted)


def run_killed_in(run: TrainSettings, step: int) -> bool:
    """In a process that is killed with SIGKILL in that step; False where it never came to it, and ended."""
    pid = os.fork()
    if pid == 0:
        whole = Trainer._step

        def killed(trainer: Trainer, batch: Batch) -> Any:
            if batch.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(trainer, batch)

        code = 1
        try:
            Trainer._step = killed
            Trainer(run).run()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_a_run_goes_on_from_its_last_checkpoint(
    seed: int, student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path
):
    """SIGKILL, and with a part of a line in the log; checkpoints come every third step."""
    run = run_settings(student, dataset, tmp_path / "out", checkpoint__every_steps=3)
    chance = random.Random(seed)
    num_killed = 0
    while finished_run(run) is None:
        num_killed += run_killed_in(run, chance.randrange(STEPS + 3))
        if (tmp_path / "out/log.jsonl").exists():
            with (tmp_path / "out/log.jsonl").open("a") as log:
                log.write('{"step": 3, "lo')
    assert num_killed
    log = (tmp_path / "out/log.jsonl").read_text()
    (tmp_path / "out/log.jsonl").write_text(log.removesuffix('{"step": 3, "lo'))
    require_same(tmp_path / "out", uninterrupted)


def test_settings_that_change_no_step_may_change(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Memory and speed: how a step is cut, the number of threads, where rows are packed.  Equal but for rounding."""
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run_settings(student, dataset, tmp_path / "out", student__attention="sdpa")).run()
    changes = {"batch_tokens": 200, "packing": False, "loader_threads": 1, "checkpoint__keep": 1}
    Trainer(run_settings(student, dataset, tmp_path / "out", **changes)).run()
    assert [e["step"] for e in log_of(tmp_path / "out")] == [e["step"] for e in log_of(uninterrupted)]
    assert [e.get("positions") for e in log_of(tmp_path / "out")] == [e.get("positions") for e in log_of(uninterrupted)]


@pytest.fixture
def stopped(student: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run_settings(student, dataset, tmp_path / "out")).run()
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__kd_weight": 0.5}, "another stage: stage.loss.kd_weight was 0.9, now it is 0.5"),
        ({"optimizer__learning_rate": 1e-2}, "another stage: stage.optimizer.learning_rate was 0.001"),
        ({"rows_per_step": 6}, "stage.rows_per_step was 5, now it is 6"),
        ({"seed": 1}, "stage.seed was 0, now it is 1"),
        ({"steps": 20}, "stage.steps was 14, now it is 20"),
        ({"held_out__fraction": 0.1}, "stage.held_out.fraction was 0.2"),
        ({"shuffle_blocks": 3}, "stage.shuffle_blocks was 2, now it is 3"),
    ],
)
def test_another_stage_is_refused(changes: dict[str, Any], message: str, student: Path, dataset: Path, stopped: Path):
    before = (stopped / "config.yaml").read_bytes()
    with pytest.raises(MismatchError, match=rf"{message}(.|\n)*next: undo the change to go on, or give the new run"):
        Trainer(run_settings(student, dataset, stopped, **changes)).run()
    assert (stopped / "config.yaml").read_bytes() == before


def test_other_data_another_model_or_tokenizer_are_refused(
    student: Path, dataset: Path, stopped: Path, teacher_folder: Path, tmp_path: Path
):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(31))
    other = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "other")).folder
    with pytest.raises(MismatchError, match=r"another dataset: dataset\.0\.manifest_sha256"):
        Trainer(run_settings(student, other, stopped)).run()
    retrained = make_model(tmp_path / "retrained", seed=5, num_hidden_layers=1, attention_dropout=0.3)
    make_tokenizer(retrained)
    with pytest.raises(MismatchError, match=r"another model: model\.weights_sha256"):
        Trainer(run_settings(retrained, dataset, stopped)).run()
    state = stopped / "checkpoints/step-00000004/state.json"
    assert json.loads(state.read_text())["identity"]["tokenizer"]


def test_a_release_that_would_take_other_rows_does_not_go_on(
    student: Path, dataset: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TrainingData, "rows_digest", lambda *_: "other rows")
    with pytest.raises(MismatchError, match="step 4 would take other rows here than it took"):
        Trainer(run_settings(student, dataset, stopped)).run()


def test_damage_leaves_a_checkpoint_and_mended_data_the_same_run(student: Path, dataset: Path, tmp_path: Path):
    Trainer(run_settings(student, dataset, tmp_path / "alone", held_out__fraction=0.0)).run()
    run = run_settings(student, dataset, tmp_path / "out", held_out__fraction=0.0)
    trainer = Trainer(run)
    order = trainer.data.stream.order
    first_need = {block: step for step in reversed(range(5)) for _, block in order.step(step).blocks()}
    last_block, needs = max(first_need.items(), key=lambda each: each[1])
    assert needs > 1
    shard = dataset / f"data/part-{last_block:05d}.parquet"  # a stream's blocks are the dataset's shards
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:])
        with pytest.raises(DamagedDataError, match=r"part-0000\d\.parquet: damaged"):
            trainer.run()
    finally:
        shard.write_bytes(whole)
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == list(range(1, needs + 1))
    assert (tmp_path / f"out/checkpoints/step-{needs:08d}/complete.json").is_file()
    Trainer(run).run()
    require_same(tmp_path / "out", tmp_path / "alone")


def test_damage_among_the_held_out_rows_leaves_one_as_well(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, looks = run_settings(student, dataset, tmp_path / "out"), list[int]()

    def damaged(*arguments: Any, **named: Any) -> Any:
        looks.append(1)
        if len(looks) == 2:
            raise DamagedDataError("part-00001: damaged")
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr("student_train.train.evaluate", damaged)
        with pytest.raises(DamagedDataError, match="part-00001: damaged"):
            Trainer(run).run()
    assert (tmp_path / "out/checkpoints/step-00000005/complete.json").is_file()
    Trainer(run).run()
    require_same(tmp_path / "out", uninterrupted)


def test_a_new_run_in_a_folder_that_was_killed_before_its_first_checkpoint_starts_a_new_log(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path
):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.yaml").write_text("of another run")
    (output / "log.jsonl").write_text('{"step": 0, "held_out": {"positions": 1, "ce": 9.0, "kl": 9.0}}\n')
    Trainer(run_settings(student, dataset, output)).run()
    require_same(output, uninterrupted)


def test_a_look_that_cannot_be_written_is_taken_again(
    student: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_settings(student, dataset, tmp_path / "out")
    write, looks = Evaluation.write, list[int]()

    def full(found: Evaluation, path: Path) -> None:
        looks.append(1)
        if len(looks) == 2:
            raise OSError(28, "No space left on device")
        write(found, path)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluation, "write", full)
        with pytest.raises(OSError, match="No space left"):
            Trainer(run).run()
    Trainer(run).run()
    assert Evaluation.read(tmp_path / "out/held_out.json").step == STEPS
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "held_out" in entry][:2] == [0, 5]


def test_a_parameter_that_no_row_uses_is_no_obstacle(
    student: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An expert that nothing was sent to, a tower for pictures: without a gradient there is no optimizer state."""
    run = run_settings(student, dataset, tmp_path / "out")

    def with_spare() -> Trainer:
        trainer = Trainer(run)
        spare = torch.nn.Parameter(torch.ones(3))
        trainer.student.model.register_parameter("spare", spare)
        trainer._trained.optimizer.add_param_group({"params": [spare], "initial_lr": 1e-3})
        trainer._trained.schedule.base_lrs.append(1e-3)
        trainer._trained.schedule.lr_lambdas.append(trainer._trained.schedule.lr_lambdas[0])
        return trainer

    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            with_spare().run()
    assert with_spare().run()["steps"] == STEPS


def test_a_model_that_cannot_be_written_leaves_a_checkpoint_of_the_last_step(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_settings(student, dataset, tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Student, "save", full)
        with pytest.raises(OutputError, match="model cannot be written: No space left"):
            Trainer(run).run()
    assert (tmp_path / f"out/checkpoints/step-{STEPS:08d}/complete.json").is_file()
    result = Trainer(run).run()
    assert result["wait"] <= 1
    require_same(tmp_path / "out", uninterrupted)


def test_a_finished_run_is_the_same_run_with_other_means(student: Path, dataset: Path, uninterrupted: Path):
    means = {"loader_threads": 7, "batch_tokens": 99, "packing": False, "deterministic": False}
    assert finished_run(run_settings(student, dataset, uninterrupted, **means)) is not None
    with pytest.raises(MismatchError, match="was trained with other settings"):
        finished_run(run_settings(student, dataset, uninterrupted, seed=3))


def test_an_error_of_any_kind_while_data_are_awaited_leaves_a_checkpoint(
    student: Path, dataset: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_settings(student, dataset, tmp_path / "out")
    make = TrainingData._batch

    def broken(data: TrainingData, of: Any) -> Batch:
        if of.step == 6:
            raise ValueError("a mistake of ours")
        return make(data, of)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingData, "_batch", broken)
        with pytest.raises(ValueError, match="a mistake of ours"):
            Trainer(run).run()
    assert (tmp_path / "out/checkpoints/step-00000006/complete.json").is_file()
    Trainer(run).run()
    require_same(tmp_path / "out", uninterrupted)
