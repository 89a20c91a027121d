"""What a practised eye would see in a run's numbers, each with its threshold.  A finding is a hint, not a verdict.

"Now" is the mean over the last tenth of a stage's steps; steps that went wrong are left out.  A stage of fewer than
FEWEST_STEPS steps has no trends to speak of.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from student_train.report.axes import percent, short
from student_train.report.read import Float64, Stage

FEWEST_STEPS = 100
TENTHS = 10
WAIT = 0.05
WASTE = 0.1
KEPT_MASS = 0.9
MASS_GAP, MASS_GAP_GROWTH = 0.05, 0.02
ENTROPY_RATIO = 0.5
AGREEMENT, AGREEMENT_GAIN = 0.7, 0.01
NORM_GROWTH = 3.0
HELD_OUT_RISE = 0.02
SPEED_LOSS = 0.7
CALIBRATION_ERROR = 0.1
LOOKED_AT = (
    "steps that went wrong",
    f"held-out loss that rises (by {percent(HELD_OUT_RISE)})",
    f"gradients that grow ({NORM_GROWTH:g}-fold)",
    f"the teacher's mass on kept ids (below {percent(KEPT_MASS)})",
    f"the student's mass behind it (by more than {percent(MASS_GAP)}, and growing)",
    f"entropy (below {percent(ENTROPY_RATIO)} of the teacher's)",
    f"agreement that stands still (below {percent(AGREEMENT)})",
    f"calibration error (above {CALIBRATION_ERROR:g})",
    f"waiting for data (above {percent(WAIT)})",
    f"padding (above {percent(WASTE)})",
    f"speed that falls (below {percent(SPEED_LOSS)})",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was seen, with its number, and what it means or asks for."""

    stage: str
    seen: str
    means: str


def findings(stages: Sequence[Stage]) -> list[Finding]:
    """Of all stages, in order."""
    return [
        Finding(stage=stage.name, seen=seen, means=means)
        for stage in stages
        for check in CHECKS
        for seen, means in check(stage)
    ]


Check = Callable[[Stage], Iterator[tuple[str, str]]]


def share_of_time(stage: Stage, name: str) -> float:
    """The mean of a step's share, each step by how long it took; NaN where nothing is known."""
    share_S, took_S = stage.of(name), stage.of("took_s")
    known_S = np.isfinite(share_S) & np.isfinite(took_S)
    total = took_S[known_S].sum()
    return float((share_S * took_S)[known_S].sum() / total) if total > 0 else float("nan")


def _tenths(stage: Stage, name: str) -> Float64:
    """Means over ten parts of the stage, the last one now; nothing where the stage is short or a part has no number."""
    values_S = np.where(stage.bad_S, np.nan, stage.of(name))
    if len(values_S) < FEWEST_STEPS:
        return np.zeros(0)
    parts = [part[np.isfinite(part)] for part in np.array_split(values_S, TENTHS)]
    return np.array([part.mean() for part in parts]) if all(len(part) for part in parts) else np.zeros(0)


def _wait(stage: Stage) -> Iterator[tuple[str, str]]:
    share = share_of_time(stage, "wait")
    if len(stage.step_S) >= FEWEST_STEPS and share > WAIT:
        yield (
            f"{percent(share)} of the time was spent waiting for data (above {percent(WAIT)}).",
            "The device idles meanwhile: more loader_threads, fewer shuffle_blocks, or the dataset on a local disk.",
        )


def _waste(stage: Stage) -> Iterator[tuple[str, str]]:
    waste = _tenths(stage, "waste")
    if len(waste) and waste[-1] > WASTE:
        yield (
            f"{percent(waste[-1])} of the tokens computed are padding (above {percent(WASTE)}).",
            "packing: true has none, and static shapes waste less with a larger batch_tokens.",
        )


def _wrong_steps(stage: Stage) -> Iterator[tuple[str, str]]:
    steps = stage.step_S[stage.bad_S].tolist()
    if not steps:
        return
    skipped = sum(anomaly.skipped for anomaly in stage.anomalies.values())
    first = stage.anomalies.get(steps[0])
    reason = first.reason if first else "the loss is no number"
    where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    often = Counter(row.sample_id for anomaly in stage.anomalies.values() for row in anomaly.rows[:1]).most_common(3)
    named = ", ".join(f"{name} ({count} times)" if count > 1 else name for name, count in often)
    yield (
        f"{len(steps):,} of {len(stage.step_S):,} steps went wrong, {skipped:,} of them skipped: {where}, "
        f"first {reason}.",
        f"Look at the rows that were worst in them: {named}." if named else "A lower learning rate may help.",
    )


def _speed(stage: Stage) -> Iterator[tuple[str, str]]:
    speed = _tenths(stage, "tokens_per_s")
    if len(speed) and (share := speed[-1] / np.median(speed)) < SPEED_LOSS:
        yield (
            f"Speed fell to {percent(share)} of the stage's median (below {percent(SPEED_LOSS)}), "
            f"{speed[-1]:,.0f} tokens per second.",
            "Something else may be at work on the machine, or the device is throttled.",
        )


def _kept_mass(stage: Stage) -> Iterator[tuple[str, str]]:
    kept, student = _tenths(stage, "kept_mass"), _tenths(stage, "student_kept_mass")
    if len(kept) and kept[-1] < KEPT_MASS:
        yield (
            f"The kept ids hold {percent(kept[-1], 1)} of the teacher's probability (below {percent(KEPT_MASS)}).",
            "What lies beyond is one lump to the student: dump with a larger keep.k, or with a smaller keep.min_prob.",
        )
    if not len(kept) or not len(student):
        return
    gap = kept - student
    if gap[-1] > MASS_GAP and gap[-1] - gap.min() > MASS_GAP_GROWTH:
        yield (
            f"The student holds {percent(student[-1], 1)} where the teacher holds {percent(kept[-1], 1)}: "
            f"{100 * gap[-1]:.1f} points less, and it was {100 * gap.min():.1f}.",
            "It drifts to tokens that the teacher does not name: is the rate too high, or loss.tail set to drop?",
        )


def _entropy(stage: Stage) -> Iterator[tuple[str, str]]:
    student, teacher = _tenths(stage, "student_entropy"), _tenths(stage, "teacher_entropy")
    if len(student) and len(teacher) and student[-1] < ENTROPY_RATIO * teacher[-1]:
        yield (
            f"The student's entropy is {short(student[-1])} nats where the teacher's is {short(teacher[-1])} "
            f"(below {percent(ENTROPY_RATIO)}).",
            "It is surer than its teacher: too many epochs of hard labels, reverse KL, or a tail that is left out.",
        )


def _agreement(stage: Stage) -> Iterator[tuple[str, str]]:
    agreement = _tenths(stage, "agreement")
    if not len(agreement) or agreement[-1] >= AGREEMENT:
        return
    gain = round(float(agreement[-1] - agreement[TENTHS // 2 - 1]), 3) + 0.0
    if gain < AGREEMENT_GAIN:
        yield (
            f"Agreement with the teacher stands at {percent(agreement[-1], 1)} (below {percent(AGREEMENT)}), "
            f"{100 * gain:+.1f} points over the second half.".replace("-", "−"),
            "The rate may be too low by now, the student too small, or what both read is not quite the same.",
        )


def _grad_norm(stage: Stage) -> Iterator[tuple[str, str]]:
    norms = _tenths(stage, "grad_norm")
    if len(norms) and norms[-1] > NORM_GROWTH * norms[1:].min():
        yield (
            f"The gradient norm has grown to {short(norms[-1])}, from {short(norms[1:].min())} "
            f"(more than {NORM_GROWTH:g}-fold).",
            "Often the first sign of a run that diverges: a lower optimizer.learning_rate, or a longer warm-up.",
        )


def _held_out(stage: Stage) -> Iterator[tuple[str, str]]:
    trained, ce_S = _tenths(stage, "ce"), np.where(stage.bad_S, np.nan, stage.of("ce"))
    for name, title in (("ce", "cross-entropy"), ("kl", "KL")):
        steps, values = stage.held(name)
        if len(values) < 3:
            continue
        best = int(np.argmin(values))
        rise = values[-1] - values[best]
        if rise <= HELD_OUT_RISE * abs(values[best]):
            continue
        then = ce_S[np.isfinite(ce_S) & (np.abs(stage.step_S - steps[best]) <= stage.steps / (2 * TENTHS))]
        falls = name == "ce" and len(trained) and len(then) and trained[-1] < then.mean()
        yield (
            f"Held-out {title} rose to {short(values[-1], 4)}, from {short(values[best], 4)} at step {steps[best]:,} "
            f"(by more than {percent(HELD_OUT_RISE)})" + (", while it falls in training." if falls else "."),
            "The student learns its rows by heart: fewer epochs, more rows, or a higher kd_weight."
            if falls
            else "The student is past its best there: fewer steps, or a lower rate.",
        )


def _calibration(stage: Stage) -> Iterator[tuple[str, str]]:
    errors = stage.held("ece")[1]
    if errors and stage.steps and errors[-1] > CALIBRATION_ERROR:
        yield (
            f"The calibration error on held-out rows is {errors[-1]:.3f} (above {CALIBRATION_ERROR:g}).",
            "The student's probabilities are off by so much on average; the diagram below shows which way.",
        )


CHECKS: Sequence[Check] = (
    _wrong_steps,
    _held_out,
    _grad_norm,
    _kept_mass,
    _entropy,
    _agreement,
    _calibration,
    _wait,
    _waste,
    _speed,
)
