"""What of a run's data `doctor` looks at: do datasets belong to this student and this loss, and how many steps are it?

A dataset is opened as the run opens it, and its first shard is read; of text a few records are made to rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from shared.doctor.finding import Finding, attempt
from shared.doctor.model import Opened
from shared.rows import Row
from shared.text_config import TextSettings
from student_train.config import TrainSettings
from student_train.data_config import DataSettings, SourceSettings
from student_train.objective import Objective

TEXT_RECORDS = 64
TRIED_ROWS, TRIED_TOKENS = 2, 32
"""For a step in small."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What was found of the data, and a little of it."""

    findings: list[Finding] = field(default_factory=list)
    objective: Objective | None = None
    rows: list[Row] = field(default_factory=list)
    """A few short ones; none where something is wrong."""


def look_at_data(settings: TrainSettings, opened: Opened) -> Looked:
    """All that can be known before a step."""
    from student_train.data import find_objective

    objective, found = attempt("data", partial(find_objective, settings))
    if objective is None or opened.config is None or opened.tokenizer is None:  # of which the other checks tell
        return Looked(findings=found)
    at = objective.temperature if settings.loss.kd_weight else None
    sources, lines = _opened(settings.data, settings, opened, "data")
    found += lines
    if settings.held_out.data is not None:
        found += _opened(settings.held_out.data, settings, opened, "held out")[1]
    if any(finding.verdict == "mend" for finding in found):
        return Looked(findings=found)
    rows, unread = attempt("data", partial(_few_rows, sources[0], at))
    found += unread
    if all(not isinstance(source, _Text) for source in sources):
        _, wrong = attempt("steps", lambda: found.append(_steps(settings, sources, objective)))
        found += wrong
    return Looked(findings=found, objective=objective, rows=rows or [])


@dataclass(frozen=True, kw_only=True)
class _Text:
    """The first rows of text files."""

    rows: list[Row]


def _opened(data: DataSettings, settings: TrainSettings, opened: Opened, check: str) -> tuple[list[Any], list[Finding]]:
    sources, found = [], []
    for each in data.sources():
        source, wrong = attempt(check, partial(_open, each, data, settings, opened))
        found += wrong
        if source is not None:
            sources.append(source[0])
            found.append(Finding(check, *source[1]))
    return sources, found


def _open(of: SourceSettings, data: DataSettings, settings: TrainSettings, opened: Opened) -> tuple[Any, tuple]:
    """A source, and verdict, line and next step about it."""
    from shared.pretrained import context_tokens
    from student_train.sources import open_source

    context = context_tokens(settings.student)
    if of.text is not None:
        _look_at_scores(of)
        return _open_text(of.text, opened.tokenizer, context)
    source: Any = open_source(
        of, opened.tokenizer, vocab_size=opened.vocab_size, context_tokens=context, cache=data.cache
    )
    manifest = source.dataset.manifest
    limit = f"{context:,}" if context else "any number of"
    temperatures = ", ".join(f"{each:g}" for each in manifest.temperatures) or "none"
    tokenizer = "this tokenizer" if source.mapped is None else "another tokenizer of this family"
    found = (
        f"{source.name}: {manifest.total('rows'):,} rows, {manifest.total('positions'):,} supervised tokens, of "
        f"{tokenizer}; tails at T {temperatures}; longest row {source.longest_row:,} of {limit} tokens"
        f"{_vocabulary_line(source)}"
    )
    if manifest.missing:
        mend = "train on what is left, or dump the rest again"
        return source, ("warning", f"{found}; {len(manifest.missing)} damaged shards were taken out of it", mend)
    if source.mapped is not None and source.mapped.is_cut_otherwise:
        mend = "give the teacher the tokens that such rows spell out, and dump again; or take them from the student"
        return source, ("warning", found, mend)
    if source.cut_otherwise:
        mend = f"give the student the tokenizer of the dataset: it lies in {source.name}/tokenizer"
        return source, ("warning", f"{found}; {source.cut_otherwise}", mend)
    return source, ("ok", found)


def _vocabulary_line(source: Any) -> str:
    """What becomes of ids where the student's are not the dataset's."""
    from student_train.sources import UNKNOWN_TOKEN

    if source.vocabulary is None:
        return ""
    said = f"; {source.vocabulary.line()}"
    if source.mapped is not None:
        said += f"; {source.mapped.line()}"
    if dropped := source.tally.get(UNKNOWN_TOKEN):
        said += f"; {dropped:,} rows have tokens that the student lacks, and are dropped"
    return said


def _look_at_scores(of: SourceSettings) -> None:
    """Raises as the run would; of a dataset they are looked at when its steps are counted."""
    from student_train.taken import scores_of

    if of.curriculum is not None:
        scores_of(of.curriculum, {})


def _open_text(text: TextSettings, tokenizer: Any, context: int | None) -> tuple[_Text, tuple]:
    from shared.records import RecordReader
    from shared.text_rows import Tally, TextRows

    alone = text.model_copy(update={"processes": 1})  # a few records are not worth starting others for
    tally, records = Tally(), islice(RecordReader(alone).records(), TEXT_RECORDS)
    with TextRows(tokenizer, alone, context_tokens=context) as rows:
        made = list(rows.rows(records, tally))
    found = f"{', '.join(text.files)}: the first {tally.summary()}"
    mend = "look at more of them: logit-shards inspect CONFIG --all"
    return _Text(rows=made), ("ok", found) if made else ("warning", found, mend)


def _few_rows(source: Any, temperature: float | None) -> list[Row]:
    """Cut short; the first shard of a dataset that has any is verified on the way.

    Raises:
        DamagedDataError: it is not what was written.
    """
    if isinstance(source, _Text):
        block: Sequence[Row] = source.rows
    else:
        first = next((index for index, ids in enumerate(source.sample_ids) if len(ids)), 0)
        block = source.at(temperature).read_block(first)
    begin_soon = sorted((row for row in block if row.num_positions), key=lambda row: row.source_index_P[0])
    return [row.cut(TRIED_TOKENS + int(row.source_index_P[0])) for row in begin_soon[:TRIED_ROWS]]


def _steps(settings: TrainSettings, sources: Sequence[Any], objective: Objective) -> Finding:
    """How many steps the rows are.

    Raises:
        ConfigError: as the run would.
    """
    from student_train.data import num_steps
    from student_train.taken import training_rows

    rows = training_rows(settings, sources, objective)
    in_all = sum(len(names) for source in sources for names in source.sample_ids)
    dropped = sum(1 for _ in rows.dropped())
    held_out = in_all - rows.num_rows - dropped
    if settings.held_out.fraction and not held_out:
        return Finding("steps", "mend", "no row is held out", "raise held_out.fraction, or leave held_out away")
    found = f"of {settings.rows_per_step} rows; an epoch has {rows.num_rows:,} rows, {held_out:,} held out"
    found += f", {dropped:,} dropped by the curriculum" if settings.data.has_curriculum else ""
    return Finding("steps", "ok", f"{num_steps(settings, rows.num_rows):,} {found}")
