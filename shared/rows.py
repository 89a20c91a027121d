"""Rows and positions: the two things that travel from text to teacher to disk to student.

Alignment, once and for all.  A sequence is x[0..L-1] with a label mask m[t], m[0] = False.  For every t with
m[t] there is one position: P(· | x[<t]), which the teacher computes at input position t-1, and which
supervises the student's hidden state at t-1.  A row holds exactly sum(m) positions, in order.

Shapes: L tokens of a row, P positions of a row, E kept entries of all its positions together,
T declared temperatures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared.errors import MisalignedRowError

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tokenized sample and which of its tokens are supervised."""

    sample_id: str
    source: str = ""
    """Where the sample comes from: the name of its file, or what the record itself says."""
    input_ids_L: Int32
    label_mask_L: Bool

    def __post_init__(self) -> None:
        if self.input_ids_L.shape != self.label_mask_L.shape:
            raise MisalignedRowError(
                f"row {self.sample_id}: {len(self.input_ids_L)} tokens but {len(self.label_mask_L)} label marks"
            )
        if len(self.label_mask_L) and self.label_mask_L[0]:
            raise MisalignedRowError(f"row {self.sample_id}: the first token is supervised, but nothing precedes it")

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids_L)

    @property
    def num_positions(self) -> int:
        return int(self.label_mask_L.sum())

    def cut(self, num_tokens: int) -> Self:
        """The first so many tokens."""
        return replace(self, input_ids_L=self.input_ids_L[:num_tokens], label_mask_L=self.label_mask_L[:num_tokens])

    @property
    def label_ids_P(self) -> Int32:
        """The realised tokens x[t], one per position."""
        return self.input_ids_L[self.label_mask_L]

    @property
    def source_index_P(self) -> NDArray[np.int64]:
        """t-1 for every position: where its distribution is computed and where it supervises."""
        return np.flatnonzero(self.label_mask_L) - 1


def last_span(label_mask_L: Bool) -> tuple[int, int]:
    """Where the last run of supervised tokens begins and ends; (0, 0) where none is supervised."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], label_mask_L, [False]])))
    return (int(edges[-2]), int(edges[-1])) if len(edges) else (0, 0)


R = TypeVar("R", bound="Row")


def fitted(row: R, limit: int, *, truncate: bool) -> tuple[R | None, str | None]:
    """The row, cut or left out where it has more than `limit` tokens, and under which count that goes."""
    if row.num_tokens <= limit:
        return row, None
    if not truncate:
        return None, "dropped_too_long"
    row = row.cut(limit)
    return (row, "truncated") if row.num_positions else (None, "dropped_no_label")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What the teacher said at the positions of one row.  Natural logarithms, fp32, normalised at T = 1.

    The kept entries of all positions lie one after the other, ids ascending within a position.
    `tail_logsum_PT[:, j]` is log Σ p^(1/T_j) over the ids that are not kept; −inf where all are kept.
    Where ids are sampled, `kept_logp_E` holds log weights and there is no tail: T = 0.
    """

    kept_counts_P: Int32
    kept_ids_E: Int32
    kept_logp_E: Float32
    realised_logp_P: Float32
    entropy_P: Float32
    tail_logsum_PT: Float32

    @property
    def num_positions(self) -> int:
        return len(self.kept_counts_P)

    @staticmethod
    def concatenate(parts: "Sequence[Positions]") -> "Positions":
        return Positions(
            **{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Positions)}
        )

    def mapped(self, new_ids_V: Int32, num_ids: int, temperatures: Sequence[float]) -> "Positions":
        """In the ids of another vocabulary of `num_ids`; below 0 in `new_ids_V` [V] is an id that it has not.

        The mass of such kept ids moves to the tail, exactly, at every temperature: tail_T becomes the logaddexp of
        tail_T and log p / T.  Where all ids of the new vocabulary are kept, nothing is left that could have it, and
        the tail is empty: the teacher is then taken for what it says of those ids.  Weights of a sample are dropped.
        """
        ids_E = new_ids_V[self.kept_ids_E]
        if np.array_equal(ids_E, self.kept_ids_E) and not (self.kept_counts_P == num_ids).any():
            return self
        position_E = np.repeat(np.arange(self.num_positions), self.kept_counts_P)
        is_kept_E = ids_E >= 0
        tail_PT = self.tail_logsum_PT.astype(np.float64)
        gone_E, logp_E = position_E[~is_kept_E], self.kept_logp_E[~is_kept_E].astype(np.float64)
        for j, temperature in enumerate(temperatures):
            np.logaddexp.at(tail_PT[:, j], gone_E, logp_E / temperature)
        position_E, ids_E, logp_E = position_E[is_kept_E], ids_E[is_kept_E], self.kept_logp_E[is_kept_E]
        if ((np.diff(ids_E) <= 0) & (np.diff(position_E) == 0)).any():
            # One sort of one key, a sixth of what lexsort takes.
            order_E = np.argsort(position_E * num_ids + ids_E, kind="stable")
            ids_E, logp_E = ids_E[order_E], logp_E[order_E]
        counts_P = np.bincount(position_E, minlength=self.num_positions).astype(np.int32)
        tail_PT[counts_P == num_ids] = -np.inf
        return replace(
            self,
            kept_counts_P=counts_P,
            kept_ids_E=ids_E,
            kept_logp_E=logp_E,
            tail_logsum_PT=tail_PT.astype(np.float32),
        )

    def at_temperature(self, index: int) -> "Positions":
        """With the tail of one declared temperature alone."""
        return replace(self, tail_logsum_PT=self.tail_logsum_PT[:, index : index + 1])

    def split(self, num_positions: Sequence[int]) -> "list[Positions]":
        """Cut into runs of so many positions, in order; views, not copies."""
        ends_P = np.concatenate([[0], np.cumsum(self.kept_counts_P, dtype=np.int64)])
        runs: list[Positions] = []
        begin = 0
        for count in num_positions:
            positions = slice(begin, begin + count)
            entries = slice(ends_P[begin], ends_P[begin + count])
            runs.append(
                Positions(
                    kept_counts_P=self.kept_counts_P[positions],
                    kept_ids_E=self.kept_ids_E[entries],
                    kept_logp_E=self.kept_logp_E[entries],
                    realised_logp_P=self.realised_logp_P[positions],
                    entropy_P=self.entropy_P[positions],
                    tail_logsum_PT=self.tail_logsum_PT[positions],
                )
            )
            begin += count
        assert begin == self.num_positions, "the runs do not cover the positions"
        return runs


@dataclass(frozen=True, kw_only=True)
class LogitRow(Row):
    """A row together with the teacher's positions; refuses any count but one per supervised token."""

    teacher: Positions

    def without_teacher(self) -> Row:
        """The sample alone."""
        return Row(
            sample_id=self.sample_id,
            source=self.source,
            input_ids_L=self.input_ids_L,
            label_mask_L=self.label_mask_L,
        )

    def cut(self, num_tokens: int) -> Self:
        """The first so many tokens, and what the teacher said at their positions."""
        kept = int(self.label_mask_L[:num_tokens].sum())
        return replace(
            self,
            input_ids_L=self.input_ids_L[:num_tokens],
            label_mask_L=self.label_mask_L[:num_tokens],
            teacher=self.teacher.split([kept, self.num_positions - kept])[0],
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        expected, teacher = self.num_positions, self.teacher
        lengths = {
            "kept_counts": len(teacher.kept_counts_P),
            "realised_logp": len(teacher.realised_logp_P),
            "entropy": len(teacher.entropy_P),
            "tail_logsum": len(teacher.tail_logsum_PT),
        }
        wrong = {name: length for name, length in lengths.items() if length != expected}
        if wrong:
            raise MisalignedRowError(
                f"row {self.sample_id}: {expected} supervised tokens need {expected} distributions, got {wrong}"
            )
        num_entries = int(teacher.kept_counts_P.sum())
        if not len(teacher.kept_ids_E) == len(teacher.kept_logp_E) == num_entries:
            raise MisalignedRowError(
                f"row {self.sample_id}: {num_entries} kept entries counted, but {len(teacher.kept_ids_E)} ids "
                f"and {len(teacher.kept_logp_E)} log-probabilities"
            )
