"""How a student does on held-out rows: cross-entropy on the labels, and KL to the teacher where there is one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from shared.interruption import Interruption
from student_train.attention import evaluating
from student_train.objective import Objective
from student_train.ranks import Ranks
from student_train.stream import Selection
from student_train.student import Student

EVALUATE_ROWS = 256  # in memory at once


@dataclass(frozen=True, kw_only=True)
class HeldOutMeans:
    """Means over supervised tokens, in nats.

    `kl` is the forward KL at T = 1, whatever the training's divergence: over kept ids and tail, or estimated from a
    sample of ids, and then it may lie below 0 where it is near.  None where some of the rows have no teacher.
    """

    positions: int
    ce: float
    kl: float | None


def evaluate(
    student: Student,
    selections: Sequence[Selection],
    ranks: Ranks | None = None,
    interruption: Interruption | None = None,
) -> HeldOutMeans | None:
    """Every row once, by all ranks together; None where one of them is asked to stop meanwhile, or cannot go on.

    Raises whatever keeps this one from going on.
    """
    ranks, interruption = ranks or Ranks(), interruption or Interruption()
    mine, error = None, None
    try:
        mine = interruption.unless_asked(lambda: _sums(student, selections, ranks))
    except Exception as raised:  # told when the others know that there is nothing to wait for
        error = raised
    *totals, num_broken_off = ranks.sums([*(mine or (0.0, 0.0, 0.0)), mine is None])
    if error is not None:
        raise error
    if num_broken_off:
        return None
    positions, ce, kl = totals
    has_teacher = all(selection.source.temperatures for selection in selections)
    return HeldOutMeans(positions=int(positions), ce=ce / positions, kl=kl / positions if has_teacher else None)


@torch.no_grad()
def _sums(student: Student, selections: Sequence[Selection], ranks: Ranks) -> tuple[float, float, float]:
    """Positions, cross-entropy and divergence of this rank's share."""
    positions, ce, kl = 0.0, 0.0, 0.0
    with evaluating(student.model):
        for selection in selections:
            objective = Objective(kd_weight=0.0, tail="none" if selection.source.is_sampled else "bucket")
            maker = student.pass_maker(objective, longest_row=selection.source.longest_row, ranks=Ranks())
            for rows in islice(selection.in_order(EVALUATE_ROWS), ranks.rank, None, ranks.count):
                positions += sum(row.num_positions for row in rows)
                for sums in student.losses(maker.make(rows)[0], objective, denominator=1.0):
                    ce, kl = ce + float(sums.ce), kl + float(sums.kd)
    return positions, ce, kl
