"""What is measured of a student at every position, beside the loss that it learns from: what tells a sick run.

All at temperature 1 but for `kd`, which is the objective's divergence.  It costs a few operations on [n, K] tensors
and, for the student's entropy, one pass over the vocabulary; so in training one position in eight has one.

Shapes: N positions of a pass, n of a chunk, K kept ids of a position, M measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.loss import StudentView, Targets, log_outcomes
from student_train.objective import Objective

NAMES = (
    "ce",
    "kd",
    "kept_mass",  # of the teacher, on the kept ids
    "student_kept_mass",  # of the student, on the same ids
    "agrees",  # 1 where the teacher's most probable kept id is the student's most probable one; a tie is one
    "teacher_entropy",
    "student_entropy",  # 0 where it is not measured
    "has_entropy",  # 1 where it is
    "is_right",  # 1 where the label is the student's most probable id; a tie is one
    "confidence",  # the probability of that id
    "student_top",  # that id, where details were asked for
)
ENTROPY_STRIDE = 8
"""In training the student's entropy is taken at one position in so many."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """The measures of N positions, without gradient, on the device where they were taken."""

    values_MN: Tensor
    """fp32, in the order of `NAMES`."""
    weight_N: Tensor
    """c_i."""

    def of(self, name: str) -> Tensor:
        """One measure [N]."""
        return self.values_MN[NAMES.index(name)]

    def sums(self) -> Tensor:
        """Σ c_i · each measure [M], and Σ c_i behind them; on the device, which nobody waits for."""
        # No matrix product, which autocast or TF32 would round.
        return (torch.cat([self.values_MN, torch.ones_like(self.weight_N)[None]]) * self.weight_N).sum(dim=1)

    def sum(self, name: str) -> Tensor:
        """Σ c_i · one measure."""
        return (self.of(name) * self.weight_N).sum()


def step_numbers(sums: Sequence[float], objective: Objective) -> dict[str, float]:
    """Means for the log of `Measures.sums` over a whole step.

    Without a teacher there is nothing of one; a sample of its ids says nothing of how much mass they hold.
    """
    *sums_M, total = sums
    mean = {name: value / total for name, value in zip(NAMES, sums_M, strict=True)}
    found = {"ce": mean["ce"]}
    if objective.kd_weight:
        found |= {name: mean[name] for name in ("kd", "agrees", "teacher_entropy")}
        found |= {} if objective.tail == "none" else {name: mean[name] for name in ("kept_mass", "student_kept_mass")}
    if mean["has_entropy"]:
        found["student_entropy"] = mean["student_entropy"] / mean["has_entropy"]
    if "agrees" in found:
        found["agreement"] = found.pop("agrees")
    return found | {"accuracy": mean["is_right"]}


def measure(
    student: StudentView,
    targets: Targets,
    *,
    ce_n: Tensor,
    kd_n: Tensor,
    off_entropy_n: Tensor,
    has_entropy_n: Tensor,
    top_n: Tensor | None,
) -> Tensor:
    """[M, n].  `off_entropy_n` is that of the student's softmax over the ids that are not kept alone."""
    # The largest of all logits was taken off them, so 0 is the most probable one.
    log_q_nB = log_outcomes(student, targets)
    entropy_n = torch.special.entr(log_q_nB.exp()).sum(dim=1) + log_q_nB[:, -1].exp() * off_entropy_n
    lse_n = ce_n + student.label_logit_n
    zeros_n = torch.zeros_like(ce_n)
    kept_mass_n = student_kept_mass_n = agrees_n = zeros_n
    if targets.num_kept:
        kept_logp_nK = targets.kept_logp_NK.masked_fill(~targets.is_kept_NK, -torch.inf)
        kept_mass_n = kept_logp_nK.exp().sum(dim=1)
        student_kept_mass_n = log_q_nB[:, :-1].exp().sum(dim=1)
        top_n1 = kept_logp_nK.argmax(dim=1, keepdim=True)
        agrees = (student.kept_logits_nK.gather(1, top_n1).squeeze(1) >= 0) & targets.is_kept_NK[:, 0]
        agrees_n = agrees.to(ce_n.dtype)
    return torch.stack(
        [
            ce_n,
            kd_n,
            kept_mass_n,
            student_kept_mass_n,
            agrees_n,
            targets.entropy_N.to(ce_n.dtype),
            entropy_n * has_entropy_n,
            has_entropy_n,
            (student.label_logit_n >= 0).to(ce_n.dtype),
            (-lse_n).exp(),
            zeros_n if top_n is None else top_n.to(ce_n.dtype),
        ]
    )
