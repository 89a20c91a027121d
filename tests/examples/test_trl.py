"""The example's trainer against `student-train run`: one loss, one gradient, on the very same rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from shared.dataset import LogitDataset
from shared.errors import ForeignTokenizerError, MismatchError
from shared.exchange.exporting import ExportSettings, export_dataset
from shared.logit_shards import cli
from student_train.config import LossSettings, TrainSettings
from student_train.train import Trainer
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.made_datasets import edit_manifest
from tests.tiny import make_model, make_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples/trl"
sys.path.insert(0, str(EXAMPLE))

import distil  # noqa: E402

NUM_ROWS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    text = write_jsonl(folder / "chats.jsonl", chat_records(NUM_ROWS))
    return sealed_dump(dump_settings(teacher_folder, text, folder / "out")).folder


def arguments(output: Path, **changes: Any) -> transformers.TrainingArguments:
    """A single step over all rows, in four parts of unlike numbers of tokens."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return transformers.TrainingArguments(output_dir=str(output), **options | changes)


def trained_by_us(student: Path, dataset: Path, output: Path, loss: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    tree = {
        "student": {"model": str(student)},
        "data": {"dataset": str(dataset)},
        "loss": loss,
        "optimizer": {"learning_rate": 1e-3, "min_lr_ratio": 1.0},
        "steps": 1,
        "rows_per_step": NUM_ROWS,
        "batch_tokens": 600,
        "output": str(output),
    }
    Trainer(TrainSettings.model_validate(tree)).run()
    first = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    return first, transformers.AutoModelForCausalLM.from_pretrained(output / "model").state_dict()


@pytest.mark.parametrize(
    "loss",
    [
        {"kd_weight": 0.9},
        {"kd_weight": 0.7, "temperature": 2.0, "divergence": "jsd"},
        {"kd_weight": 1.0, "tail": "renormalise"},
    ],
    ids=["paper", "jsd at 2", "renormalise"],
)
def test_a_step_is_the_step_of_student_train(loss, student_folder: Path, dataset: Path, tmp_path: Path):
    theirs, weights = trained_by_us(student_folder, dataset, tmp_path / "ours", loss)
    args = arguments(tmp_path / "hf")
    trainer = distil.make_trainer(str(student_folder), str(dataset), args, LossSettings(**loss))
    trainer.train()
    (step, _) = trainer.state.log_history
    assert step["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert step["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=2e-5)


def test_labels_stand_beside_their_own_tokens(student_folder: Path, dataset: Path, tmp_path: Path):
    trainer = distil.make_trainer(str(student_folder), str(dataset), arguments(tmp_path), LossSettings())
    batch = trainer.data_collator([{"row": 0}, {"row": 5}])
    is_label_BL = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_label_BL], batch["input_ids"][is_label_BL])
    for index, line in enumerate(is_label_BL):
        mask = trainer.data_collator.rows[(0, 5)[index]].label_mask_L
        assert line[: len(mask)].tolist() == mask.tolist()


def test_how_rows_are_cut_into_batches_changes_nothing(student_folder: Path, dataset: Path, tmp_path: Path):
    norms = []
    for size in (1, 4, NUM_ROWS):
        args = arguments(
            tmp_path / f"{size}", per_device_train_batch_size=size, gradient_accumulation_steps=NUM_ROWS // size
        )
        trainer = distil.make_trainer(str(student_folder), str(dataset), args, LossSettings())
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_a_student_learns_and_is_measured(student_folder: Path, dataset: Path, tmp_path: Path):
    args = arguments(tmp_path / "hf", num_train_epochs=12, gradient_accumulation_steps=1)
    trainer = distil.make_trainer(str(student_folder), str(dataset), args, LossSettings())
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert after < 0.8 * before


def test_what_does_not_belong_together_is_refused(student_folder: Path, dataset: Path, tmp_path: Path):
    args = arguments(tmp_path / "hf")
    with pytest.raises(MismatchError, match="temperature 3 is not among"):
        distil.make_trainer(str(student_folder), str(dataset), args, LossSettings(temperature=3))
    stranger = make_model(tmp_path / "stranger", seed=3)
    make_tokenizer(stranger, vocab_size=290)
    with pytest.raises(ForeignTokenizerError):
        distil.make_trainer(str(stranger), str(dataset), args, LossSettings())


def test_what_went_out_and_came_in_again_is_trained_on_alike(student_folder: Path, dataset: Path, tmp_path: Path):
    """A token of misalignment, or a tail that is none, would show in the loss of the very first step."""
    file = tmp_path / "kd.parquet"
    export_dataset(LogitDataset.open(dataset), file, ExportSettings(form="axolotl"))
    command = [
        "import", str(file), "--from", "axolotl", "--output", str(tmp_path / "back"), "--teacher", "big",
        "--tokenizer", str(student_folder), "--vocab-size", "307",
    ]  # fmt: skip
    assert CliRunner().invoke(cli, command).exit_code == 0
    losses = []
    for folder in (dataset, tmp_path / "back"):
        args = arguments(tmp_path / folder.name)
        trainer = distil.make_trainer(str(student_folder), str(folder), args, LossSettings())
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_lists_without_a_tail_are_trained_on_renormalised_alone(student_folder: Path, dataset: Path, tmp_path: Path):
    folder = shutil.copytree(dataset, tmp_path / "unknown")
    edit_manifest(folder, lambda tree: tree["keep"].update(tail="unknown"))
    args = arguments(tmp_path / "hf")
    with pytest.raises(MismatchError, match=r"the teacher's tail is not known(.|\n)*tail: renormalise"):
        distil.make_trainer(str(student_folder), str(folder), args, LossSettings())
    assert distil.objective_on(LogitDataset.open(folder), LossSettings(tail="renormalise")).tail == "renormalise"


@pytest.mark.cluster
def test_the_example_runs_as_its_readme_says(student_folder: Path, dataset: Path, tmp_path: Path):
    command = [sys.executable, str(EXAMPLE / "distil.py"), str(student_folder), str(dataset), str(tmp_path / "out")]
    done = subprocess.run([*command, "--epochs", "2"], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
