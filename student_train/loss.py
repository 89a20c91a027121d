"""The objective, seen from the kept ids: small functions on [n, K] tensors.

    total = [ (1 − w)·Σ c_i·CE_i + w·T²·Σ c_i·D(p_i, q_i) + z·Σ c_i·lse_i² ] / Σ c_i

p is the teacher at temperature T over the kept ids and one tail outcome, normalised; q the student's full softmax
at T, its tail the logsumexp *off* the kept ids.  A student enters only through four things: its logits at the kept
ids, the logsumexp of its other logits (at 1 and at T), and its logit at the label.  `student_train.fused_linear`
computes those and carries the derivatives back.  Seen so, both sides are a softmax over K+1 numbers:

    p = softmax(kept log p / T,  tail_logsum_T)        q = softmax(kept logits / T,  lse_off_T)

q_tail is never 1 − Σ q: at log q_tail ≈ −16 that is NaN in fp32, or behind a clamp a gradient hundreds of times
too small.  `LOSSES.md` beside this file has every formula with its gradient and source.

Shapes: n positions of a chunk, K most kept ids of a position (shorter ones are padded, `is_kept` False),
B = K + 1 outcomes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from student_train.divergences import NEVER, forward_kl, jsd, reverse_kl, skew_kl
from student_train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the labels and the teacher say at N positions.  K = 0 where there is no teacher.

    Not checked here, where it may lie on a device: `collate.make_targets` makes it from arrays and checks them.
    """

    label_N: Tensor
    weight_N: Tensor
    """c_i ≥ 0; a position of weight 0 has no influence."""
    kept_ids_NK: Tensor
    """Distinct within a position; padding follows all that is kept."""
    kept_logp_NK: Tensor
    """Log p at T = 1, or log weights where the ids are a sample."""
    is_kept_NK: Tensor
    tail_logsum_N: Tensor
    """At the objective's temperature; −inf is an empty tail.  Unused where the ids are a sample."""
    entropy_N: Tensor
    """The teacher's, in nats, over its whole vocabulary; used where the ids are a sample."""
    tail_at: float | None
    """The temperature that the tail is at; None where the ids are a sample, or there is no teacher."""

    @property
    def num_kept(self) -> int:
        """K."""
        return self.kept_ids_NK.shape[1]

    def __getitem__(self, rows: slice) -> "Targets":
        return self.each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Targets":
        return self.each(lambda tensor: tensor.to(device))

    def padded(self, num_rows: int) -> "Targets":
        """With positions of weight 0 at the end, that keep nothing and have all their mass in the tail."""
        missing = num_rows - len(self.label_N)
        return self.each(lambda tensor: F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing))) if missing else self

    def each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        """With every tensor changed alike."""
        tensors = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class StudentView:
    """All that the objective sees of the student at n positions."""

    kept_logits_nK: Tensor
    label_logit_n: Tensor
    lse_off_n: Tensor
    """logsumexp of the logits that are not kept; −inf where all are."""
    tempered_lse_off_n: Tensor
    """The same of logits / T; the very same tensor at T = 1."""
    shift_n: Tensor
    """What was taken off all logits before (and off them / T as shift / T), the largest of them; nothing but z-loss
    asks for it."""

    def detached(self) -> "StudentView":
        """Without a gradient."""
        return StudentView(**{name: value.detach() for name, value in vars(self).items()})


def per_position(objective: Objective, student: StudentView, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Total [n], cross-entropy [n] and divergence [n] in nats, not yet weighted by c_i."""
    # CE and z-loss at T = 1 over the full vocabulary, whatever the divergence does.
    lse_n = torch.logsumexp(_outcomes(student.kept_logits_nK, student.lse_off_n, targets.is_kept_NK), dim=1)
    ce_n = lse_n - student.label_logit_n
    total_n = (1 - objective.kd_weight) * ce_n
    if objective.z_loss:
        total_n = total_n + objective.z_loss * (lse_n + student.shift_n).square()
    if not targets.num_kept:
        return total_n, ce_n, torch.zeros_like(ce_n)
    divergence = _sampled_kl if objective.tail == "none" else _divergence
    kd_n = divergence(objective, student, targets)
    return total_n + objective.kd_weight * objective.temperature**2 * kd_n, ce_n, kd_n


def log_outcomes(student: StudentView, targets: Targets) -> Tensor:
    """Log q of the kept ids and of all others together [n, B], at temperature 1."""
    return _log_probabilities(student.kept_logits_nK, student.lse_off_n, targets.is_kept_NK)


def _divergence(objective: Objective, student: StudentView, targets: Targets) -> Tensor:
    is_kept_nK, temperature = targets.is_kept_NK, objective.temperature
    tail_p_n, tail_q_n = targets.tail_logsum_N, student.tempered_lse_off_n
    if objective.tail == "renormalise":
        # Over the kept ids alone; where nothing is kept, the tail is certain on both sides and they agree.
        tail_p_n = tail_q_n = torch.zeros_like(tail_p_n).masked_fill(is_kept_nK[:, 0], -torch.inf)
    log_p_nB = _log_probabilities(targets.kept_logp_NK / temperature, tail_p_n, is_kept_nK)
    log_q_nB = _log_probabilities(student.kept_logits_nK / temperature, tail_q_n, is_kept_nK)
    if objective.tail == "drop":
        log_p_nB, log_q_nB = log_p_nB[:, :-1], log_q_nB[:, :-1]
    match objective.divergence:
        case "forward_kl":
            return forward_kl(log_p_nB, log_q_nB)
        case "reverse_kl":
            return reverse_kl(log_p_nB, log_q_nB)
        case "jsd":
            return jsd(log_p_nB, log_q_nB, objective.jsd_beta)
        case "skew_kl":
            return skew_kl(log_p_nB, log_q_nB, objective.skew_alpha)


def _sampled_kl(objective: Objective, student: StudentView, targets: Targets) -> Tensor:
    """−Σ w log q − H over sampled ids: forward KL in expectation, also below 0 for a single position."""
    log_q_nB = log_outcomes(student, targets)
    weight_nK = targets.kept_logp_NK.exp().masked_fill(~targets.is_kept_NK, 0.0)
    return -(weight_nK * log_q_nB[:, :-1]).sum(dim=1) - targets.entropy_N


def _outcomes(kept_nK: Tensor, rest_n: Tensor, is_kept_nK: Tensor) -> Tensor:
    """[n, B]: what is kept and the rest in one; −inf where there is no outcome."""
    return torch.cat([kept_nK.masked_fill(~is_kept_nK, -torch.inf), rest_n[:, None]], dim=1)


def _log_probabilities(kept_nK: Tensor, rest_n: Tensor, is_kept_nK: Tensor) -> Tensor:
    """Normalised over the outcomes [n, B]; `NEVER`, which no gradient passes, where there is none."""
    log_nB = torch.log_softmax(_outcomes(kept_nK, rest_n, is_kept_nK), dim=1)
    return log_nB.masked_fill(torch.isneginf(log_nB), NEVER)
