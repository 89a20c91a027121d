"""How a student does on held-out rows: cross-entropy on the labels, and KL to the teacher where there is one."""

from dataclasses import dataclass

import torch

from student_train.objective import Objective
from student_train.stream import Stream
from student_train.student import Student

EVALUATE_ROWS = 256  # in memory at once


@dataclass(frozen=True, kw_only=True)
class HeldOutMeans:
    """Means over supervised tokens, in nats.

    `kl` is the forward KL at T = 1, whatever the training's divergence: over kept ids and tail, or estimated from a
    sample of ids, and then it may lie below 0 where it is near.
    """

    positions: int
    ce: float
    kl: float | None


@torch.no_grad()
def evaluate(student: Student, stream: Stream) -> HeldOutMeans:
    """Every row of the stream once, in the order of its source; the mode of the model is left as it was."""
    source = stream.source
    temperature_index = list(source.temperatures).index(1.0) if source.temperatures else None
    objective = Objective(kd_weight=0.0, tail="none" if source.is_sampled else "bucket")
    positions, ce, kl = 0, 0.0, 0.0
    was_training = student.model.training
    student.model.eval()
    for rows in stream.in_order(EVALUATE_ROWS):
        positions += sum(row.num_positions for row in rows)
        for sums in student.losses(rows, objective, temperature_index=temperature_index, denominator=1.0):
            ce, kl = ce + float(sums.ce), kl + float(sums.kd)
    student.model.train(was_training)
    return HeldOutMeans(
        positions=positions, ce=ce / positions, kl=None if temperature_index is None else kl / positions
    )
