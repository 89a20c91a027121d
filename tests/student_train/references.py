"""The losses by their definitions, in fp64, on whole [N, V] tensors, with autograd: what the fused one must equal.

Written from the formulas in `student_train/LOSSES.md` and sharing no line with the code under test.

Shapes: N positions, V vocabulary, B outcomes: the V ids, of which only the kept ones are outcomes, and the tail.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.models import OutputHead
from shared.rows import Positions
from student_train.collate import make_targets
from student_train.fused_linear import FusedLoss, fused_linear_loss
from student_train.loss import Targets
from student_train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a teacher said, in full, and what of it was kept."""

    teacher_NV: Tensor
    """Logits, fp64."""
    kept_NV: Tensor
    weights_NV: Tensor
    """p, or the weights of a sample; 0 where not kept."""
    label_N: Tensor
    weight_N: Tensor
    targets: Targets

    @property
    def denominator(self) -> float:
        return float(self.weight_N.sum())


def lesson(
    teacher_NV: Tensor,
    kept: list[int] | Tensor,
    *,
    temperature: float = 1.0,
    weight_N: Tensor | None = None,
    sampled_NV: Tensor | None = None,
) -> Lesson:
    """Keeps the so many most probable ids of every position, or those of a mask; or a sample with given weights."""
    teacher_NV = teacher_NV.double()
    num_positions, vocab_size = teacher_NV.shape
    log_p_NV = torch.log_softmax(teacher_NV, dim=1)
    if sampled_NV is not None:
        kept_NV = sampled_NV > 0
    elif isinstance(kept, Tensor):
        kept_NV = kept
    else:
        rank_NV = log_p_NV.argsort(dim=1, descending=True).argsort(dim=1)
        kept_NV = rank_NV < torch.tensor(kept)[:, None]
    log_weights_NV = log_p_NV if sampled_NV is None else sampled_NV.double().log()
    tail_N = torch.logsumexp((log_p_NV / temperature).masked_fill(kept_NV, -torch.inf), dim=1)
    label_N = torch.arange(num_positions) * 5 % vocab_size
    weight_N = torch.ones(num_positions) if weight_N is None else weight_N
    has_tails = sampled_NV is None
    teacher = Positions(
        kept_counts_P=kept_NV.sum(dim=1).numpy().astype(np.int32),
        kept_ids_E=kept_NV.nonzero()[:, 1].numpy().astype(np.int32),
        kept_logp_E=log_weights_NV[kept_NV].float().numpy(),
        realised_logp_P=np.zeros(num_positions, np.float32),
        entropy_P=-(log_p_NV.exp() * log_p_NV).sum(dim=1).float().numpy(),
        tail_logsum_PT=tail_N.float().numpy()[:, None][:, : int(has_tails)],
    )
    return Lesson(
        teacher_NV=teacher_NV,
        kept_NV=kept_NV,
        weights_NV=log_weights_NV.exp().masked_fill(~kept_NV, 0.0),
        label_N=label_N,
        weight_N=weight_N,
        targets=make_targets(
            label_N.numpy(), weight_N.numpy(), teacher, temperature=temperature, vocab_size=vocab_size
        ),
    )


def true_loss(logits_NV: Tensor, lesson: Lesson, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Total over Σ c, Σ c·CE and Σ c·D, from logits in any dtype."""
    w, T, c_N = objective.kd_weight, objective.temperature, lesson.weight_N.to(logits_NV)
    ce_N = F.cross_entropy(logits_NV, lesson.label_N, reduction="none")
    kd_N = true_divergence(logits_NV, lesson, objective)
    z_N = torch.logsumexp(logits_NV, dim=1) ** 2
    total = (c_N * ((1 - w) * ce_N + w * T**2 * kd_N + objective.z_loss * z_N)).sum() / lesson.denominator
    return total, (c_N * ce_N).sum(), (c_N * kd_N).sum()


def true_divergence(logits_NV: Tensor, lesson: Lesson, objective: Objective) -> Tensor:
    T = objective.temperature
    teacher_NV = lesson.teacher_NV.to(logits_NV)
    log_q_NV = torch.log_softmax(logits_NV / T, dim=1)
    if objective.tail == "none":
        log_p_NV = torch.log_softmax(teacher_NV, dim=1)
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=1)
        return -(lesson.weights_NV.to(logits_NV) * log_q_NV).sum(dim=1) - entropy_N
    log_p_NB = outcomes(torch.log_softmax(teacher_NV / T, dim=1), lesson.kept_NV)
    log_q_NB = outcomes(log_q_NV, lesson.kept_NV)
    if objective.tail in ("renormalise", "drop"):
        log_p_NB, log_q_NB = log_p_NB[:, :-1], log_q_NB[:, :-1]
    if objective.tail == "renormalise":
        says_nothing_N1 = ~lesson.kept_NV.any(dim=1, keepdim=True)
        log_p_NB, log_q_NB = (
            x - torch.logsumexp(x.masked_fill(says_nothing_N1, 0.0), dim=1, keepdim=True) for x in (log_p_NB, log_q_NB)
        )
    p_NB, q_NB = log_p_NB.exp(), log_q_NB.exp()
    match objective.divergence:
        case "forward_kl":
            return kl(p_NB, log_p_NB, log_q_NB)
        case "reverse_kl":
            return kl(q_NB, log_q_NB, log_p_NB)
        case "jsd":
            beta = objective.jsd_beta
            log_m_NB = (beta * p_NB + (1 - beta) * q_NB).log()
            return beta * kl(p_NB, log_p_NB, log_m_NB) + (1 - beta) * kl(q_NB, log_q_NB, log_m_NB)
        case "skew_kl":
            log_m_NB = (objective.skew_alpha * p_NB + (1 - objective.skew_alpha) * q_NB).log()
            return kl(p_NB, log_p_NB, log_m_NB)


def outcomes(log_NV: Tensor, kept_NV: Tensor) -> Tensor:
    """Logs [N, V + 1] with the tail at the end; −inf is no outcome."""
    on_kept_NV = torch.where(kept_NV, log_NV, -torch.inf)
    off_NV = torch.where(kept_NV, -torch.inf, log_NV)
    # A tail without ids is no outcome, and has no gradient: logsumexp of nothing would give it a NaN.
    off_NV = torch.where(kept_NV.all(dim=1, keepdim=True), off_NV.detach(), off_NV)
    return torch.cat([on_kept_NV, torch.logsumexp(off_NV, dim=1, keepdim=True)], dim=1)


def kl(a_NB: Tensor, log_a_NB: Tensor, log_b_NB: Tensor) -> Tensor:
    """Σ a log(a / b) over the outcomes where a is not 0."""
    counts = ~torch.isneginf(log_a_NB)
    log_a_NB, log_b_NB = (torch.where(counts, x, 0.0) for x in (log_a_NB, log_b_NB))
    return torch.where(counts, a_NB * (log_a_NB - log_b_NB), 0.0).sum(dim=1)


def plain_logits(hidden_ND: Tensor, head: OutputHead, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Logits as plain torch computes them in a dtype, and the leaves that they come from."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden_ND, head.weight_VD, head.bias_V) if x is not None]
    product_NV = F.linear(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)
    logits_NV = product_NV.to(torch.promote_types(dtype, torch.float32)) * head.scale
    return (head.softcap * torch.tanh(logits_NV / head.softcap) if head.softcap else logits_NV), leaves


def fused(hidden_ND: Tensor, head: OutputHead, lesson: Lesson, objective: Objective, **settings: Any) -> FusedLoss:
    return fused_linear_loss(
        hidden_ND, head, lesson.targets, objective, denominator=lesson.denominator, **{"chunk_positions": 4} | settings
    )
