"""What a run's data hold, as far as it can be had cheaply: of datasets a few shards are read, of text everything."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from student_train.config import TrainSettings
from student_train.data import find_objective, training_stream
from student_train.estimate.fake_student import PassShape
from student_train.objective import Objective
from student_train.packing import Shape, cut_into_passes, size
from student_train.passes import POSITIONS_MULTIPLE
from student_train.sources import DatasetSource, Source, open_source
from student_train.stream import Selection
from student_train.taken import training_rows

SAMPLED_BLOCKS = 2
"""Of each dataset."""
TYPICAL_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    num_tokens: int
    num_positions: int


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows that a run trains on."""

    num_rows: int
    """Of an epoch."""
    tokens_per_row: float
    positions_per_row: float
    """In the proportions of the mix."""
    longest_row: int
    """In tokens; no row is longer."""
    num_kept: int
    """Most ids of a position that the teacher is known at."""
    sampled: int
    """Rows that were looked at."""
    steps: list[list[SampleRow]]
    """Of typical steps, drawn from them."""


def read_rows(
    settings: TrainSettings, tokenizer: Any, *, vocab_size: int, context_tokens: int | None
) -> tuple[RunRows, Objective]:
    """What is trained on, and to which end.

    Raises:
        ConfigError, MismatchError, RecordError, DamagedDataError: as the run would.
    """
    objective = find_objective(settings)
    cache = settings.data.cache
    sources = [
        open_source(each, tokenizer, vocab_size=vocab_size, context_tokens=context_tokens, cache=cache)
        for each in settings.data.sources()
    ]
    taken = training_rows(settings, sources, objective)
    order = training_stream(settings, taken).order
    shares = [float(weight / sum(order.weights)) for weight in order.weights]
    read = [_sample(selection) for selection in taken.selections]
    samples = [[SampleRow(num_tokens=row.num_tokens, num_positions=row.num_positions) for row in each] for each in read]
    means = [
        _means(selection.source, sample, is_chosen=taken.is_chosen)
        for selection, sample in zip(taken.selections, samples, strict=True)
    ]
    kept = [row.teacher.kept_counts_P.max(initial=0) for each in read for row in each if hasattr(row, "teacher")]
    generator = random.Random(settings.seed)
    drawn = [generator.choices(range(len(samples)), shares, k=settings.rows_per_step) for _ in range(TYPICAL_STEPS)]
    rows = RunRows(
        num_rows=order.num_rows,
        tokens_per_row=sum(share * mean[0] for share, mean in zip(shares, means, strict=True)),
        positions_per_row=sum(share * mean[1] for share, mean in zip(shares, means, strict=True)),
        longest_row=max(source.longest_row for source in sources),
        num_kept=int(max(kept, default=0)),
        sampled=sum(map(len, samples)),
        steps=[[generator.choice(samples[source]) for source in step] for step in drawn],
    )
    return rows, objective


def _sample(selection: Selection) -> list[Any]:
    """The rows of a few blocks that lie far apart; of text, which is in memory, all."""
    count = len(selection.blocks)
    if isinstance(selection.source, DatasetSource) and count > SAMPLED_BLOCKS:
        indices = [count * (2 * n + 1) // (2 * SAMPLED_BLOCKS) for n in range(SAMPLED_BLOCKS)]
    else:
        indices = range(count)
    return [row for index in indices for row in selection.read(index)]


def _means(source: Source, sample: Sequence[SampleRow], *, is_chosen: bool) -> tuple[float, float]:
    """Tokens and positions of a row: as a dataset's manifest says, unless rows of it are cut, chosen or left out."""
    if isinstance(source, DatasetSource) and not source.tally and not is_chosen:
        manifest = source.dataset.manifest
        num_rows = manifest.total("rows")
        return manifest.total("tokens") / num_rows, manifest.total("positions") / num_rows
    return (
        sum(row.num_tokens for row in sample) / len(sample),
        sum(row.num_positions for row in sample) / len(sample),
    )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How typical steps are cut into forward passes."""

    per_step: float
    """Of each rank."""
    padding: float
    """Share of the computed tokens."""
    fullest: PassShape


def typical_passes(rows: RunRows, shape: Shape, num_ranks: int) -> Passes:
    """Of the steps that were drawn; the fullest pass has room for the longest row of all."""
    fullest, counts, waste = None, [], []
    for step in rows.steps:
        lengths = [row.num_tokens for row in step]
        cut = cut_into_passes(lengths, shape, num_ranks)
        counts.append(len(cut.passes[0]))
        waste.append(cut.waste)
        for lines in (lines for share in cut.passes for lines in share if lines):
            indices = [index for line in lines for index in line]
            found = _pass_shape(
                size(lines, lengths, shape),
                [lengths[index] for index in indices],
                sum(step[index].num_positions for index in indices),
                rows.num_kept,
                is_static=shape.is_static,
            )
            if fullest is None or found.extent > fullest.extent:
                fullest = found
    assert fullest is not None
    if fullest.num_tokens < rows.longest_row:
        share = rows.positions_per_row / rows.tokens_per_row
        alone = (1, rows.longest_row)
        positions = max(1, round(share * rows.longest_row))
        fullest = _pass_shape(alone, [rows.longest_row], positions, rows.num_kept, is_static=shape.is_static)
    return Passes(per_step=sum(counts) / len(counts), padding=sum(waste) / len(waste), fullest=fullest)


def _pass_shape(
    of: tuple[int, int], lengths: Sequence[int], num_positions: int, num_kept: int, *, is_static: bool
) -> PassShape:
    height, width = of
    padding = height * width - sum(lengths)
    if is_static:
        num_positions = -(-num_positions // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE
    return PassShape(
        num_lines=height,
        line_tokens=width,
        document_lengths=(*lengths, *([padding] if padding else [])),
        num_positions=num_positions,
        num_kept=num_kept,
    )
