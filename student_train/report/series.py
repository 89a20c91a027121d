"""Curves thinned to what a screen can show.

The steps of all stages, one behind the other, are cut into at most BUCKETS buckets.  Of each the least and the greatest
value are kept, so that one spike in 200,000 steps is still to be seen, and the mean around its middle, which is the
curve.  That mean is centred, so the curve does not lag, and steps that went wrong are left out of it.

Shapes: S steps of a stage, B buckets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_train.report.read import Float64, Int64, Stage

BUCKETS = 420
SMOOTHED_SHARE = 0.02
"""Of a stage's steps: what one point of the curve is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Where the buckets of all stages lie."""

    stages: list[Stage]
    begin_B: Int64
    """Into the steps of its stage; a bucket ends where the next one of its stage begins."""
    end_B: Int64
    stage_B: Int64
    offsets: list[int]
    """How many steps are before each stage."""
    total: int
    """Steps of all stages, at least 1."""

    @staticmethod
    def of(stages: Sequence[Stage], count: int = BUCKETS) -> "Buckets":
        """Every stage gets its share of them, and at least 2."""
        lengths = [len(stage.step_S) for stage in stages]
        begins, ends, numbers = [], [], []
        for number, length in enumerate(lengths):
            share = max(2, round(count * length / max(sum(lengths), 1)))
            edges = np.linspace(0, length, min(share, length) + 1).astype(np.int64)
            begins.append(edges[:-1])
            ends.append(edges[1:])
            numbers.append(np.full(len(edges) - 1, number))
        offsets = np.cumsum([0, *(stage.steps for stage in stages)]).tolist()
        return Buckets(
            stages=list(stages),
            begin_B=np.concatenate(begins),
            end_B=np.concatenate(ends),
            stage_B=np.concatenate(numbers),
            offsets=offsets[:-1],
            total=max(offsets[-1], 1),
        )

    @property
    def count(self) -> int:
        return len(self.begin_B)

    @property
    def are_steps(self) -> bool:
        """Each bucket is a single step."""
        return bool((self.end_B - self.begin_B == 1).all())

    def steps(self) -> tuple[Int64, Int64]:
        """The first and the last step of each bucket, as its stage counts."""
        places = list(zip(self.stage_B.tolist(), self.begin_B.tolist(), self.end_B.tolist(), strict=True))
        first = [self.stages[number].step_S[begin] for number, begin, _ in places]
        last = [self.stages[number].step_S[end - 1] for number, _, end in places]
        return np.array(first, np.int64), np.array(last, np.int64)

    def places(self) -> Float64:
        """Where the middle of each bucket lies, 0 to 1."""
        first_B, last_B = self.steps()
        offset_B = np.array(self.offsets, np.float64)[self.stage_B]
        return (offset_B + (first_B + last_B) / 2) / self.total

    def place(self, stage: int, step: int) -> float:
        return (self.offsets[stage] + step) / self.total

    def curve(self, name: str) -> "Curve":
        parts = [
            _thinned(stage, name, self.begin_B[self.stage_B == number], self.end_B[self.stage_B == number])
            for number, stage in enumerate(self.stages)
        ]
        low_B, high_B, usual_low_B, usual_high_B, smooth_B = np.concatenate(parts, axis=1)
        return Curve(low_B=low_B, high_B=high_B, usual_low_B=usual_low_B, usual_high_B=usual_high_B, smooth_B=smooth_B)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One number over all buckets; NaN where there is none."""

    low_B: Float64
    high_B: Float64
    usual_low_B: Float64
    """Without steps that went wrong; these tell what an axis has to hold."""
    usual_high_B: Float64
    smooth_B: Float64

    @property
    def is_empty(self) -> bool:
        return not np.isfinite(self.low_B).any()

    def last(self) -> float:
        """The newest smoothed value."""
        finite = self.smooth_B[np.isfinite(self.smooth_B)]
        return float(finite[-1]) if len(finite) else math.nan


def _thinned(stage: Stage, name: str, begin_B: Int64, end_B: Int64) -> Float64:
    """The five parts of a curve, as rows."""
    if not len(begin_B):
        return np.zeros((5, 0))
    values_S = stage.of(name)
    usual_S = np.where(stage.bad_S, np.nan, values_S)
    radius = int(len(values_S) * SMOOTHED_SHARE / 2)
    smooth_B = [mean_around(usual_S, middle, radius) for middle in ((begin_B + end_B - 1) // 2).tolist()]
    # fmin and fmax prefer numbers to NaN.
    extremes = [each.reduceat(values, begin_B) for values in (values_S, usual_S) for each in (np.fmin, np.fmax)]
    return np.array([*extremes, smooth_B])


def mean_around(values_S: Float64, middle: int, radius: int) -> float:
    """The mean of what is a number in a window that narrows towards the beginning, where curves are steep."""
    reach = min(radius, middle)
    window = values_S[middle - reach : middle + reach + 1]
    window = window[~np.isnan(window)]
    return float(window.mean()) if len(window) else math.nan
