"""Checkpoints: whole or not there, exact, no pickle in them, and refused where they do not belong."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from shared.errors import DamagedDataError, MismatchError, OutputError
from student_train.checkpoint import Checkpoints, Progress, Trained, seed_step
from student_train.config import OptimizerSettings
from student_train.ranks import Ranks
from student_train.step import make_optimizer
from tests.killed import Steps, killed_at, traced
from tests.tiny import make_model

IDENTITY = {
    "dataset": {"0": {"manifest_sha256": "aa" * 32, "weight": None}},
    "model": {"weights_sha256": "bb" * 32},
    "tokenizer": "cc" * 32,
    "stage": {"loss": {"kd_weight": 0.9}, "steps": 40},
}


@pytest.fixture(scope="module", params=["qwen2", "llama_tied"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), family=request.param)


def trained_for(model_folder: Path, steps: int) -> Trained:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=1e-2, weight_decay=0.1))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 40)
    trained = Trained(model=model, optimizer=optimizer, schedule=schedule)
    train(trained, range(steps))
    return trained


def train(trained: Trained, steps: range) -> None:
    model: Any = trained.model
    for step in steps:
        seed_step(7, step, 0)
        ids = torch.randint(0, 300, (2, 9))
        model(input_ids=ids, labels=ids).loss.backward()
        trained.optimizer.step()
        trained.schedule.step()
        trained.optimizer.zero_grad()


def progress(step: int, **identity: Any) -> Progress:
    return Progress(step=step, seconds=1.5 * step, identity=IDENTITY | identity, rows=f"rows of {step}")


def checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, keep=keep, ranks=Ranks())


def newest(folder: Path) -> Any:
    found = checkpoints(folder).newest()
    assert found is not None
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_goes_on_from_a_checkpoint_is_bit_for_bit_what_never_stopped(model_folder: Path, tmp_path: Path):
    whole = trained_for(model_folder, 9)
    checkpoints(tmp_path).save(progress(4), trained_for(model_folder, 4))
    again = trained_for(model_folder, 0)
    found = newest(tmp_path)
    assert found.progress == progress(4)
    found.restore(again)
    train(again, range(4, 9))
    assert same(again.model, whole.model)
    assert again.schedule.get_last_lr() == whole.schedule.get_last_lr()
    for one, other in zip(again.optimizer.param_groups, whole.optimizer.param_groups, strict=True):
        assert {name: value for name, value in one.items() if name != "params"} == {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in other.items()
            if name != "params"
        }


def test_a_checkpoint_holds_safetensors_and_json_and_nothing_is_unpickled(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoints(tmp_path).save(progress(2), trained_for(model_folder, 2))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    again = trained_for(model_folder, 0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)
    newest(tmp_path).restore(again)
    assert same(again.model, trained_for(model_folder, 2).model)


def test_the_last_so_many_are_kept(model_folder: Path, tmp_path: Path):
    trained = trained_for(model_folder, 1)
    for step in (3, 10, 20, 100):
        checkpoints(tmp_path).save(progress(step), trained)
    assert names(tmp_path) == ["step-00000020", "step-00000100"]
    assert newest(tmp_path).progress.step == 100


def test_steps_are_compared_as_numbers(model_folder: Path, tmp_path: Path):
    trained = trained_for(model_folder, 1)
    for step in (99_999_999, 100_000_000):
        checkpoints(tmp_path).save(progress(step), trained)
    assert newest(tmp_path).progress.step == 100_000_000


@pytest.mark.cluster
def test_killed_at_any_step_of_writing_one_the_newest_is_whole(model_folder: Path, tmp_path: Path):
    """The one before, or the new one; and the next is written as if nothing had happened."""
    start = tmp_path / "start"
    first, second = trained_for(model_folder, 2), trained_for(model_folder, 4)
    checkpoints(start).save(progress(1), first)
    checkpoints(start).save(progress(2), first)
    counted = Steps()
    shutil.copytree(start, tmp_path / "whole")
    with traced(counted):
        checkpoints(tmp_path / "whole").save(progress(4), second)
    assert sum("fsync" in name for name in counted.names) >= 6, "tensors, state, marker, folders"
    seen = set()
    for step in range(1, len(counted.names) + 1):
        folder = tmp_path / f"killed-{step}"
        shutil.copytree(start, folder)
        assert killed_at(step, lambda folder=folder: checkpoints(folder).save(progress(4), second))
        found, again = newest(folder), trained_for(model_folder, 0)
        found.restore(again)
        seen.add(found.progress.step)
        assert same(again.model, second.model if found.progress.step == 4 else first.model), counted.names[step - 1]
        checkpoints(folder).save(progress(4), second)
        assert names(folder) == ["step-00000002", "step-00000004"], counted.names[step - 1]
        assert newest(folder).progress.step == 4
    assert seen == {2, 4}


@pytest.mark.parametrize("what", ["flipped", "cut", "gone", "extra", "no marker", "marker", "empty marker", "state"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_can_be_had(what: str, model_folder: Path, tmp_path: Path):
    for step in (2, 4):
        checkpoints(tmp_path).save(progress(step), trained_for(model_folder, 1))
    folder = tmp_path / "checkpoints/step-00000004"
    tensors = next(folder.glob("*.safetensors"))
    whole = tensors.read_bytes()
    match what:
        case "flipped":
            tensors.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        case "cut":
            tensors.write_bytes(whole[:-100])
        case "gone":
            tensors.unlink()
        case "no marker":
            (folder / "complete.json").unlink()
        case "marker":
            (folder / "complete.json").write_text('{"state.json": 5}')
        case "extra":
            shutil.copy(tensors, folder / "shard-00002-model-00001-of-00001.safetensors")
        case "empty marker":
            (folder / "complete.json").write_text("{}")
        case "state":
            (folder / "state.json").write_text("{}")
    with pytest.raises(
        DamagedDataError, match=r"step-00000004(.|\n)*next: remove \S+step-00000004: the run then goes on"
    ):
        checkpoints(tmp_path).newest()
    shutil.rmtree(folder)
    assert newest(tmp_path).progress.step == 2


def test_a_marker_leads_to_no_file_elsewhere(model_folder: Path, tmp_path: Path):
    checkpoints(tmp_path).save(progress(2), trained_for(model_folder, 1))
    marker = tmp_path / "checkpoints/step-00000002/complete.json"
    marker.write_text(json.dumps({"../../../../../etc/hostname": "0" * 64} | json.loads(marker.read_text())))
    with pytest.raises(DamagedDataError, match=r"hostname is missing, or does not belong there"):
        checkpoints(tmp_path).newest()


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (
            {"tokenizer": "dd" * 32},
            r'another tokenizer: tokenizer was "cccccccccccccccc…, now it is "dddddddddddddddd…',
        ),
        ({"model": {"weights_sha256": "ee" * 32}}, "another model: model.weights_sha256 was"),
        (
            {"dataset": {"0": {"manifest_sha256": "ff" * 32, "weight": None}}},
            "another dataset: dataset.0.manifest_sha256",
        ),
        (
            {"dataset": {**IDENTITY["dataset"], "1": {"manifest_sha256": "ff" * 32}}},
            "another dataset: dataset.1.manifest",
        ),
        ({"stage": {"loss": {"kd_weight": 0.5}, "steps": 30}}, r"loss.kd_weight was 0.9, now it is 0.5 \(and 1 more"),
    ],
)
def test_a_checkpoint_of_anything_else_is_refused(
    identity: dict[str, Any], message: str, model_folder: Path, tmp_path: Path
):
    checkpoints(tmp_path).save(progress(2), trained_for(model_folder, 1))
    newest(tmp_path).require_same(IDENTITY)
    with pytest.raises(MismatchError, match=rf"{message}(.|\n)*next: undo the change"):
        newest(tmp_path).require_same(IDENTITY | identity)


def test_tensors_of_another_shape_are_refused(model_folder: Path, tmp_path: Path):
    checkpoints(tmp_path).save(progress(2), trained_for(model_folder, 1))
    other = trained_for(make_model(tmp_path / "wider", hidden_size=48), 0)
    with pytest.raises(DamagedDataError, match="the tensors are not those of this model"):
        newest(tmp_path).restore(other)


@pytest.mark.parametrize("where", ["tensors", "others"])
def test_where_there_is_no_room_the_earlier_ones_stay(
    where: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What goes wrong with tensors comes as an exception of torch's own that is no Exception."""
    trained = trained_for(model_folder, 1)
    checkpoints(tmp_path).save(progress(2), trained)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", full)
    else:
        monkeypatch.setattr("student_train.checkpoint.sync_tree", full)
    with pytest.raises(OutputError, match=r"step-00000004 cannot be written: No space left(.|\n)*make room"):
        checkpoints(tmp_path).save(progress(4), trained)
    monkeypatch.undo()
    assert newest(tmp_path).progress.step == 2
    checkpoints(tmp_path).save(progress(4), trained)
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_an_old_one_that_cannot_be_removed_is_no_reason_to_stop(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    trained = trained_for(model_folder, 1)
    for step in (2, 4):
        checkpoints(tmp_path).save(progress(step), trained)

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("student_train.checkpoint.shutil.rmtree", lambda path, **o: busy() if not o else None)
    checkpoints(tmp_path).save(progress(6), trained)
    assert newest(tmp_path).progress.step == 6
    assert "an old checkpoint cannot be removed" in caplog.text


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path):
    assert checkpoints(tmp_path).newest() is None


def test_every_step_and_rank_draws_numbers_of_its_own():
    drawn = set()
    for seed, step, rank in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (0, 10, 0), (0, 1, 0)):
        seed_step(seed, step, rank)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 5
