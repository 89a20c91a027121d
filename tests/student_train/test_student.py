"""Ways to compute the same student: checkpointed layers, compiled ones, products in bfloat16."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import MismatchError
from student_train.config import StudentSettings, TrainSettings
from student_train.objective import Objective
from student_train.ranks import Ranks
from student_train.student import Student
from tests.shared.made_rows import V, random_rows
from tests.tiny import make_model, make_tokenizer

OBJECTIVE = Objective(kd_weight=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("student"), vocab_size=V)
    make_tokenizer(folder)
    return folder


def gradients(folder: Path, **changes: Any) -> tuple[Student, list[torch.Tensor]]:
    settings = StudentSettings.model_validate({"model": str(folder)} | changes)
    student = Student(settings, torch.device("cpu"), batch_tokens=64)
    rows = random_rows(0, 5)
    maker = student.pass_maker(OBJECTIVE, longest_row=max(row.num_tokens for row in rows), ranks=Ranks())
    student.gradients(maker.make(rows)[0], OBJECTIVE, denominator=30.0)
    return student, [parameter.grad for parameter in student.model.parameters() if parameter.grad is not None]


def distance(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    one, other = (torch.cat([each.float().flatten() for each in of]) for of in (got, expected))
    return float((one - other).norm() / other.norm())


def test_layers_that_are_computed_again_give_the_same_bits(folder: Path):
    student, got = gradients(folder, gradient_checkpointing=True)
    assert student.model.is_gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(got, gradients(folder)[1], strict=True))


def test_products_in_bfloat16_leave_weights_and_gradients_in_fp32(folder: Path):
    student, got = gradients(folder, compute_dtype="bfloat16")
    assert {each.dtype for each in got} == {p.dtype for p in student.model.parameters()} == {torch.float32}
    assert 1e-4 < distance(got, gradients(folder)[1]) < 3e-2
    assert student.identity()["model"]["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_layers_are_compiled_once_and_give_the_same_gradient(
    backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    _, got = gradients(folder, compile=True)
    assert counters["stats"]["unique_graphs"] == 1, "two layers, several passes, one shape"
    assert distance(got, gradients(folder, attention="sdpa")[1]) < 1e-5


def test_a_model_that_cannot_be_packed_is_not_compiled_for_every_shape(tmp_path: Path):
    make_tokenizer(
        make_model(
            tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            max_position_embeddings=64,
        )
    )  # fmt: skip
    with pytest.raises(MismatchError, match=r"student\.compile: Qwen2ForCausalLM cannot be packed"):
        Student(StudentSettings(model=str(tmp_path), compile=True), torch.device("cpu"), batch_tokens=64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"model": "m", "compile": True}, "static_shapes": False}, "student.compile needs static_shapes"),
        ({"student": {"model": "m", "compile": True}, "packing": False}, "needs packing"),
        ({"student": {"model": "m", "dtype": "bfloat16", "compute_dtype": "float32"}}, "more digits than there are"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        TrainSettings.model_validate({"data": {"dataset": "d"}, "output": "o", "steps": 1} | changes)
