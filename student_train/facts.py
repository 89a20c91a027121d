"""What is to be known of rows before any is trained on: one number or digest for each, in the order of their source.

Shapes: R rows of a source.  Memory: 56 bytes a row.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from shared.rows import Bool, Int32, LogitRow, Row, last_span
from student_train.manner import Thinking

DIGEST_BYTES = 16
Digests = NDArray[np.bytes_]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of all rows of a source."""

    num_tokens_R: Int32
    num_positions_R: Int32
    content_R: Digests
    """Of all tokens."""
    prompt_R: Digests
    """Of those before the last supervised span; empty where there is none, or one that nothing could predict."""
    teacher_nll_R: Float64
    """Mean of −log p(label), nats; NaN without a teacher."""
    teacher_entropy_R: Float64
    """Mean of the entropy, nats; NaN without a teacher."""
    thinks_R: Bool
    """False for all where nothing tells them apart by what stands in them."""

    @staticmethod
    def of(rows: Sequence[Row], thinking: Thinking | None) -> "Facts":
        begins = [last_span(row.label_mask_L)[0] for row in rows]
        prompts = [
            _digest(row.input_ids_L[:begin]) if begin > 1 else b"" for row, begin in zip(rows, begins, strict=True)
        ]
        teachers = [row.teacher if isinstance(row, LogitRow) else None for row in rows]
        return Facts(
            num_tokens_R=np.array([row.num_tokens for row in rows], dtype=np.int32),
            num_positions_R=np.array([row.num_positions for row in rows], dtype=np.int32),
            content_R=np.array([_digest(row.input_ids_L) for row in rows], dtype=f"S{DIGEST_BYTES}"),
            prompt_R=np.array(prompts, dtype=f"S{DIGEST_BYTES}"),
            teacher_nll_R=np.array([np.nan if each is None else -_mean(each.realised_logp_P) for each in teachers]),
            teacher_entropy_R=np.array([np.nan if each is None else _mean(each.entropy_P) for each in teachers]),
            thinks_R=np.array([thinking is not None and thinking.thinks(row) for row in rows], dtype=np.bool_),
        )

    @staticmethod
    def concatenate(parts: "Sequence[Facts]") -> "Facts":
        return Facts(
            **{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Facts)}
        )

    def where(self, is_taken_R: Bool) -> "Facts":
        """Of some of the rows."""
        return Facts(**{name: values[is_taken_R] for name, values in vars(self).items()})


def _digest(ids: Int32) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST_BYTES).digest()


def _mean(values_P: NDArray[np.float32]) -> float:
    return float(values_P.mean(dtype=np.float64))
