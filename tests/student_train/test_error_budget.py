"""Error budgets: the truth is fp64, and plain torch in the same dtype sets what may be lost.

Plain torch is what a trainer without a fused loss computes: logits of all positions in the model's dtype, upcast to
fp32 as transformers does, the formula of the loss, autograd.  Ours may lose no more, in value and in both gradients,
plus a tolerance that is stated here.  As in the tests of apple/ml-cross-entropy.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.models import OutputHead
from student_train.objective import Objective
from tests.student_train.references import fused, lesson, plain_logits, true_loss
from tests.student_train.test_fused_linear import OBJECTIVES

N, D, V = 61, 96, 1031
TOLERANCE = {
    # Times the budget, plus a share of the truth's own norm.
    torch.float32: (1.0, 1e-6),
    # The output matrix's gradient is rounded to bf16 once a chunk on its way into its fp32 sum, here four times; a bias
    # is added behind the rounding of the product, not before it.
    torch.bfloat16: (1.3, 1e-4),
}


def parameters(dtype: torch.dtype, seed: int, **head: Any) -> tuple[Tensor, OutputHead]:
    torch.manual_seed(seed)
    hidden = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (torch.randn(V, D) * 3 / D**0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_() if head.pop("bias", False) else None
    return hidden, OutputHead(weight_VD=weight, bias_V=bias, softcap=head.get("softcap"), scale=head.get("scale", 1.0))


def errors(value: Tensor, gradients: list[Tensor], truth: tuple[Tensor, list[Tensor]]) -> list[tuple[float, float]]:
    """Distance to the truth, and the truth's norm, of the value and of every gradient."""
    pairs = zip([value.detach(), *gradients], [truth[0].detach(), *truth[1]], strict=True)
    return [(float((got.double() - true).norm()), float(true.norm())) for got, true in pairs]


@pytest.mark.parametrize("head", [{}, {"bias": True}, {"softcap": 5.0}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ours_loses_no_more_than_plain_torch(dtype: torch.dtype, name: str, temperature: float, head: dict[str, Any]):
    objective = Objective(kd_weight=0.9, temperature=temperature, **OBJECTIVES[name])
    sums: list[list[float]] = []
    for seed in range(3):
        hidden, output_head = parameters(dtype, seed, **head)
        said = lesson(torch.randn(N, V) * 4, [1 + i % 40 for i in range(N)], temperature=temperature)
        total = fused(hidden, output_head, said, objective, chunk_positions=16).total
        total.backward()
        ours = [x.grad for x in (hidden, output_head.weight_VD, output_head.bias_V) if x is not None]
        found = {}
        for precision in (torch.float64, dtype):
            logits, leaves = plain_logits(hidden, output_head, precision)
            value, _, _ = true_loss(logits, said, objective)
            value.backward()
            found[precision] = (value, [leaf.grad for leaf in leaves])
        truth, plain = found[torch.float64], found[dtype]
        lost, budget = errors(total, ours, truth), errors(plain[0], plain[1], truth)
        sums.append([number for (a, norm), (b, _) in zip(lost, budget, strict=True) for number in (a, b, norm)])
    factor, floor = TOLERANCE[dtype]
    totals = torch.tensor(sums).sum(dim=0).reshape(-1, 3).tolist()
    for what, (lost_sum, budget_sum, norm) in zip(("value", "d hidden", "d weight", "d bias"), totals, strict=False):
        assert lost_sum <= factor * budget_sum + floor * norm, (what, lost_sum / norm, budget_sum / norm)


def test_under_autocast_the_products_are_bf16_and_the_rest_is_not():
    """fp32 weights, bf16 products: the gradients come back in fp32, within the budget of plain torch under autocast."""
    objective, said = Objective(kd_weight=0.9), lesson(torch.randn(N, V) * 4, [20] * N)
    hidden, head = parameters(torch.float32, 0)
    with torch.autocast("cpu", torch.bfloat16):
        total = fused(hidden, head, said, objective, chunk_positions=16).total
    total.backward()
    assert hidden.grad.dtype == head.weight_VD.grad.dtype == torch.float32
    logits, leaves = plain_logits(hidden, head, torch.float64)
    truth, _, _ = true_loss(logits, said, objective)
    truth.backward()
    plain = [x.detach().clone().requires_grad_() for x in (hidden, head.weight_VD)]
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.nn.functional.linear(*plain).float()
    value, _, _ = true_loss(logits, said, objective)
    value.backward()
    for got, other, true in zip((hidden, head.weight_VD), plain, leaves, strict=True):
        budget = float((other.grad.double() - true.grad).norm())
        assert 0.1 * budget < float((got.grad.double() - true.grad).norm()) <= 1.3 * budget
