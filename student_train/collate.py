"""Rows to what the loss wants: labels, and the teacher's ragged kept entries as a rectangle.

Shapes: N positions of the batch, E kept entries of all of them, K the most kept at one position, rounded up.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.errors import MismatchError
from shared.rows import Float32, LogitRow, Positions, Row
from student_train.loss import Targets
from student_train.objective import Objective

LEAST_LOG_WEIGHT = np.log(1e-3)
"""So that no step is without weight, whatever its labels are."""
KEPT_MULTIPLE = 16
"""K is a multiple of it, so that a device which compiles for shapes meets few."""


def targets_of(rows: Sequence[Row], objective: Objective, *, vocab_size: int) -> Targets:
    """Targets of the rows' positions, one after the other, weighed by `weights_of`, on the CPU.

    Rows have a teacher, all of them, with the tail at the objective's temperature alone; or none of them has one.
    `vocab_size` is the student's.

    Raises:
        MismatchError: a position has an empty tail where the divergence is infinite then.
    """
    labels_N = np.concatenate([row.label_ids_P for row in rows])
    weights_N = np.concatenate([weights_of(row, objective) for row in rows])
    teachers = [row.teacher for row in rows if isinstance(row, LogitRow)]
    if not teachers:
        return make_targets(labels_N, weights_N, None, vocab_size=vocab_size)
    assert len(teachers) == len(rows), "a row without a teacher in a batch that is to be distilled"
    teacher = Positions.concatenate(teachers)
    assert teacher.tail_logsum_PT.shape[1] <= 1, "whose temperatures are not settled"
    if objective.divergence == "reverse_kl":
        _require_tails(rows, teacher, vocab_size)
    return make_targets(labels_N, weights_N, teacher, temperature=objective.temperature, vocab_size=vocab_size)


def weights_of(row: Row, objective: Objective) -> Float32:
    """c of each of a row's positions, [P]: what the teacher makes of the label, where it is asked; else 1."""
    if not objective.agreement:
        return np.ones(row.num_positions, dtype=np.float32)
    assert isinstance(row, LogitRow), "agreement with a teacher that is not there"
    logc_P = objective.agreement * row.teacher.realised_logp_P
    return np.exp(np.clip(logc_P, LEAST_LOG_WEIGHT, 0.0)).astype(np.float32)


def make_targets(
    label_ids_N: NDArray[Any],
    weight_N: NDArray[Any],
    teacher: Positions | None,
    *,
    temperature: float = 1.0,
    temperature_index: int = 0,
    vocab_size: int,
) -> Targets:
    """Checked targets from arrays, on the CPU.  A teacher without tails is a sample with weights.

    `temperature_index` is the column of `tail_logsum_PT` that holds the tail at `temperature`.

    Raises:
        ValueError: not one distribution per label; an id outside the vocabulary or twice at one position; a number
            that is none, +∞, or −∞ elsewhere than in a tail; a position that keeps nothing and has no tail.
    """
    num_positions = len(label_ids_N)
    _require(np.shape(weight_N) == (num_positions,), f"{num_positions} labels need as many weights")
    _require_each((label_ids_N >= 0) & (label_ids_N < vocab_size), f"a label in [0, {vocab_size})", label_ids_N)
    _require_each(np.isfinite(weight_N) & (weight_N >= 0), "a finite weight that is not negative", weight_N)
    has_tails = teacher is not None and teacher.tail_logsum_PT.shape[1] > 0
    kept, tail_N, entropy_N = _rectangle(None, num_positions), np.zeros(num_positions), np.zeros(num_positions)
    if teacher is not None:
        _require(
            teacher.num_positions == num_positions,
            f"{num_positions} labels need as many distributions, got {teacher.num_positions}",
        )
        tail_N = teacher.tail_logsum_PT[:, temperature_index] if has_tails else tail_N
        entropy_N = teacher.entropy_P
        _check_kept(teacher, vocab_size)
        _require_each(np.isfinite(entropy_N), "a finite entropy", entropy_N)
        _require_each(np.isfinite(tail_N) | np.isneginf(tail_N), "a tail that is finite or −∞", tail_N)
        if has_tails:
            _require_each((teacher.kept_counts_P > 0) | np.isfinite(tail_N), "a kept id or a tail", tail_N)
        kept = _rectangle(teacher, num_positions)
    arrays = {
        "label_N": label_ids_N.astype(np.int64),
        "weight_N": weight_N.astype(np.float32),
        "tail_logsum_N": tail_N.astype(np.float32),
        "entropy_N": entropy_N.astype(np.float32),
    }
    tensors = {name: torch.from_numpy(array) for name, array in (arrays | kept).items()}
    return Targets(**tensors, tail_at=temperature if has_tails else None)


def _rectangle(teacher: Positions | None, num_positions: int) -> dict[str, NDArray[Any]]:
    """Padding repeats a position's first id."""
    counts_N = np.zeros(num_positions, dtype=np.int64) if teacher is None else teacher.kept_counts_P
    widest = int(counts_N.max(initial=0))
    # A teacher has a column even where it keeps nothing: no column at all means no teacher.
    width = 0 if teacher is None else -(-max(widest, 1) // KEPT_MULTIPLE) * KEPT_MULTIPLE
    is_kept_NK = np.arange(width)[None, :] < counts_N[:, None]
    kept_ids_NK = np.zeros(is_kept_NK.shape, dtype=np.int64)
    kept_logp_NK = np.zeros(is_kept_NK.shape, dtype=np.float32)
    if teacher is not None:
        kept_ids_NK[is_kept_NK] = teacher.kept_ids_E
        kept_ids_NK = np.where(is_kept_NK, kept_ids_NK, kept_ids_NK[:, :1])
        kept_logp_NK[is_kept_NK] = teacher.kept_logp_E
    return {"kept_ids_NK": kept_ids_NK, "kept_logp_NK": kept_logp_NK, "is_kept_NK": is_kept_NK}


def _check_kept(teacher: Positions, vocab_size: int) -> None:
    ids_E, logp_E = teacher.kept_ids_E, teacher.kept_logp_E
    position_E = np.repeat(np.arange(teacher.num_positions), teacher.kept_counts_P)
    _require(len(ids_E) == len(logp_E) == len(position_E), "kept ids, their log-probabilities and their counts differ")
    _require_each((ids_E >= 0) & (ids_E < vocab_size), f"a kept id in [0, {vocab_size})", ids_E, position_E)
    _require_each(np.isfinite(logp_E), "a kept log-probability that is finite", logp_E, position_E)
    same_position_E = position_E[1:] == position_E[:-1]
    is_new_E = np.ones(len(ids_E), dtype=bool)
    if (same_position_E & (ids_E[1:] <= ids_E[:-1])).any():  # not in the order of the format: look for repeats
        order_E = np.lexsort((ids_E, position_E))
        sorted_ids_E = ids_E[order_E]
        is_new_E[order_E[1:]] = ~(same_position_E & (sorted_ids_E[1:] == sorted_ids_E[:-1]))
    _require_each(is_new_E, "each kept id once", ids_E, position_E)


def _require_tails(rows: Sequence[Row], teacher: Positions, vocab_size: int) -> None:
    """Reverse KL asks log p of wherever the student has mass."""
    is_infinite_N = np.isneginf(teacher.tail_logsum_PT[:, 0]) & (teacher.kept_counts_P < vocab_size)
    if not is_infinite_N.any():
        return
    position = int(is_infinite_N.argmax())
    ends = np.cumsum([0, *(row.num_positions for row in rows)])
    name, begin = next((row.sample_id, a) for row, (a, b) in zip(rows, pairwise(ends), strict=True) if position < b)
    raise MismatchError(
        f"row {name}, position {position - begin}: the teacher's tail is empty, and there reverse_kl is infinite",
        next_step="take loss.divergence: jsd or forward_kl, which are finite there",
    )


def _require(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(expected)


def _require_each(
    holds: NDArray[np.bool_], expected: str, values: NDArray[Any], positions: NDArray[Any] | None = None
) -> None:
    if not holds.all():
        index = int((~holds).argmax())
        position = index if positions is None else int(positions[index])
        raise ValueError(f"position {position}: expected {expected}, got {values[index]}")
