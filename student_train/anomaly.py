"""Steps that a run should not take: a loss or gradient that is no number, and a gradient that is a spike.

The decision is made of numbers that are the same on every rank, and what it needs of earlier steps lies in the
checkpoint, so that a run which is interrupted decides as one which is not.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import DivergedError, NonFiniteError
from student_train.config import AnomalySettings

NAMED = 8
"""Rows that are named, the worst first."""


@dataclass(frozen=True, kw_only=True)
class RowLoss:
    """A row of a step that went wrong; means over its positions."""

    sample_id: str
    ce: float
    kd: float

    @property
    def badness(self) -> float:
        """What is no number is worst."""
        total = self.ce + self.kd
        return total if math.isfinite(total) else math.inf


@dataclass
class Anomalies:
    """Looks at every step of a run, in order."""

    settings: AnomalySettings
    norms: list[float] = field(default_factory=list)
    """Gradient norms of the last good steps, at most `window`."""
    skipped: int = 0
    """Steps in a row, up to now."""

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; None where it may be taken, which then counts among those before."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        factor, window = self.settings.spike_factor, self.settings.window
        if factor is not None and len(self.norms) == window:
            usual = statistics.median(self.norms)
            if grad_norm > factor * usual:
                return f"gradient norm {grad_norm:.4g}, {grad_norm / usual:.3g} times the median of {window} steps"
        self.norms, self.skipped = [*self.norms, grad_norm][-window:], 0
        return None

    def skip_or_stop(self, step: int, fault: str, rows: Sequence[RowLoss]) -> None:
        """Count a step that is skipped.

        Raises:
            NonFiniteError, DivergedError: it is not to be, or too many were.
        """
        skips = self.settings.action == "skip"
        if skips and self.skipped < self.settings.max_skipped:
            self.skipped += 1
            return
        kind = DivergedError if fault.startswith("gradient") else NonFiniteError
        many = f" ({self.settings.max_skipped} steps in a row were skipped before it)" if skips else ""
        names = ", ".join(f"{row.sample_id} (ce {row.ce:.3g}, kd {row.kd:.3g})" for row in rows)
        raise kind(
            f"step {step}: {fault}{many}; its worst rows: {names}",
            next_step="look at these rows (logit-shards inspect … --id); go on without such steps by "
            "anomaly.action: skip, or begin anew with a lower optimizer.learning_rate and another `output`",
        )


def worst_rows(names: Sequence[str], ce: Sequence[float], kd: Sequence[float]) -> list[RowLoss]:
    """The rows of a step that are named, by the means of each."""
    rows = [RowLoss(sample_id=name, ce=a, kd=b) for name, a, b in zip(names, ce, kd, strict=True)]
    return sorted(rows, key=lambda row: -row.badness)[:NAMED]
