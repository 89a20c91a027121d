"""Where the student's rows come from: a sealed dataset, or text files for plain SFT.

Rows lie in blocks: the shards of a dataset, or equally long runs of text records.  Opening a source checks all that
can be checked before training starts: tokenizer, vocabulary, context, and that there are rows.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from typing import Any, Protocol

from tokenizers import Tokenizer

from shared.dataset import LogitDataset
from shared.errors import DamagedDataError, MismatchError
from shared.fingerprint import require_same_tokenizer
from shared.manifest import losses_line
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import LogitRow, Row, fitted
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from student_train.config import DataSettings

logger = logging.getLogger("logitferry")

TEXT_BLOCK_RECORDS = 512  # the default unit of a dump, so that text and its dataset are shuffled alike


class Source(Protocol):
    """Rows in blocks.  Ids are known without reading the rows."""

    @property
    def sample_ids(self) -> Sequence[Sequence[str]]: ...

    @property
    def temperatures(self) -> Sequence[float]:
        """Those that the teacher is known at; none where there is no teacher."""
        ...

    @property
    def is_sampled(self) -> bool:
        """Are the teacher's kept ids a sample with weights?"""
        ...

    def read_block(self, index: int) -> Sequence[Row]: ...

    def identity(self) -> dict[str, Any]:
        """What a run trained on, for its record."""
        ...


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A sealed dataset; a block is a shard, and is verified whenever it is read.

    `vocab_size` is the student's.  Models of one tokenizer are padded to unlike sizes: what the teacher kept beyond
    the student's vocabulary goes to the tail, and what the student has beyond the teacher's is in its tail anyway.
    """

    dataset: LogitDataset
    sample_ids: list[list[str]]
    vocab_size: int
    context_tokens: int | None = None
    """Longer rows are cut, or left out; None where there are none."""
    truncate: bool = False
    tally: dict[str, int] = field(default_factory=dict)
    """What became of longer rows."""

    @property
    def temperatures(self) -> list[float]:
        return list(self.dataset.manifest.temperatures)

    @property
    def is_sampled(self) -> bool:
        return not self.dataset.manifest.row_format.has_tails

    def read_block(self, index: int) -> Sequence[Row]:
        rows = [row for row, _ in self.fitted_block(index) if row is not None]
        if self.vocab_size >= self.dataset.manifest.vocab_size:
            return rows
        tails = self.dataset.manifest.row_format.tail_temperatures
        return [replace(row, teacher=row.teacher.folded(self.vocab_size, tails)) for row in rows]

    def fitted_block(self, index: int) -> list[tuple[LogitRow | None, str | None]]:
        """Every row of a block, or none where it does not fit, with the count that it goes under."""
        rows = self.dataset.read_shard(index)
        if self.context_tokens is None:
            return [(row, None) for row in rows]
        return [fitted(row, self.context_tokens, truncate=self.truncate) for row in rows]

    def identity(self) -> dict[str, Any]:
        return {
            "dataset": str(self.dataset.folder),
            "manifest_sha256": self.dataset.identity(),
            "tally": self.tally,
        }


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text files, tokenized once and held in memory."""

    files: list[str]
    blocks: list[list[Row]]
    sample_ids: list[list[str]]
    tally: Tally
    temperatures: tuple[float, ...] = ()
    is_sampled: bool = False

    def read_block(self, index: int) -> Sequence[Row]:
        return self.blocks[index]

    def identity(self) -> dict[str, Any]:
        return {"files": self.files, "tally": asdict(self.tally)}


def open_source(settings: DataSettings, tokenizer: Any, *, vocab_size: int, context_tokens: int | None) -> Source:
    """The rows that a config names, checked against the student.

    Raises:
        MismatchError: the student's vocabulary is smaller than its tokenizer; the dataset was made with another
            tokenizer, or has rows that are too long.
        RecordError: text that cannot become rows.
    """
    num_tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if vocab_size < num_tokens:
        raise MismatchError(
            f"the tokenizer has {num_tokens} tokens, but the student's vocabulary ends at {vocab_size}",
            next_step=f"resize the student: model.resize_token_embeddings({num_tokens})",
        )
    if settings.dataset is not None:
        return _open_dataset(settings, tokenizer.backend_tokenizer, vocab_size, context_tokens)
    assert settings.text is not None
    return _read_text(settings.text, tokenizer, context_tokens)


def _read_text(settings: TextSettings, tokenizer: Any, context_tokens: int | None) -> TextSource:
    reader, tally, blocks = RecordReader(settings), Tally(), []
    records = reader.records()
    with TextRows(tokenizer, settings, context_tokens=context_tokens) as text, progress("read", None, "rows") as ticker:
        while batch := list(islice(records, TEXT_BLOCK_RECORDS)):
            blocks.append(list(text.rows(batch, tally)))
            ticker.advance(len(blocks[-1]))
    logger.info("read: %s", tally.summary())
    tally.require_rows()
    return TextSource(
        files=[file.name for file in reader.files],
        blocks=blocks,
        sample_ids=[[row.sample_id for row in block] for block in blocks],
        tally=tally,
    )


def _open_dataset(
    settings: DataSettings, tokenizer: Tokenizer, vocab_size: int, context_tokens: int | None
) -> DatasetSource:
    folder = str(settings.dataset)
    dataset = LogitDataset.open(folder)
    if dataset.manifest.missing:
        logger.warning("%s: %d damaged shards were taken out of it", folder, len(dataset.manifest.missing))
    require_same_tokenizer(
        dataset.tokenizer(), tokenizer, expected_name=f"the dataset {folder}", got_name="the student"
    )
    sample_ids = dataset.sample_ids()
    repeated = [name for name, count in Counter(chain(*sample_ids)).items() if count > 1]
    if repeated:
        raise DamagedDataError(f"{folder}: {len(repeated)} sample ids come more than once, first {repeated[0]!r}")
    longest = max((shard.longest_row for shard in dataset.manifest.shards), default=0)
    if context_tokens is None or longest <= context_tokens:
        return DatasetSource(dataset=dataset, sample_ids=sample_ids, vocab_size=vocab_size)
    if settings.on_too_long == "error":
        raise MismatchError(
            f"the student's context is {context_tokens}, but {folder} has a row of {longest} tokens",
            next_step="set data.on_too_long: drop or truncate, which count such rows",
        )
    truncate = settings.on_too_long == "truncate"
    source = DatasetSource(
        dataset=dataset, sample_ids=sample_ids, vocab_size=vocab_size, context_tokens=context_tokens, truncate=truncate
    )
    fates: Counter[str] = Counter()
    for index, shard in enumerate(dataset.manifest.shards):
        if shard.longest_row > context_tokens:
            block = source.fitted_block(index)
            sample_ids[index] = [row.sample_id for row, _ in block if row is not None]
            fates.update(fate for _, fate in block if fate is not None)
    logger.info("%s: rows longer than %d tokens%s", folder, context_tokens, losses_line(fates))
    return replace(source, tally=dict(fates))
