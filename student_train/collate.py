"""Rows to what the loss wants: labels, and the teacher's ragged kept entries as a rectangle.

Shapes: N positions of the batch, E kept entries of all of them, K the most kept at one position.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shared.rows import LogitRow, Positions, Row
from student_train.loss import Targets


def targets_of(rows: Sequence[Row], *, tail_index: int | None, device: torch.device) -> Targets:
    """Targets of the rows' positions, one after the other.

    `tail_index` is the place of the objective's temperature among those that the dataset declares; None leaves the
    teacher out, and then rows without one will do.
    """
    arrays: dict[str, Any] = {"label_N": np.concatenate([row.label_ids_P for row in rows]).astype(np.int64)}
    num_positions = len(arrays["label_N"])
    arrays["weight_N"] = np.ones(num_positions, dtype=np.float32)
    teachers = [row.teacher for row in rows if isinstance(row, LogitRow)]
    if tail_index is None:
        arrays |= _rectangle(np.zeros(num_positions, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
        arrays["tail_logsum_N"] = np.zeros(num_positions, dtype=np.float32)
    else:
        assert len(teachers) == len(rows), "a row without a teacher in a batch that is to be distilled"
        teacher = Positions.concatenate(teachers)
        arrays |= _rectangle(teacher.kept_counts_P, teacher.kept_ids_E, teacher.kept_logp_E)
        arrays["tail_logsum_N"] = np.ascontiguousarray(teacher.tail_logsum_PT[:, tail_index])
    return Targets(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def _rectangle(counts_N: Any, ids_E: Any, logp_E: Any) -> dict[str, Any]:
    """Padding repeats a position's first id, as `fused_linear` expects."""
    width = int(counts_N.max(initial=0))
    is_kept_NK = np.arange(width)[None, :] < counts_N[:, None]
    kept_ids_NK = np.zeros(is_kept_NK.shape, dtype=np.int64)
    kept_ids_NK[is_kept_NK] = ids_E
    kept_ids_NK = np.where(is_kept_NK, kept_ids_NK, kept_ids_NK[:, :1])
    kept_logp_NK = np.zeros(is_kept_NK.shape, dtype=np.float32)
    kept_logp_NK[is_kept_NK] = logp_E
    return {"kept_ids_NK": kept_ids_NK, "kept_logp_NK": kept_logp_NK, "is_kept_NK": is_kept_NK}
