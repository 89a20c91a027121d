"""The fused loss against plain torch: value and both gradients, everywhere the numbers are hard.

The references are written from the definitions, in fp64, on whole [N, V] tensors, with autograd.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.models import OutputHead
from student_train.fused_linear import fused_linear_loss
from student_train.loss import Targets
from student_train.objective import Objective

N, D, V = 11, 7, 53


def targets_from(
    teacher_logits_NV: Tensor, counts: list[int], temperature: float, *, weights: Tensor | None = None
) -> tuple[Targets, Tensor]:
    """Keep the `counts[n]` most probable ids of every row; returns what is kept as a mask [N, V] as well."""
    logp_NV = torch.log_softmax(teacher_logits_NV.double(), dim=1)
    width = max(counts)
    ids_NK = logp_NV.topk(width, dim=1).indices
    is_kept_NK = torch.arange(width)[None] < torch.tensor(counts)[:, None]
    kept_NV = torch.zeros_like(logp_NV, dtype=torch.bool)
    for n in range(len(counts)):
        kept_NV[n, ids_NK[n, : counts[n]]] = True
    kept_logp_NK = logp_NV.gather(1, ids_NK).masked_fill(~is_kept_NK, 0.0)
    tail_N = torch.logsumexp((logp_NV / temperature).masked_fill(kept_NV, -torch.inf), dim=1)
    return Targets(
        label_N=torch.arange(len(counts)) * 5 % logp_NV.shape[1],
        weight_N=torch.ones(len(counts)) if weights is None else weights,
        kept_ids_NK=torch.where(is_kept_NK, ids_NK, ids_NK[:, :1]),
        kept_logp_NK=kept_logp_NK.float(),
        is_kept_NK=is_kept_NK,
        tail_logsum_N=tail_N.float(),
        entropy_N=-(logp_NV.exp() * logp_NV).sum(dim=1).float(),
    ), kept_NV


def bucket_kl(teacher_logits_NV: Tensor, logits_NV: Tensor, kept_NV: Tensor, temperature: float) -> Tensor:
    """KL over kept ids and one lump, by autograd on full fp64 tensors; log of the lump by logsumexp."""
    log_p, log_q = (torch.log_softmax(z / temperature, dim=1) for z in (teacher_logits_NV.double(), logits_NV))
    log_p_tail, log_q_tail = (torch.logsumexp(x.masked_fill(kept_NV, -torch.inf), dim=1) for x in (log_p, log_q))
    on_kept = (log_p.exp() * (log_p - log_q)).masked_fill(~kept_NV, 0.0).sum(dim=1)
    has_tail = ~kept_NV.all(dim=1)
    tail = torch.zeros_like(on_kept)
    tail[has_tail] = (log_p_tail.exp() * (log_p_tail - log_q_tail))[has_tail]
    return on_kept + tail


def student(*, dtype: torch.dtype = torch.float32, bias: bool = False, scale: float = 1.0, **head: Any) -> Any:
    torch.manual_seed(5)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    return hidden, OutputHead(weight_VD=weight, bias_V=bias_V, softcap=head.get("softcap"), scale=scale)


def reference_logits(hidden_ND: Tensor, head: OutputHead) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().double().requires_grad_() for t in (hidden_ND, head.weight_VD, head.bias_V) if t is not None]
    logits = F.linear(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None) * head.scale
    return (head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits), leaves


def assert_same(
    hidden: Tensor, head: OutputHead, targets: Targets, kept_NV: Tensor, teacher: Tensor, **settings: Any
) -> None:
    objective = Objective(kd_weight=settings.get("kd_weight", 0.7), temperature=settings.get("temperature", 1.0))
    w, T = objective.kd_weight, objective.temperature
    denominator = float(targets.weight_N.sum())
    sums = fused_linear_loss(
        hidden, head, targets, objective, denominator=denominator, chunk_positions=settings.get("chunk_positions", 4)
    )
    sums.total.backward()
    logits, leaves = reference_logits(hidden, head)
    ce = F.cross_entropy(logits, targets.label_N, reduction="none")
    kl = bucket_kl(teacher, logits, kept_NV, T)
    c = targets.weight_N.double()
    expected = (c * ((1 - w) * ce + w * T**2 * kl)).sum() / denominator
    expected.backward()
    assert float(sums.total.detach()) == pytest.approx(float(expected.detach()), rel=2e-5, abs=1e-6)
    assert float(sums.ce) == pytest.approx(float((c * ce).sum().detach()), rel=2e-5)
    assert float(sums.kd) == pytest.approx(float((c * kl).sum().detach()), rel=2e-5, abs=1e-6)
    ours = [t.grad for t in (hidden, head.weight_VD, head.bias_V) if t is not None]
    for got, leaf in zip(ours, leaves, strict=True):
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_with_everything_kept_it_is_torchs_dense_kl(temperature: float):
    """And the T² is in the gradient, not only in the reported value."""
    torch.manual_seed(0)
    teacher = torch.randn(N, V) * 3
    targets, _ = targets_from(teacher, [V] * N, temperature)
    hidden, head = student()
    objective = Objective(kd_weight=1.0, temperature=temperature)
    fused_linear_loss(hidden, head, targets, objective, denominator=N, chunk_positions=3).total.backward()
    logits, (leaf_hidden, leaf_weight) = reference_logits(hidden, head)
    log_q, p = torch.log_softmax(logits / temperature, 1), torch.softmax(teacher.double() / temperature, 1)
    (F.kl_div(log_q, p, reduction="batchmean") * temperature**2).backward()
    torch.testing.assert_close(hidden.grad.double(), leaf_hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.weight_VD.grad.double(), leaf_weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("counts", [[1] * N, [10] * N, [V] * N, [1, V, 3, 10, 2, 52, 5, 1, 7, 53, 20]])
def test_value_and_gradients_equal_autograd_over_the_outcomes(temperature: float, counts: list[int]):
    torch.manual_seed(1)
    teacher = torch.randn(N, V) * 4
    targets, kept_NV = targets_from(teacher, counts, temperature, weights=torch.rand(N) + 0.1)
    assert_same(*student(), targets, kept_NV, teacher, temperature=temperature)


@pytest.mark.parametrize("head", [{"bias": True}, {"softcap": 2.0}, {"scale": 0.3}, {"bias": True, "softcap": 5.0}])
def test_heads_with_bias_softcap_and_scale(head: dict[str, Any]):
    torch.manual_seed(2)
    teacher = torch.randn(N, V) * 4
    targets, kept_NV = targets_from(teacher, [9] * N, 2.0)
    assert_same(*student(**head), targets, kept_NV, teacher, temperature=2.0)


@pytest.mark.parametrize("chunk_positions", [1, 4, 11, 1000])
def test_the_chunk_changes_nothing(chunk_positions: int):
    torch.manual_seed(3)
    teacher = torch.randn(N, V) * 4
    targets, kept_NV = targets_from(teacher, [6] * N, 1.0)
    assert_same(*student(), targets, kept_NV, teacher, chunk_positions=chunk_positions)


@pytest.mark.parametrize("log_q", [-4.0, -16.0, -25.0, -40.0, -60.0])
def test_the_students_tail_keeps_its_gradient_down_to_nothing(log_q: float):
    """The student puts all but e^log_q on the kept ids; the teacher's tail is real.  1 − Σ q would be NaN or 0."""
    teacher = torch.zeros(1, V)
    teacher[0, :3] = 3.0
    targets, kept_NV = targets_from(teacher, [3], 1.0)
    logits_1V = torch.full((1, V), log_q - torch.log(torch.tensor(V - 3.0)).item())
    logits_1V[0, :3] = torch.log(torch.tensor(1 / 3))
    assert_gradient_of_logits(logits_1V, targets, kept_NV, teacher)


@pytest.mark.parametrize("log_q", [-16.0, -40.0])
def test_a_kept_id_that_the_student_rules_out_keeps_its_gradient(log_q: float):
    teacher = torch.zeros(1, V)
    teacher[0, :3] = 3.0
    targets, kept_NV = targets_from(teacher, [3], 1.0)
    logits_1V = torch.zeros(1, V)
    logits_1V[0, 0] = log_q
    logits_1V[0, 9] = 30.0  # certain of something else, off the kept ids
    assert_gradient_of_logits(logits_1V, targets, kept_NV, teacher)


@pytest.mark.parametrize("log_tail", [-27.6, -60.0, -100.0])
def test_a_tiny_teacher_tail_is_taken_at_its_word(log_tail: float):
    teacher = torch.full((1, V), log_tail)
    teacher[0, :4] = 0.0
    targets, kept_NV = targets_from(teacher, [4], 1.0)
    torch.manual_seed(4)
    assert_gradient_of_logits(torch.randn(1, V), targets, kept_NV, teacher)


def assert_gradient_of_logits(logits_NV: Tensor, targets: Targets, kept_NV: Tensor, teacher: Tensor) -> None:
    """With the identity as output matrix, hidden states are the logits."""
    hidden = logits_NV.clone().requires_grad_()
    head = OutputHead(weight_VD=torch.eye(V), bias_V=None, softcap=None, scale=1.0)
    sums = fused_linear_loss(hidden, head, targets, Objective(kd_weight=1.0), denominator=1.0, chunk_positions=8)
    sums.total.backward()
    leaf = logits_NV.double().requires_grad_()
    expected = bucket_kl(teacher, leaf, kept_NV, 1.0).sum()
    expected.backward()
    assert float(sums.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(hidden.grad.double(), leaf.grad, rtol=1e-4, atol=1e-9)


def test_the_bucket_is_a_lower_bound_of_the_full_kl():
    torch.manual_seed(6)
    teacher, logits = torch.randn(N, V) * 3, torch.randn(N, V) * 3
    full = (torch.softmax(teacher, 1) * (torch.log_softmax(teacher, 1) - torch.log_softmax(logits, 1))).sum()
    head = OutputHead(weight_VD=torch.eye(V), bias_V=None, softcap=None, scale=1.0)
    kls = []
    for k in (1, 4, 16, V):
        targets, _ = targets_from(teacher, [k] * N, 1.0)
        kls.append(
            float(
                fused_linear_loss(logits, head, targets, Objective(kd_weight=1.0), denominator=1, chunk_positions=8).kd
            )
        )
    assert kls == sorted(kls)
    assert kls[-1] == pytest.approx(float(full), rel=1e-5)


def test_a_position_of_weight_zero_has_exactly_no_influence():
    torch.manual_seed(7)
    teacher = torch.randn(N, V)
    weights = torch.ones(N)
    weights[3] = 0.0
    targets, _ = targets_from(teacher, [5] * N, 1.0, weights=weights)
    hidden, head = student()
    fused_linear_loss(
        hidden, head, targets, Objective(kd_weight=0.5), denominator=N - 1.0, chunk_positions=4
    ).total.backward()
    assert not hidden.grad[3].any()
    assert hidden.grad[2].any()


def test_what_padding_of_the_kept_ids_holds_does_not_matter():
    torch.manual_seed(8)
    teacher = torch.randn(N, V)
    targets, _ = targets_from(teacher, [2, 9] * 5 + [4], 1.0)
    logp = targets.kept_logp_NK.clone()
    logp[~targets.is_kept_NK] = -3.0
    grads = []
    for changed in (targets, Targets(**{**vars(targets), "kept_logp_NK": logp})):
        hidden, head = student()
        fused_linear_loss(
            hidden, head, changed, Objective(kd_weight=1.0), denominator=N, chunk_positions=4
        ).total.backward()
        grads.append((hidden.grad, head.weight_VD.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_without_a_teacher_it_is_cross_entropy():
    hidden, head = student()
    targets = Targets(
        label_N=torch.arange(N),
        weight_N=torch.ones(N),
        kept_ids_NK=torch.zeros(N, 0, dtype=torch.long),
        kept_logp_NK=torch.zeros(N, 0),
        is_kept_NK=torch.zeros(N, 0, dtype=torch.bool),
        tail_logsum_N=torch.zeros(N),
        entropy_N=torch.zeros(N),
    )
    sums = fused_linear_loss(hidden, head, targets, Objective(kd_weight=0.0), denominator=N, chunk_positions=4)
    sums.total.backward()
    logits, (leaf_hidden, leaf_weight) = reference_logits(hidden, head)
    F.cross_entropy(logits, targets.label_N).backward()
    torch.testing.assert_close(hidden.grad.double(), leaf_hidden.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.weight_VD.grad.double(), leaf_weight.grad, rtol=1e-4, atol=1e-7)
    assert float(sums.kd) == 0.0


def test_a_frozen_output_matrix_gets_no_gradient():
    hidden, head = student()
    head.weight_VD.requires_grad_(False)
    targets, _ = targets_from(torch.randn(N, V), [5] * N, 1.0)
    fused_linear_loss(
        hidden, head, targets, Objective(kd_weight=1.0), denominator=N, chunk_positions=4
    ).total.backward()
    assert head.weight_VD.grad is None
    assert hidden.grad.any()


def test_no_positions_at_all_is_zero_and_not_nan():
    head = OutputHead(weight_VD=torch.randn(V, D, requires_grad=True), bias_V=None, softcap=None, scale=1.0)
    hidden = torch.zeros(0, D, requires_grad=True)
    targets, _ = targets_from(torch.randn(1, V), [5], 1.0)
    empty = targets[:0]
    sums = fused_linear_loss(hidden, head, empty, Objective(kd_weight=1.0), denominator=1.0, chunk_positions=4)
    sums.total.backward()
    assert float(sums.total.detach()) == 0.0
    assert not head.weight_VD.grad.any()


def test_bfloat16_loses_no_more_than_plain_torch_does():
    """Error budget: the truth is fp64; plain torch in bf16 sets what may be lost.

    Plus half of it: the output matrix's gradient is rounded once a chunk on its way into the fp32 sum.
    """
    torch.manual_seed(9)
    teacher = torch.randn(N, V) * 4
    targets, kept_NV = targets_from(teacher, [8] * N, 1.0)
    hidden, head = student(dtype=torch.bfloat16)
    fused_linear_loss(
        hidden, head, targets, Objective(kd_weight=1.0), denominator=N, chunk_positions=4
    ).total.backward()
    logits, (leaf_hidden, leaf_weight) = reference_logits(hidden, head)
    (bucket_kl(teacher, logits, kept_NV, 1.0).sum() / N).backward()
    plain_hidden = hidden.detach().clone().requires_grad_()
    plain_weight = head.weight_VD.detach().clone().requires_grad_()
    (bucket_kl(teacher, F.linear(plain_hidden, plain_weight).float(), kept_NV, 1.0).sum() / N).backward()
    for ours, plain, true in ((hidden, plain_hidden, leaf_hidden), (head.weight_VD, plain_weight, leaf_weight)):
        budget = (plain.grad.double() - true.grad).norm()
        assert (ours.grad.double() - true.grad).norm() <= 1.5 * budget
