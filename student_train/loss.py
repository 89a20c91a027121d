"""The objective, seen from the kept ids: small functions on [n, K] tensors.

    total = [ (1 − w)·Σ c_i·CE_i + w·T²·Σ c_i·KL(p_i ‖ q_i) ] / Σ c_i

p is the teacher at temperature T over the kept ids and one tail outcome, normalised; q the student's full
softmax at T, its tail the logsumexp *off* the kept ids.  KL over these K+1 outcomes is a lower bound of the full
KL and equal to it when everything is kept.  A student enters only through three things: its logits at the kept
ids, the logsumexp of its other logits, and its logit at the label.  `student_train.fused_linear` computes those
and carries the derivatives back.

log q_tail is lse_off − lse, never log(1 − Σ q): at log q_tail ≈ −16 that is NaN in fp32, or behind a clamp a
gradient hundreds of times too small.

Shapes: n positions of a chunk, K most kept ids of a position (shorter ones are padded, `is_kept` False).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the labels and the teacher say at N positions.  K = 0 where there is no teacher."""

    label_N: Tensor
    weight_N: Tensor
    kept_ids_NK: Tensor
    kept_logp_NK: Tensor
    is_kept_NK: Tensor
    tail_logsum_N: Tensor
    """At the objective's temperature; −inf is an empty tail."""

    def chunk(self, rows: slice) -> "Targets":
        return Targets(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class StudentView:
    """All that the objective sees of the student at n positions."""

    kept_logits_nK: Tensor
    label_logit_n: Tensor
    lse_off_n: Tensor
    """logsumexp of the logits that are not kept."""
    tempered_lse_off_n: Tensor
    """The same of logits / T; the very same tensor at T = 1."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """kd_weight w and temperature T of the formula above."""

    kd_weight: float
    temperature: float = 1.0

    def per_position(self, student: StudentView, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Total [n], cross-entropy [n] and KL [n] in nats, not yet weighted by c_i."""
        ce_n = cross_entropy(student, targets)
        if not targets.kept_ids_NK.shape[1]:
            return (1 - self.kd_weight) * ce_n, ce_n, torch.zeros_like(ce_n)
        kl_n = forward_kl_bucket(student, targets, self.temperature)
        return (1 - self.kd_weight) * ce_n + self.kd_weight * self.temperature**2 * kl_n, ce_n, kl_n


def cross_entropy(student: StudentView, targets: Targets) -> Tensor:
    """−log q(label) at T = 1, in nats [n]."""
    return _lse(student.kept_logits_nK, student.lse_off_n, targets) - student.label_logit_n


def forward_kl_bucket(student: StudentView, targets: Targets, temperature: float) -> Tensor:
    """KL(p ‖ q) over the kept ids and one tail outcome, in nats [n]; an empty teacher tail drops its term."""
    log_p_nK, log_p_tail_n = tempered_teacher(targets, temperature)
    lse_n = _lse(student.kept_logits_nK / temperature, student.tempered_lse_off_n, targets)
    log_q_nK = student.kept_logits_nK / temperature - lse_n[:, None]
    log_q_tail_n = student.tempered_lse_off_n - lse_n
    # Where there is no outcome both logs are set to 0 before the product: 0 · (−inf + inf) is NaN, and masking
    # the product afterwards would not keep it out of the gradient.
    no_tail_n = torch.isneginf(log_p_tail_n)
    difference_nK = (log_p_nK - log_q_nK).masked_fill(~targets.is_kept_NK, 0.0)
    difference_tail_n = log_p_tail_n.masked_fill(no_tail_n, 0.0) - log_q_tail_n.masked_fill(no_tail_n, 0.0)
    return (log_p_nK.exp() * difference_nK).sum(dim=1) + log_p_tail_n.exp() * difference_tail_n


def tempered_teacher(targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """log p at T of the kept ids [n, K] (−inf where padded) and of the tail [n], normalised over both."""
    log_w_nK = (targets.kept_logp_NK / temperature).masked_fill(~targets.is_kept_NK, -torch.inf)
    norm_n = torch.logaddexp(torch.logsumexp(log_w_nK, dim=1), targets.tail_logsum_N)
    return log_w_nK - norm_n[:, None], targets.tail_logsum_N - norm_n


def _lse(kept_logits_nK: Tensor, lse_off_n: Tensor, targets: Targets) -> Tensor:
    """logsumexp over the full vocabulary, from the kept logits and the rest."""
    if not kept_logits_nK.shape[1]:
        return lse_off_n
    kept_nK = kept_logits_nK.masked_fill(~targets.is_kept_NK, -torch.inf)
    return torch.logaddexp(torch.logsumexp(kept_nK, dim=1), lse_off_n)
