"""What a run trains on and is measured by: settings to a stream of batches and some held-out rows."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shared.dataset import LogitDataset
from shared.errors import ConfigError, LogitferryError, MismatchError
from shared.overlap import MadeAhead
from shared.text_files import find_text_files
from student_train.collate import weights_of
from student_train.config import LossSettings, TrainSettings
from student_train.data_config import DataSettings
from student_train.objective import Objective
from student_train.order import Pace
from student_train.passes import ForwardPass
from student_train.ranks import Ranks
from student_train.scores import scores_file
from student_train.sources import Source, open_dataset
from student_train.stream import Selection, StepRows, Stream, is_held_out
from student_train.student import Student
from student_train.taken import Taken, scores_of, training_rows


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What this rank does in a step, which is counted from 0, and what all ranks do together."""

    step: int
    passes: list[ForwardPass]
    sample_ids: list[str]
    sources: list[str]
    row_tokens: list[int]
    """Of each row."""
    num_positions: int
    weight: float
    """Σ c over all positions, what the loss divides by."""
    waste: float
    """Share of all ranks' computed tokens that are padding."""

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(self.row_tokens)


class TrainingData:
    """The rows of a run, checked against the student.

    Raises:
        ConfigError: no row is held out, or none is left to train on.
        MismatchError, RecordError, DamagedDataError: see `student_train.sources`.
    """

    def __init__(self, settings: TrainSettings, student: Student, objective: Objective, ranks: Ranks) -> None:
        self._sources = student.open_sources(settings.data)
        self._weights = [source.weight for source in settings.data.mix]
        self.held_out = _held_out(settings, student, self._sources)
        self._taken = training_rows(settings, self._sources, objective)
        self.stream = training_stream(settings, self._taken)
        longest_row = max(source.longest_row for source in self._sources)
        self.passes = student.pass_maker(objective, longest_row=longest_row, ranks=ranks)

    @property
    def num_rows(self) -> int:
        """Of one epoch."""
        return self.stream.num_rows

    def batches(self, first: int, last: int) -> MadeAhead[Batch]:
        """This rank's share of steps first … last − 1, ready before it is asked for; to be closed at the end.

        Raises:
            DamagedDataError: a shard is not what was written; not one row of it has been seen.
            MismatchError: a row has no targets for this objective.
        """
        return self.stream.made_ahead(first, last, self._batch)

    def _batch(self, of: StepRows) -> Batch:
        passes, waste = self.passes.make(of.rows)
        return Batch(
            step=of.step,
            passes=passes,
            sample_ids=[row.sample_id for row in of.rows],
            sources=[row.source for row in of.rows],
            row_tokens=[row.num_tokens for row in of.rows],
            num_positions=sum(row.num_positions for row in of.rows),
            weight=sum(float(weights_of(row, self.passes.objective).sum()) for row in of.rows),
            waste=waste,
        )

    def identity(self) -> list[dict[str, Any]]:
        """Equal where every step has the same rows, as far as data and what is asked of them decide that."""
        weights, chosen = self._weights or [None], self._taken.identities()
        return [
            source.identity() | {"weight": weight} | each
            for source, weight, each in zip(self._sources, weights, chosen, strict=True)
        ]

    def rows_digest(self, step: int) -> str:
        """Of which rows that step takes, by their places in the data."""
        refs = self.stream.order.step(step)
        digest = hashlib.sha256()
        for places in (refs.source_R, refs.block_R, refs.row_R):
            digest.update(places.astype("<i8").tobytes())
        if self._taken.is_chosen:  # places are among the rows that were chosen, so it matters which those are
            selections = self._taken.selections
            ids = [selection.source.sample_ids for selection in selections]
            for source, block, row in zip(refs.source_R, refs.block_R, refs.row_R, strict=True):
                chosen = selections[source]
                name = ids[source][chosen.blocks[block]][int(chosen.rows[block][row])].as_py()
                digest.update(name.encode() + b"\0")
        return digest.hexdigest()

    def record(self) -> list[dict[str, Any]]:
        """What was trained on, for people."""
        records = self._taken.records()
        return [source.record() | each for source, each in zip(self._sources, records, strict=True)]

    def dropped(self) -> Iterator[tuple[str, str]]:
        """Sample id and reason of every row that a curriculum dropped."""
        return self._taken.dropped()


def training_stream(settings: TrainSettings, taken: Taken) -> Stream:
    """All steps of a run; nothing is read yet.

    Raises:
        ConfigError: where the order depends on the number of steps, see `num_steps`.
    """
    paces: list[Pace | None] = []
    if any(taken.courses):
        paces = taken.paces(num_steps(settings, taken.num_rows), settings.rows_per_step)
    return Stream(
        taken.selections,
        weights=taken.weights,
        paces=paces,
        rows_per_step=settings.rows_per_step,
        seed=settings.seed,
        shuffle_blocks=settings.shuffle_blocks,
        num_threads=settings.loader_threads,
    )


def num_steps(settings: TrainSettings, num_rows: int) -> int:
    """Of a run over so many rows an epoch.

    Raises:
        ConfigError: a step takes more rows than there are, or warming up takes all steps.
    """
    if settings.rows_per_step > num_rows:
        raise ConfigError(
            f"rows_per_step is {settings.rows_per_step}, but there are {num_rows} rows to train on",
            next_step="lower rows_per_step",
        )
    # Rounded up, so that every row is seen; the last step of an epoch is filled from the next.
    steps = settings.steps or math.ceil((settings.epochs or 0) * num_rows / settings.rows_per_step)
    if settings.optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps is {settings.optimizer.warmup_steps}, but there are {steps} steps",
            next_step="lower optimizer.warmup_steps",
        )
    return steps


def measured(sources: Sequence[Source], takes: Callable[[str], bool]) -> list[Selection]:
    """Rows to measure a student by: at T = 1, whatever it is trained at."""
    return [Selection.of(source.at(1.0 if source.temperatures else None), takes) for source in sources]


def _held_out(settings: TrainSettings, student: Student, training: list[Source]) -> list[Selection]:
    fraction, data = settings.held_out.fraction, settings.held_out.data
    if data is not None:
        selections = measured(student.open_sources(data), lambda _: True)
    elif fraction:
        selections = measured(training, lambda name: is_held_out(name, fraction))
    else:
        return []
    if not sum(selection.num_rows for selection in selections):
        raise ConfigError("no row is held out", next_step="raise held_out.fraction, or leave held_out away")
    return selections


def find_objective(settings: TrainSettings) -> Objective:
    """What the config asks for, checked against the datasets before any model is loaded.

    Raises:
        MismatchError: a dataset does not hold what this loss needs.
    """
    if not settings.loss.kd_weight:
        return settings.loss.objective(is_sampled=False)
    datasets = [open_dataset(name, settings.data.cache) for name in _datasets(settings.data)]
    found = {dataset.name: objective_on(dataset, settings.loss) for dataset in datasets}
    if len(set(found.values())) > 1:
        raise MismatchError(
            f"{' and '.join(found)} were kept in unlike manners: some hold a sample of ids, others the most probable",
            next_step="mix datasets of one keep.method",
        )
    return next(iter(found.values()))


def require_data(settings: TrainSettings) -> None:
    """See that what a run names is there, as far as that can be said without a model.

    Raises:
        ConfigError, MismatchError, DamagedDataError: it is not.
    """
    find_objective(settings)
    require_sources(settings.data)
    if settings.held_out.data is not None:
        require_sources(settings.held_out.data)


def require_sources(data: DataSettings) -> None:
    """See that these datasets, files and scores are there.

    Raises:
        ConfigError, DamagedDataError: one is not, or cannot be read.
    """
    for source in data.sources():
        if source.curriculum is not None:
            scores_of(source.curriculum, {})
        if source.dataset is not None:
            open_dataset(source.dataset, data.cache)
        elif source.text is not None:
            find_text_files(source.text.files)


def require_same_data(settings: TrainSettings, records: Sequence[dict[str, Any]]) -> None:
    """See that a finished run was trained on the datasets and scores that its config names now.

    What cannot be reached any more is no matter; text is not read again for it.  `records` are `TrainingData.record`'s.

    Raises:
        MismatchError: a dataset, or the scores of its rows, are others now.
    """
    for source, record in zip(settings.data.sources(), records, strict=False):
        now: dict[str, str] = {}
        if source.dataset is not None:
            with suppress(LogitferryError):
                now["manifest_sha256"] = open_dataset(source.dataset, settings.data.cache).identity()
        if source.curriculum is not None and source.curriculum.scores is not None:
            with suppress(LogitferryError):
                now["scores_sha256"] = scores_file(source.curriculum.scores).sha256()
        for name, digest in now.items():
            if record.get(name, digest) != digest:
                is_dataset = name == "manifest_sha256"
                what = f"the dataset {source.dataset}" if is_dataset else f"scores of {source.dataset or 'text'}"
                raise MismatchError(
                    f"{settings.output} was trained with {what} of sha256 {record[name][:16]}…, which is "
                    f"{digest[:16]}… now",
                    next_step="give this run another `output`, or remove the folder to train it again",
                )


def _datasets(data: DataSettings) -> list[str]:
    return [str(source.dataset) for source in data.sources()]


def objective_on(dataset: LogitDataset, loss: LossSettings) -> Objective:
    """What these settings compute on a dataset.

    Raises:
        MismatchError: it does not hold what this loss needs.
    """
    name, manifest, temperature = dataset.name, dataset.manifest, loss.temperature
    try:
        objective = loss.objective(is_sampled=not manifest.row_format.has_tails)
    except ValueError as error:
        raise MismatchError(
            f"{name} was kept by {manifest.keep['method']}, and the loss does not fit it: {error}",
            next_step="train with loss: {divergence: forward_kl, temperature: 1} and no loss.tail, "
            "or dump with keep.method: topk",
        ) from None
    if manifest.tail_is_unknown and objective.tail != "renormalise":
        raise MismatchError(
            f"{name} was imported from lists that had been renormalised: the teacher's tail is not known, and "
            f"{objective.divergence} with loss.tail: {objective.tail} would teach that there is none",
            next_step="train with loss: {divergence: forward_kl, tail: renormalise}",
        )
    if temperature not in manifest.temperatures:
        raise MismatchError(
            f"loss.temperature {temperature:g} is not among the {manifest.temperatures} of {name}: "
            "the teacher's tail is not known there",
            next_step="train at a declared temperature, or dump again with this one under `temperatures`",
        )
    return objective
