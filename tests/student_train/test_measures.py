"""What is measured beside the loss is what plain torch says of the whole distributions."""

import math

import pytest
import torch
from torch import Tensor

from shared.models import OutputHead
from student_train.fused_linear import FusedLoss, _entropy, fused_linear_loss
from student_train.measures import ENTROPY_STRIDE, NAMES, step_numbers
from student_train.objective import Objective
from tests.student_train.references import Lesson, lesson

N, D, V = 37, 8, 53


def taught(kept: int) -> tuple[Tensor, OutputHead, Lesson, Tensor]:
    """Hidden states, head, what a teacher says of them with so many ids kept, and the student's logits in fp64."""
    torch.manual_seed(kept)
    hidden_ND, weight_VD = torch.randn(N, D), torch.randn(V, D)
    head = OutputHead(weight_VD=weight_VD, bias_V=torch.randn(V), softcap=4.0, scale=0.5)
    said = lesson(torch.randn(N, V) * 3, [kept] * N, weight_N=torch.rand(N) + 0.1)
    product_NV = 0.5 * (hidden_ND.double() @ weight_VD.double().T + head.bias_V.double())
    return hidden_ND, head, said, 4.0 * torch.tanh(product_NV / 4.0)


def loss_of(hidden_ND: Tensor, head: OutputHead, said: Lesson, *, detailed: bool) -> FusedLoss:
    return fused_linear_loss(
        hidden_ND, head, said.targets, Objective(kd_weight=0.5), denominator=1.0, chunk_positions=16, detailed=detailed
    )


@pytest.mark.parametrize("kept", [1, 7, V - 1, V])
def test_measures_are_those_of_the_dense_distributions(kept: int):
    hidden_ND, head, said, logits_NV = taught(kept)
    measures = loss_of(hidden_ND, head, said, detailed=True).measures
    log_q_NV = torch.log_softmax(logits_NV, dim=1)
    ids_NK, label_N = said.targets.kept_ids_NK[:, :kept], said.targets.label_N
    teacher_top_N = ids_NK.gather(1, said.targets.kept_logp_NK[:, :kept].argmax(dim=1)[:, None]).squeeze(1)
    top_N = logits_NV.argmax(dim=1)
    expected = {
        "ce": -log_q_NV.gather(1, label_N[:, None]).squeeze(1),
        "kept_mass": said.targets.kept_logp_NK[:, :kept].double().exp().sum(dim=1),
        "student_kept_mass": log_q_NV.exp().gather(1, ids_NK).sum(dim=1),
        "agrees": (top_N == teacher_top_N).double(),
        "teacher_entropy": said.targets.entropy_N.double(),
        "student_entropy": -(log_q_NV.exp() * log_q_NV).sum(dim=1),
        "has_entropy": torch.ones(N),
        "is_right": (top_N == label_N).double(),
        "confidence": log_q_NV.exp().amax(dim=1),
        "student_top": top_N.double(),
    }
    assert set(expected) == set(NAMES) - {"kd"}
    for name, value_N in expected.items():
        torch.testing.assert_close(measures.of(name).double(), value_N.double(), rtol=1e-5, atol=1e-6, msg=name)
    sums = measures.sums().tolist()
    for name, total in zip(NAMES, sums, strict=False):
        assert total == pytest.approx(float((measures.of(name).double() * said.targets.weight_N).sum()), rel=1e-5)
    assert sums[-1] == pytest.approx(float(said.targets.weight_N.sum()))


def test_a_tail_of_nothing_and_a_student_that_is_certain_have_an_entropy_of_0():
    head = OutputHead(weight_VD=torch.eye(V), bias_V=None, softcap=None, scale=1.0)
    hidden = torch.zeros(1, V)
    hidden[0, 3] = 200.0
    said = lesson(torch.randn(1, V), [V])
    values = loss_of(hidden, head, said, detailed=True).measures
    assert values.of("student_entropy").item() == 0.0
    assert values.of("confidence").item() == 1.0
    assert torch.isfinite(values.values_MN).all()


def test_in_training_one_position_in_eight_has_an_entropy_and_their_mean_is_told():
    hidden_ND, head, said, _ = taught(7)
    everywhere = loss_of(hidden_ND, head, said, detailed=True).measures
    some = loss_of(hidden_ND.requires_grad_(), head, said, detailed=False)
    taken = some.measures.of("has_entropy").bool()
    assert taken.sum() == math.ceil(16 / ENTROPY_STRIDE) * 2 + 1
    assert torch.equal(some.measures.of("student_entropy")[taken], everywhere.of("student_entropy")[taken])
    assert not some.measures.values_MN.requires_grad
    told = step_numbers(some.measures.sums().tolist(), Objective(kd_weight=0.5))
    weight_N = said.targets.weight_N * taken
    assert told["student_entropy"] == pytest.approx(
        float((everywhere.of("student_entropy") * weight_N).sum() / weight_N.sum()), rel=1e-5
    )
    assert 0 < told["kept_mass"] < 1


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 13, 16])
def test_rows_of_one_length_have_their_entropy_taken_at_every_place(length: int):
    """Where all replies have two tokens, every eighth position would be the first of one."""
    _, taken_b = _entropy(torch.rand(8192, 3), stride=ENTROPY_STRIDE)
    places = torch.arange(8192)[taken_b.bool()] % length
    shares = torch.bincount(places, minlength=length) / len(places)
    assert taken_b.sum() == 8192 / ENTROPY_STRIDE
    assert shares.min() > 0.5 / length
    assert shares.max() < 1.7 / length


def test_without_a_teacher_nothing_is_told_of_one_and_a_sample_has_no_mass():
    sums = [1.0] * (len(NAMES) + 1)
    assert set(step_numbers(sums, Objective(kd_weight=0.0))) == {"ce", "accuracy", "student_entropy"}
    sampled = step_numbers(sums, Objective(kd_weight=0.5, tail="none"))
    assert "agreement" in sampled
    assert "kept_mass" not in sampled
