"""Adapters: what is trained, what is left of it, and that the merged model is the one that was trained."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from shared.errors import ConfigError, MismatchError
from student_train.config import StudentSettings
from student_train.student import Student
from student_train.train import Trainer
from tests.data import chat_records, write_jsonl
from tests.student_train.test_train import log_of, settings, weights_of
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_records(12))


def run_settings(student: Path, chats: Path, output: Path, **changes: Any) -> Any:
    fixed = {
        "data__text": {"files": [str(chats)]},
        "loss__kd_weight": 0,
        "steps": 6,
        "rows_per_step": 4,
        "student__lora": {"rank": 3, "dropout": 0.1},
        "deterministic": True,
    }
    return settings(student, output, **fixed | changes)


def student(folder: Path, **lora: Any) -> Student:
    settings = StudentSettings.model_validate({"model": str(folder), "lora": lora})
    return Student(settings, torch.device("cpu"), batch_tokens=100)


def test_the_model_that_is_left_is_the_one_that_was_trained(student_folder: Path, chats: Path, tmp_path: Path):
    """As peft merges it, and as base and adapter together compute; nothing but adapted matrices has moved."""
    trainer = Trainer(run_settings(student_folder, chats, tmp_path / "out"))
    result = trainer.run()
    assert trainer.student._adapted is not None
    base = transformers.AutoModelForCausalLM.from_pretrained(student_folder)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    ids = torch.arange(20)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(result["model"]).eval()
    with torch.no_grad():
        expected = trainer.student.model.eval()(ids).logits
        for model in (merged, loaded.eval(), loaded.merge_and_unload()):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    before, after = weights_of(student_folder), weights_of(Path(result["model"]))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    assert [entry["grad_norm"] > 0 for entry in log_of(tmp_path / "out") if "loss" in entry] == [True] * 6


def test_a_checkpoint_holds_the_adapters_alone_and_the_run_goes_on_from_it(
    student_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Trainer(run_settings(student_folder, chats, tmp_path / "whole")).run()
    run = run_settings(student_folder, chats, tmp_path / "out", checkpoint__every_steps=3)
    step = Trainer._step

    def stop(trainer: Trainer, batch: Any) -> Any:
        if batch.step == 4:
            raise KeyboardInterrupt
        return step(trainer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            Trainer(run).run()
    [checkpoint] = (tmp_path / "out/checkpoints").iterdir()
    weights = (student_folder / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) < weights / 2
    Trainer(run).run()
    one, other = (weights_of(tmp_path / name / "model") for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "out/model").rename(tmp_path / "aside")
    other_rank = run_settings(student_folder, chats, tmp_path / "out", student__lora={"rank": 4, "dropout": 0.1})
    with pytest.raises(MismatchError, match=r"with another model: model\.lora\.rank was 3, now it is 4"):
        Trainer(other_rank).run()


def test_only_the_layers_that_are_named_get_adapters(student_folder: Path):
    trained = [n for n, p in student(student_folder, modules=["q_proj"]).model.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj.lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["nothing"], "cannot be given these adapters"),
        (["lm_head"], "takes in the output matrix"),
        (["embed_tokens", "q_proj"], r"takes in model\.embed_tokens, which is no linear layer"),
        (["q_proj", "typo_proj"], "has no layer whose name ends in typo_proj"),
    ],
)
def test_adapters_that_cannot_be_are_refused(student_folder: Path, modules: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        student(student_folder, modules=modules)


def test_adapters_of_bfloat16_weights_are_trained_in_fp32(tmp_path: Path, chats: Path):
    folder = make_model(tmp_path / "tied", family="llama_tied")
    make_tokenizer(folder)
    run = run_settings(folder, chats, tmp_path / "out", student__dtype="bfloat16", steps=2)
    trainer = Trainer(run)
    assert {p.dtype for p in trainer.student.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.run()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
