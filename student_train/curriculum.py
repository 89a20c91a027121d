"""Which of a source's rows are learnt from, and why the others are not.

Rows go through the filters in this order: what `right` calls wrong, repeats of the same tokens, longer answers to the
same prompt, and what lies outside the band of difficulty.  Each sees what those before it have left; so shares of the
band are of what would be trained on without it.

Shapes: R rows of a source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shared.errors import ConfigError
from shared.rows import Bool
from student_train.data_config import CurriculumSettings
from student_train.facts import Digests, Facts, Float64
from student_train.scores import Scores
from student_train.source_protocol import Source


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Of the rows that a source has, held-out ones left out."""

    is_taken_R: Bool
    reason_R: Any = field(repr=False)
    """int8: why a row was dropped, an index into `reasons`; −1 where it was not."""
    reasons: list[str]
    difficulty_R: Float64 | None = field(repr=False)
    """Higher is harder; NaN where it is not known."""

    @property
    def counts(self) -> dict[str, Any]:
        """How many rows there were, are taken, and were dropped for each reason."""
        dropped = np.bincount(self.reason_R[self.reason_R >= 0], minlength=len(self.reasons)).tolist()
        taken = int(self.is_taken_R.sum())
        return {
            "rows": taken + sum(dropped),
            "taken": taken,
            "dropped": {reason: count for reason, count in zip(self.reasons, dropped, strict=True) if count},
        }

    def line(self) -> str:
        """The same for people."""
        counts = self.counts
        said = ", ".join(f"{count:,} {reason}" for reason, count in counts["dropped"].items())
        return f"{counts['rows']:,} rows, {counts['taken']:,} taken" + (f"; dropped: {said}" if said else "")

    def dropped(self, sample_ids: Sequence[pa.StringArray]) -> Iterator[tuple[str, str]]:
        """Sample id and reason of every row that was."""
        begin = 0
        for block in sample_ids:
            for place in np.flatnonzero(self.reason_R[begin : begin + len(block)] >= 0).tolist():
                yield block[place].as_py(), self.reasons[self.reason_R[begin + place]]
            begin += len(block)


class _Sieve:
    """What is left, and why the rest is not."""

    def __init__(self, is_left_R: Bool) -> None:
        self.is_left_R = is_left_R.copy()
        self.reason_R = np.full(len(is_left_R), -1, dtype=np.int8)
        self.reasons: list[str] = []

    def drop(self, is_meant_R: Bool, reason: str) -> None:
        gone_R = self.is_left_R & is_meant_R
        self.reason_R[gone_R] = len(self.reasons)
        self.reasons.append(reason)
        self.is_left_R &= ~gone_R

    def drop_repeats(self, key_R: Digests, order_R: Any, reason: str) -> None:
        """Of those that are left and have the same key all but the first by `order_R`, then by place."""
        left = np.flatnonzero(self.is_left_R & (key_R != b""))
        left = left[np.argsort(order_R[left], kind="stable")]
        first = np.zeros(len(key_R), dtype=np.bool_)
        first[left[np.unique(key_R[left], return_index=True)[1]]] = True
        is_repeat_R = np.zeros(len(key_R), dtype=np.bool_)
        is_repeat_R[left] = True
        self.drop(is_repeat_R & ~first, reason)


def choose(settings: CurriculumSettings, source: Source, is_left_R: Bool, scores: Scores | None) -> Choice:
    """The rows of a source that are taken, of those that are left to train on.

    Raises:
        ConfigError: there are none.
    """
    sieve, facts, known = _Sieve(is_left_R), source.facts, dict[str, Float64]()
    if scores is not None:
        is_scored_R, known = scores.of(source.sample_ids)
        sieve.drop(~is_scored_R, "without a line in scores")
    difficulty_R = _difficulty(settings, facts, known)
    if difficulty_R is not None:
        sieve.drop(np.isnan(difficulty_R), f"of unknown {settings.difficulty}")
    if settings.right is not None:
        sieve.drop(known[settings.right] == 0, "not right")
        sieve.drop(np.isnan(known[settings.right]), "not known to be right")
    if settings.deduplicate and facts is not None:
        held_out = facts.content_R[~is_left_R]
        sieve.drop(np.isin(facts.content_R, held_out[held_out != b""]), "with the same tokens as one that is held out")
        sieve.drop_repeats(facts.content_R, np.zeros(len(is_left_R)), "with the same tokens as one before")
    if settings.shortest_answer and facts is not None:
        sieve.drop_repeats(facts.prompt_R, facts.num_positions_R, "of a prompt with a shorter answer")
    if difficulty_R is not None:
        _drop_outside(settings, sieve, difficulty_R)
    found = Choice(
        is_taken_R=sieve.is_left_R, reason_R=sieve.reason_R, reasons=sieve.reasons, difficulty_R=difficulty_R
    )
    if not found.is_taken_R.any():
        where = f"; scores are {scores.name}" if scores else ""
        raise ConfigError(
            f"{source.name}: the curriculum leaves no row to train on: {found.line()}{where}",
            next_step="widen quantiles or values, or look at the sample ids of scores",
        )
    return found


def _difficulty(settings: CurriculumSettings, facts: Facts | None, known: dict[str, Float64]) -> Float64 | None:
    if settings.difficulty is None:
        return None
    if facts is None or settings.difficulty in known:
        return known[settings.difficulty]
    return {
        "length": facts.num_positions_R.astype(np.float64),
        "teacher_nll": facts.teacher_nll_R,
        "teacher_entropy": facts.teacher_entropy_R,
    }[settings.difficulty]


def _drop_outside(settings: CurriculumSettings, sieve: _Sieve, difficulty_R: Float64) -> None:
    name, left_R = settings.difficulty, difficulty_R[sieve.is_left_R]
    lows, highs = [-np.inf], [np.inf]
    if settings.values is not None:
        low, high = settings.values
        lows, highs = [-np.inf if low is None else low], [np.inf if high is None else high]
    if settings.quantiles is not None and len(left_R):
        # Those of rows that there are, so that no rounding decides which row is within.
        lows.append(float(np.quantile(left_R, settings.quantiles[0], method="higher")))
        highs.append(float(np.quantile(left_R, settings.quantiles[1], method="lower")))
    sieve.drop(difficulty_R < max(lows), f"easier than {name} {max(lows):.4g}")
    sieve.drop(difficulty_R > min(highs), f"harder than {name} {min(highs):.4g}")
