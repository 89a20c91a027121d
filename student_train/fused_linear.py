"""Output matrix and objective in one: logits live one chunk of positions at a time, never [N, V].

The objective is differentiated by autograd on [n, K] tensors alone.  What it says about the logsumexp off the kept
ids becomes the V-sized part of the gradient in closed form, a scaled softmax off the kept ids:

    dL/dz_v = dL/d(lse_off) · softmax_off(z)_v   off the kept ids
    dL/dz_k = the objective's own derivative     at a kept id;  and likewise, added, at the label

Gradients of hidden states and output matrix are computed chunk by chunk in the forward pass; the backward pass
only scales them.  fp32 from the logits on, whatever the dtype of the weights.

Shapes: N positions, n positions of a chunk, D hidden, V vocabulary, K kept.
Memory: one chunk of n × V floats (two more at T ≠ 1), plus the gradients [N, D] and [V, D];
    twice those while backward hands them on.
Time: one linear cross-entropy plus gathers of N × K.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.models import OutputHead
from student_train.loss import Objective, StudentView, Targets

TINY = torch.finfo(torch.float32).tiny  # the sum is at least 1 (its largest term), or 0 where nothing is off


@dataclass(frozen=True, kw_only=True)
class LossSums:
    """`total` is differentiable; the sums Σ c·CE and Σ c·KL, in nats, are for the log."""

    total: Tensor
    ce: Tensor
    kl: Tensor


def fused_linear_loss(
    hidden_ND: Tensor,
    head: OutputHead,
    targets: Targets,
    objective: Objective,
    *,
    denominator: float,
    chunk_positions: int,
) -> LossSums:
    """The objective over N positions, divided by `denominator` (Σ c over all ranks and accumulation steps)."""
    total, ce, kl = _FusedLinearLoss.apply(
        hidden_ND, head.weight_VD, head.bias_V, head, targets, objective, denominator, chunk_positions
    )
    return LossSums(total=total, ce=ce, kl=kl)


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        targets: Targets,
        objective: Objective,
        denominator: float,
        chunk_positions: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden_ND = torch.zeros_like(hidden_ND) if needs_hidden else None
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        d_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs_bias else None
        sums_3 = torch.zeros(3, device=hidden_ND.device)
        for begin in range(0, len(hidden_ND), chunk_positions):
            rows = slice(begin, begin + chunk_positions)
            hidden_nD = hidden_ND[rows]
            logits_nV = head.logits(hidden_nD)
            # d logits / d (matrix product), while the logits are still whole.
            slope = _head_slope(head, logits_nV)
            chunk_sums_3, d_logits_nV = _chunk(
                logits_nV, targets.chunk(rows), objective, denominator, wants_gradient=any(ctx.needs_input_grad[:3])
            )
            sums_3 += chunk_sums_3
            if d_logits_nV is None:
                continue
            d_logits_nV = d_logits_nV.mul_(slope)
            d_product_nV = d_logits_nV.to(weight_VD.dtype)
            if d_hidden_ND is not None:
                d_hidden_ND[rows] = d_product_nV @ weight_VD
            if d_weight_VD is not None:
                _accumulate(d_weight_VD, d_product_nV, hidden_nD)
            if d_bias_V is not None:
                d_bias_V += d_logits_nV.sum(dim=0)
        ctx.gradients = (d_hidden_ND, d_weight_VD, d_bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, weight_VD.dtype)
        total, ce, kl = (value.clone() for value in sums_3)
        ctx.mark_non_differentiable(ce, kl)
        return total, ce, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else (gradient * grad_outputs[0]).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None, None)


def _chunk(
    logits_nV: Tensor, targets: Targets, objective: Objective, denominator: float, *, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums (total, CE, KL) of a chunk and dL/d logits, computed in place of the logits."""
    temperature = objective.temperature
    kept_nK = logits_nV.gather(1, targets.kept_ids_NK)
    label_n1 = targets.label_N[:, None]
    label_logit_n = logits_nV.gather(1, label_n1).squeeze(1)
    off_nV = _mask_kept(logits_nV, kept_nK, targets)
    is_tempered = temperature != 1.0 and targets.kept_ids_NK.shape[1] > 0
    tempered = _softmax_off(off_nV / temperature) if is_tempered else None
    plain = _softmax_off(off_nV)
    inputs = [kept_nK, label_logit_n, plain.lse_n] + ([tempered.lse_n] if tempered else [])
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(wants_gradient) for tensor in inputs]
        student = StudentView(
            kept_logits_nK=leaves[0], label_logit_n=leaves[1], lse_off_n=leaves[2], tempered_lse_off_n=leaves[-1]
        )
        total_n, ce_n, kl_n = objective.per_position(student, targets)
        total = (targets.weight_N * total_n).sum() / denominator
        ce, kl = (targets.weight_N * ce_n).sum(), (targets.weight_N * kl_n).sum()
    sums_3 = torch.stack([total, ce, kl]).detach()
    if not wants_gradient:
        return sums_3, None
    d_kept_nK, d_label_n, d_off_n, *d_tempered_n = torch.autograd.grad(
        total, leaves, allow_unused=True, materialize_grads=True
    )
    d_logits_nV = plain.scaled_(d_off_n)
    if tempered:
        d_logits_nV += tempered.scaled_(d_tempered_n[0] / temperature)
    # Padding of the kept ids adds zeros, so it may point anywhere.
    d_logits_nV.scatter_add_(1, targets.kept_ids_NK, d_kept_nK)
    d_logits_nV.scatter_add_(1, label_n1, d_label_n[:, None])
    return sums_3, d_logits_nV


def _mask_kept(logits_nV: Tensor, kept_nK: Tensor, targets: Targets) -> Tensor:
    """−inf at the kept ids, in place.  Padding repeats a position's first kept id, where −inf is right as well."""
    if not kept_nK.shape[1]:
        return logits_nV
    has_kept_n1 = targets.is_kept_NK.any(dim=1, keepdim=True)
    return logits_nV.scatter_(1, targets.kept_ids_NK, kept_nK.masked_fill(has_kept_n1, -torch.inf))


@dataclass(frozen=True, kw_only=True)
class _SoftmaxOff:
    """exp(z − shift) [n, V], its sums, and lse = logsumexp(z), off the kept ids."""

    exp_nV: Tensor
    sum_n: Tensor
    lse_n: Tensor

    def scaled_(self, scale_n: Tensor) -> Tensor:
        """scale · softmax, in place; zero where nothing is off."""
        return self.exp_nV.mul_((scale_n / self.sum_n.clamp(min=TINY))[:, None])


def _softmax_off(z_nV: Tensor) -> _SoftmaxOff:
    """In place of z; shifted by the largest that is not kept, so that a tail of any size keeps its digits."""
    largest_n = z_nV.amax(dim=1)
    shift_n = largest_n.masked_fill(torch.isneginf(largest_n), 0.0)
    exp_nV = z_nV.sub_(shift_n[:, None]).exp_()
    sum_n = exp_nV.sum(dim=1)
    return _SoftmaxOff(exp_nV=exp_nV, sum_n=sum_n, lse_n=sum_n.log() + shift_n)


def _head_slope(head: OutputHead, logits_nV: Tensor) -> Tensor | float:
    """d logits / d product: scale, and 1 − (z / softcap)² under a softcap."""
    if head.softcap is None:
        return head.scale
    return head.scale * (1 - (logits_nV / head.softcap) ** 2)


def _accumulate(d_weight_VD: Tensor, d_product_nV: Tensor, hidden_nD: Tensor) -> None:
    """d_weight += d_productᵀ @ hidden in fp32."""
    if d_product_nV.dtype == d_weight_VD.dtype:
        d_weight_VD.addmm_(d_product_nV.T, hidden_nD)
    else:
        d_weight_VD += (d_product_nV.T @ hidden_nD).float()
