"""How a student does on rows: against their labels, and against the teacher where there is one.

All ranks read all rows and compute their own passes of them, in step, as FSDP2 asks for.
"""

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import NonFiniteError
from shared.interruption import Interruption
from shared.rows import LogitRow
from shared.rows import Row as TextRow
from shared.token_text import TokenText
from student_train.evaluation import Bin, Evaluation, Histogram, Means, Row
from student_train.measures import NAMES
from student_train.objective import Objective
from student_train.passes import ForwardPass
from student_train.ranks import Ranks
from student_train.stream import Selection
from student_train.student import Student

EVALUATE_ROWS = 256  # in memory at once
NUM_WORST = 20
NUM_BINS = 15
MASS_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0)


def evaluate(
    student: Student,
    selections: Sequence[Selection],
    ranks: Ranks | None = None,
    interruption: Interruption | None = None,
    *,
    num_worst: int = NUM_WORST,
    step: int | None = None,
) -> Evaluation | None:
    """Every row once, by all ranks together; None where one of them is asked to stop meanwhile, or cannot go on.

    Raises whatever keeps this one from going on, when the others know that there is nothing to wait for.
    """
    ranks, interruption = ranks or Ranks(), interruption or Interruption()
    has_teacher = all(selection.source.temperatures for selection in selections)
    tally = _Tally(num_worst, has_teacher)
    for selection in selections:
        if not _look(student, selection, tally, ranks, interruption):
            return None
    return tally.evaluation(student, selections, ranks, step)


def _look(student: Student, selection: Selection, tally: "_Tally", ranks: Ranks, interruption: Interruption) -> bool:
    """All rows of one selection; False where one of the ranks asks to end it."""
    source = selection.source
    objective = Objective(kd_weight=0.0, tail=source.tail)
    maker = student.pass_maker(objective, longest_row=source.longest_row, ranks=ranks)
    batches, error = selection.in_order(EVALUATE_ROWS), None
    while True:
        rows, passes = None, list[ForwardPass]()
        try:
            if error is None and (rows := interruption.unless_asked(lambda: next(batches, None))) is not None:
                passes = maker.make(rows)[0]
        except Exception as raised:
            error = raised
        num_asked, num_failed = ranks.sums([interruption.came, error is not None])
        if error is not None:
            raise error
        if num_asked or num_failed:
            return False
        if rows is None:
            return True
        try:
            for each, measures in student.measured(passes, objective):
                tally.add(each, measures.values_MN.cpu().numpy(), [rows[index] for index in each.rows], source.name)
        except Exception as raised:  # the others hear of it before they look at more
            error = raised


@dataclass
class _Tally:
    """What one rank has seen."""

    num_worst: int
    has_teacher: bool
    """Of all rows."""
    num_rows: int = 0
    sums_M: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(NAMES)))
    positions: int = 0
    bins_3B: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, NUM_BINS)))
    """Positions, confidence and right ones."""
    masses: NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(MASS_EDGES) - 1))
    worst: list[tuple[float, int, "_Seen"]] = field(default_factory=list)
    """A heap, the least bad first."""
    _order: Iterator[int] = field(default_factory=count)

    def add(self, of: ForwardPass, values_MN: NDArray[np.float32], rows: Sequence[TextRow], source: str) -> None:
        """A pass; what it has beyond its rows' positions is padding."""
        if not rows:
            return  # a silent pass
        num_positions = sum(of.positions)
        doubled_MN = values_MN[:, :num_positions].astype(np.float64)
        self.num_rows += len(rows)
        self.positions += num_positions
        self.sums_M += doubled_MN.sum(axis=1)
        confidence_N, right_N = _of(doubled_MN, "confidence"), _of(doubled_MN, "is_right")
        bin_N = np.clip((np.nan_to_num(confidence_N) * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)
        for sums_B, weight_N in zip(self.bins_3B, (None, confidence_N, right_N), strict=True):
            sums_B += np.bincount(bin_N, weight_N, NUM_BINS)
        self.masses += np.histogram(np.clip(_of(doubled_MN, "kept_mass"), 0.0, 1.0), MASS_EDGES)[0]
        ends = np.cumsum(of.positions)[:-1]
        for row, values_MP in zip(rows, np.split(doubled_MN, ends, axis=1), strict=True):
            self._keep_if_bad(_Seen(row=row, source=source, values_MP=values_MP))

    def _keep_if_bad(self, seen: "_Seen") -> None:
        if not self.num_worst:
            return
        entry = (seen.badness("kd" if self.has_teacher else "ce"), next(self._order), seen)
        if len(self.worst) < self.num_worst:
            heapq.heappush(self.worst, entry)
        else:
            heapq.heappushpop(self.worst, entry)

    def evaluation(
        self, student: Student, selections: Sequence[Selection], ranks: Ranks, step: int | None
    ) -> Evaluation:
        """Of what all ranks have seen."""
        parts = [np.array([self.num_rows, self.positions]), self.sums_M, self.bins_3B.ravel(), self.masses]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        (rows, positions), sums_M, bins, masses = np.split(np.array(ranks.sums(np.concatenate(parts).tolist())), ends)
        _require_finite(sums_M, self.worst)
        has_teacher = self.has_teacher
        has_masses = has_teacher and all(selection.source.tail == "bucket" for selection in selections)
        calibration, ece = _calibration(bins.reshape(3, NUM_BINS))
        text = TokenText(student.tokenizer.backend_tokenizer)
        own = [seen.described(text, has_teacher=has_teacher).model_dump() for *_, seen in self.worst]
        every = [
            Row.model_validate(row) for said in ranks.gathered(json.dumps(own).encode()) for row in json.loads(said)
        ]
        every.sort(key=lambda row: -(row.ce if row.kl is None else row.kl))
        mean = dict(zip(NAMES, sums_M / positions, strict=True))
        return Evaluation(
            student=student.name,
            step=step,
            rows=int(rows),
            means=Means(
                positions=int(positions),
                ce=mean["ce"],
                accuracy=mean["is_right"],
                ece=ece,
                student_entropy=mean["student_entropy"],
                kl=mean["kd"] if has_teacher else None,
                agreement=mean["agrees"] if has_teacher else None,
                kept_mass=mean["kept_mass"] if has_masses else None,
                student_kept_mass=mean["student_kept_mass"] if has_masses else None,
                teacher_entropy=mean["teacher_entropy"] if has_teacher else None,
            ),
            calibration=calibration,
            kept_mass=Histogram(edges=list(MASS_EDGES), counts=masses.astype(int).tolist()) if has_masses else None,
            worst=every[: self.num_worst],
        )


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A row and what was measured of it."""

    row: TextRow
    source: str
    values_MP: NDArray[np.float64]

    def badness(self, name: str) -> float:
        """Mean of a measure; what is no number is worst."""
        value = float(_of(self.values_MP, name).mean())
        return value if np.isfinite(value) else np.inf

    def described(self, text: TokenText, *, has_teacher: bool) -> Row:
        """For people."""
        row, names = self.row, _Names(text)
        teacher = row.teacher if isinstance(row, LogitRow) and has_teacher else None
        ce_P, kl_P = (_numbers(_of(self.values_MP, name)) for name in ("ce", "kd"))
        tops = zip(_of(self.values_MP, "student_top"), _of(self.values_MP, "confidence"), strict=True)
        return Row(
            sample_id=row.sample_id,
            source=self.source,
            ce=float(np.mean(ce_P)),
            kl=float(np.mean(kl_P)) if teacher else None,
            tokens=text.of_row(row.input_ids_L.tolist()),
            supervised_P=np.flatnonzero(row.label_mask_L).tolist(),
            ce_P=ce_P,
            kl_P=kl_P if teacher else None,
            realised_P=_numbers(np.exp(teacher.realised_logp_P)) if teacher else None,
            teacher_top_P=[names.top(each) for each in teacher.split([1] * row.num_positions)] if teacher else None,
            student_top_P=[(names.of(int(token)), _rounded(p)) for token, p in tops],
        )


@dataclass(frozen=True)
class _Names:
    """What single tokens are called, each asked for once."""

    text: TokenText
    known: dict[int, str] = field(default_factory=dict)

    def of(self, token: int) -> str:
        if token not in self.known:
            self.known[token] = self.text.name(token)
        return self.known[token]

    def top(self, position: Any) -> tuple[str, float]:
        """The most probable of a position's kept ids; nothing where it keeps none."""
        if not len(position.kept_ids_E):
            return "", 0.0
        place = int(position.kept_logp_E.argmax())
        return self.of(int(position.kept_ids_E[place])), _rounded(np.exp(position.kept_logp_E[place]))


def _require_finite(sums_M: NDArray[np.float64], worst: Sequence[tuple[float, int, "_Seen"]]) -> None:
    if not np.isfinite(sums_M).all():
        names = [seen.row.sample_id for badness, _, seen in worst if not np.isfinite(badness)]
        raise NonFiniteError(
            f"the student's logits are no numbers on held-out rows, as {', '.join(names[:8]) or 'another rank saw'}",
            next_step="go back to a checkpoint from before, with a lower optimizer.learning_rate",
        )


def _of(values_MN: NDArray[Any], name: str) -> NDArray[Any]:
    return values_MN[NAMES.index(name)]


def _numbers(values: NDArray[Any]) -> list[float]:
    return [_rounded(value) for value in values]


def _rounded(value: Any) -> float:
    """Five digits, for a file that people look at; a largest number for what is none."""
    return float(f"{value:.5g}") if np.isfinite(value) else 1e30


def _calibration(bins_3B: NDArray[np.float64]) -> tuple[list[Bin], float]:
    """Each bin's means, and the mean over positions of how far confidence and accuracy of their bins differ."""
    count_B, confidence_B, right_B = bins_3B
    some_B = np.maximum(count_B, 1)
    bins = [
        Bin(count=int(number), confidence=confidence, accuracy=accuracy)
        for number, confidence, accuracy in zip(count_B, confidence_B / some_B, right_B / some_B, strict=True)
    ]
    return bins, float(np.abs(confidence_B - right_B).sum() / count_B.sum())
