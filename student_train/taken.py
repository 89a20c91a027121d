"""Which rows a run trains on, from all of its sources together, and what is said of the others.

A source whose manners both come by weight is two selections, reasoning before fast; all others are one.  Each reads
blocks for itself, so those that hold both manners are read twice an epoch.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from shared.amounts import size
from shared.errors import ConfigError
from shared.rows import Bool
from student_train.asked import by_block
from student_train.config import TrainSettings
from student_train.curriculum import Choice, choose
from student_train.data_config import KNOWN_DIFFICULTIES, CurriculumSettings, PaceSettings, SourceSettings
from student_train.facts import Float64
from student_train.objective import Objective
from student_train.order import Competence, EasyToHard, Pace
from student_train.scores import Scores, read_scores
from student_train.source_protocol import Source
from student_train.sources import DatasetSource
from student_train.stream import Selection, is_held_out

logger = logging.getLogger("logitferry")

Columns = tuple[str, str | None, str | None]
"""Of which file which two."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """In which order the rows of a selection come, where not shuffled."""

    difficulty_R: Float64 = field(repr=False)
    """Of its rows."""
    competence: PaceSettings | None
    """None goes from easy to hard."""

    def pace(self, num_rows: Fraction) -> Pace:
        """In a run that takes so many rows of the selection."""
        if self.competence is None:
            return EasyToHard(difficulty_R=self.difficulty_R)
        growing = max(1, int(Fraction(str(self.competence.until)) * num_rows))
        return Competence(difficulty_R=self.difficulty_R, begin=self.competence.begin, growing_rows=growing)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """The rows of a run."""

    sources: list[Source]
    selections: list[Selection]
    """With the teacher at the temperature of the loss."""
    weights: list[float | Fraction] | None
    """Of each selection; None takes as many as each has."""
    courses: list[Course | None]
    """Of each selection."""
    settings: list[SourceSettings]
    choices: list[Choice | None]
    """Of each source, where it has a curriculum."""
    scores: list[Scores | None]

    @property
    def num_rows(self) -> int:
        """Of one epoch of everything."""
        return sum(selection.num_rows for selection in self.selections)

    @property
    def is_chosen(self) -> bool:
        """Does any source have a manner or curriculum?"""
        return any(each.manner or each.curriculum for each in self.settings)

    def paces(self, num_steps: int, rows_per_step: int) -> list[Pace | None]:
        """Of each selection, in a run of so many steps."""
        weights = [Fraction(str(weight)) for weight in self.weights or (each.num_rows for each in self.selections)]
        in_all = num_steps * rows_per_step
        return [
            None if course is None else course.pace(in_all * weight / sum(weights))
            for course, weight in zip(self.courses, weights, strict=True)
        ]

    def identities(self) -> list[dict[str, Any]]:
        """Of each source, what decides which of its rows come when; nothing where it says nothing of that."""
        found = []
        for settings, scores in zip(self.settings, self.scores, strict=True):
            chosen: dict[str, Any] = {}
            if settings.manner is not None:
                chosen["manner"] = settings.manner.model_dump(mode="json", exclude_defaults=True)
            if settings.curriculum is not None:
                said = settings.curriculum.model_dump(mode="json", exclude_defaults=True, exclude={"scores"})
                chosen["curriculum"] = said | ({} if scores is None else {"scores_sha256": scores.sha256})
            found.append(chosen)
        return found

    def records(self) -> list[dict[str, Any]]:
        """Of each source, how many rows are taken, and were dropped for what, by which scores."""
        return [
            ({} if choice is None else {"rows": choice.counts})
            | ({} if scores is None else {"scores_sha256": scores.sha256})
            for choice, scores in zip(self.choices, self.scores, strict=True)
        ]

    def dropped(self) -> Iterator[tuple[str, str]]:
        """Sample id and reason of every row that a curriculum dropped."""
        for source, choice in zip(self.sources, self.choices, strict=True):
            if choice is not None:
                yield from choice.dropped(source.sample_ids)


def training_rows(settings: TrainSettings, sources: Sequence[Source], objective: Objective) -> Taken:
    """Those of each source that are not held out and that its curriculum takes.

    Raises:
        ConfigError: none is left of one of them, or scores cannot be used.
    """
    at, fraction = objective.temperature if settings.loss.kd_weight else None, settings.held_out.fraction
    known = dict[Columns, Scores]()
    selections, courses, choices, scores = [], [], [], []
    weights: list[float | Fraction] = []
    for source, said in zip(sources, settings.data.sources(), strict=True):
        at_source, curriculum = source.at(at), said.curriculum
        trained = Selection.of(at_source, lambda name: not is_held_out(name, fraction))
        if not trained.num_rows:
            raise ConfigError(f"{source.name}: no row is left to train on", next_step="hold out a smaller fraction")
        choice, scored, is_taken_R = None, None, trained.marks()
        if curriculum is not None:
            scored = scores_of(curriculum, known)
            choice = choose(curriculum, source, is_taken_R, scored)
            is_taken_R = choice.is_taken_R
            logger.info("%s: %s%s", source.name, choice.line(), _memory_line(curriculum, source))
            trained = Selection.where(at_source, by_block(source, is_taken_R))
        choices.append(choice)
        scores.append(scored)
        parts = _parts(said, source, is_taken_R)
        whole = getattr(said, "weight", None) or trained.num_rows
        for share, marks_R in parts:
            is_all = len(parts) == 1
            selections.append(trained if is_all else Selection.where(at_source, by_block(source, marks_R)))
            weights.append(whole if is_all else Fraction(str(whole)) * share)
            courses.append(_course(curriculum, choice, marks_R))
    is_weighed = any(each.weight is not None for each in settings.data.mix) or len(selections) > len(sources)
    return Taken(
        sources=list(sources),
        selections=selections,
        weights=weights if is_weighed else None,
        courses=courses,
        settings=settings.data.sources(),
        choices=choices,
        scores=scores,
    )


def scores_of(curriculum: CurriculumSettings, known: dict[Columns, Scores]) -> Scores | None:
    """What a curriculum asks of scores, each once; None where it asks nothing.

    Raises:
        ConfigError, RecordError, DamagedDataError: see `student_train.scores`.
    """
    if curriculum.scores is None:
        return None
    numbers = None if curriculum.difficulty in KNOWN_DIFFICULTIES else curriculum.difficulty
    key = curriculum.scores, numbers, curriculum.right
    if key not in known:
        known[key] = read_scores(curriculum.scores, numbers=numbers, truths=curriculum.right)
    return known[key]


def _parts(said: SourceSettings, source: Source, is_taken_R: Bool) -> list[tuple[Fraction, Bool]]:
    """Share and rows of each selection that a source is.

    Raises:
        ConfigError: nothing is left of one of the manners.
    """
    if said.manner is None or isinstance(said.manner.take, str):
        return [(Fraction(1), is_taken_R)]
    assert source.manners is not None
    shares = {manner: Fraction(str(said.manner.take[manner])) for manner in ("reasoning", "fast")}
    parts = []
    for manner, share in shares.items():
        marks_R = is_taken_R & (source.manners.thinks_R == (manner == "reasoning"))
        if not marks_R.any():
            raise ConfigError(
                f"{source.name}: no {manner} row is left to train on",
                next_step="widen the curriculum, hold out a smaller fraction, or take the other manner alone",
            )
        parts.append((share / sum(shares.values()), marks_R))
    return parts


def _course(curriculum: CurriculumSettings | None, choice: Choice | None, is_taken_R: Bool) -> Course | None:
    if curriculum is None or choice is None or curriculum.order == "shuffled":
        return None
    assert choice.difficulty_R is not None, "the config asks for one"
    pace = curriculum.pace if curriculum.order == "competence" else None
    return Course(difficulty_R=np.ascontiguousarray(choice.difficulty_R[is_taken_R]), competence=pace)


def _memory_line(curriculum: CurriculumSettings, source: Source) -> str:
    """What an order by difficulty holds, as far as it can be told."""
    if curriculum.order == "shuffled" or not isinstance(source, DatasetSource):
        return ""
    manifest = source.dataset.manifest
    of_position = 4 * (3 + len(manifest.row_format.tail_temperatures))
    num_bytes = 5 * manifest.total("tokens") + of_position * manifest.total("positions") + 8 * manifest.total("kept")
    return f"; order {curriculum.order} keeps all shards in memory, about {size(int(num_bytes))}"
