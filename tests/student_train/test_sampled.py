"""A sampled teacher estimates forward KL: value and gradient average to the full ones, with the variance claimed.

The sample is drawn by the code that draws it in a dump.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.models import OutputHead
from student_train.collate import make_targets
from student_train.fused_linear import fused_linear_loss
from student_train.objective import Objective
from teacher_dump.keep import Threshold, keep_chunk
from tests.student_train.references import fused, lesson, plain_logits, true_loss
from tests.student_train.test_fused_linear import student, teacher

V = 400
DRAWS = 4000
SAMPLED = Objective(kd_weight=1.0, tail="none")


def sampled_gradients(teacher_V: Tensor, logits_V: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """One position, drawn again and again: values [draws] and gradients of the logits [draws, V]."""
    rule = Threshold(tau=tau, seed=3, always_ids=())
    draws = rule.draws("one", DRAWS)
    kept = keep_chunk(teacher_V.repeat(DRAWS, 1), torch.zeros(DRAWS, dtype=torch.long), rule, [1.0], draws).positions()
    hidden = logits_V.repeat(DRAWS, 1).requires_grad_()
    head = OutputHead(weight_VD=torch.eye(V), bias_V=None, softcap=None, scale=1.0)
    targets = make_targets(np.zeros(DRAWS, np.int64), np.ones(DRAWS), kept, vocab_size=V)
    values = []
    for n in range(0, DRAWS, 500):
        sums = fused_linear_loss(hidden[n : n + 500], head, targets[n : n + 500], SAMPLED, denominator=1.0)
        sums.total.backward()
        values.append(sums.kd)
    return torch.stack(values) / 500, hidden.grad


@pytest.mark.parametrize("tau", [0.2, 0.05, 0.01])
def test_value_and_gradient_average_to_the_full_ones(tau: float):
    generator = torch.Generator().manual_seed(1)
    teacher_V, logits_V = torch.randn(2, V, generator=generator) * 2.5
    log_p, log_q = torch.log_softmax(teacher_V.double(), 0), torch.log_softmax(logits_V.double(), 0)
    values, gradients = sampled_gradients(teacher_V, logits_V, tau)
    full = float((log_p.exp() * (log_p - log_q)).sum())
    assert float(values.mean()) == pytest.approx(full, abs=5 * float(values.std()) / len(values) ** 0.5 + 1e-5)
    true_gradient = log_q.exp() - log_p.exp()
    mean_error = (gradients.double().mean(dim=0) - true_gradient).norm()
    # E‖mean − g‖² = E‖ĝ − g‖² / draws; a bias of any one id would stand above it.
    spread = (gradients.double() - true_gradient).square().sum(dim=1).mean()
    assert mean_error <= 3 * (spread / DRAWS) ** 0.5
    # Σ_{p < τ} p (τ − p), the least that any such sample of this expected size can have; (Σw − 1) q comes on top.
    p = log_p.exp()
    least = float((p * (tau - p).clamp(min=0)).sum())
    assert least * 0.9 <= float(spread) <= least * 1.1 + tau**2


def test_where_nothing_has_to_be_drawn_it_is_the_full_divergence():
    said = lesson(teacher(1), [53] * 11)
    everything = lesson(teacher(1), [], sampled_NV=torch.softmax(said.teacher_NV, dim=1))
    results = []
    for one, objective in ((said, Objective(kd_weight=0.7)), (everything, Objective(kd_weight=0.7, tail="none"))):
        hidden, head = student()
        sums = fused(hidden, head, one, objective)
        sums.total.backward()
        results.append((float(sums.total.detach()), hidden.grad, head.weight_VD.grad))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-6)


def test_weights_are_taken_as_they_are_whatever_they_sum_to():
    """(Σw) q − w: what makes the estimate unbiased is that it is not normalised."""
    generator = torch.Generator().manual_seed(2)
    weights_NV = torch.rand(11, 53, generator=generator) * (torch.rand(11, 53, generator=generator) < 0.2)
    weights_NV[4] = 0.0  # a sample may come out empty
    said = lesson(teacher(1), [], sampled_NV=weights_NV, weight_N=torch.linspace(0.5, 2.0, 11))
    hidden, head = student(bias=True)
    objective = Objective(kd_weight=0.8, tail="none", z_loss=1e-3)
    sums = fused(hidden, head, said, objective)
    sums.total.backward()
    logits, leaves = plain_logits(hidden, head, torch.float64)
    expected, _, kd = true_loss(logits, said, objective)
    expected.backward()
    assert float(sums.kd) == pytest.approx(float(kd.detach()), rel=2e-5)
    for got, leaf in zip((hidden, head.weight_VD, head.bias_V), leaves, strict=True):
        torch.testing.assert_close(got.grad.double(), leaf.grad, rtol=1e-4, atol=1e-6)
