"""Where the student's rows come from: a sealed dataset, or text files for plain SFT.

Rows lie in blocks: the shards of a dataset, or equally long runs of text records.  Opening a source checks all that
can be checked before training starts: tokenizer, vocabulary, context, and that there are rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from shared.chat import ChatEncoder, Tally
from shared.dataset import LogitDataset
from shared.errors import MismatchError, RecordError
from shared.fingerprint import require_same_tokenizer
from shared.records import read_records
from shared.rows import Row
from student_train.config import DataSettings

TEXT_BLOCK_RECORDS = 512  # the default unit of a dump, so that text and its dataset are shuffled alike


class Source(Protocol):
    """Rows in blocks.  Ids are known without reading the rows."""

    @property
    def sample_ids(self) -> Sequence[Sequence[str]]: ...

    def read_block(self, index: int) -> Sequence[Row]: ...


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A sealed dataset; a block is a shard, and is verified whenever it is read."""

    dataset: LogitDataset
    sample_ids: list[list[str]]

    def read_block(self, index: int) -> Sequence[Row]:
        return self.dataset.read_shard(index)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text files, tokenized once and held in memory."""

    blocks: list[list[Row]]
    sample_ids: list[list[str]]
    tally: Tally

    def read_block(self, index: int) -> Sequence[Row]:
        return self.blocks[index]


def open_source(settings: DataSettings, tokenizer: Any, *, vocab_size: int, context_tokens: int | None) -> Source:
    """The rows that a config names, checked against the student.

    Raises:
        MismatchError: the dataset was made with another tokenizer or vocabulary, or has rows that are too long.
        RecordError: text that cannot become rows.
    """
    if settings.dataset is not None:
        return _open_dataset(settings.dataset, tokenizer.backend_tokenizer, vocab_size, context_tokens)
    assert settings.text is not None
    encoder = ChatEncoder(tokenizer, settings.text, context_tokens=context_tokens)
    tally, blocks = Tally(), []
    records = read_records(settings.text)
    while batch := list(islice(records, TEXT_BLOCK_RECORDS)):
        blocks.append(list(encoder.rows(batch, tally)))
    if not tally.rows:
        raise RecordError(f"{', '.join(settings.text.files)}: none of {tally.records} records gives a row")
    return TextSource(blocks=blocks, sample_ids=[[row.sample_id for row in block] for block in blocks], tally=tally)


def _open_dataset(folder: str, tokenizer: Tokenizer, vocab_size: int, context_tokens: int | None) -> DatasetSource:
    dataset = LogitDataset.open(folder)
    require_same_tokenizer(
        dataset.tokenizer(), tokenizer, expected_name=f"the dataset {folder}", got_name="the student"
    )
    if dataset.manifest.vocab_size != vocab_size:
        raise MismatchError(
            f"the teacher's vocabulary has {dataset.manifest.vocab_size} ids (config.vocab_size), the student's "
            f"{vocab_size}; the tokenizers agree, so one of the two is padded",
            next_step=f"resize the student: model.resize_token_embeddings({dataset.manifest.vocab_size})",
        )
    longest = max((shard.longest_row for shard in dataset.manifest.shards), default=0)
    if context_tokens is not None and longest > context_tokens:
        raise MismatchError(
            f"the student's context is {context_tokens}, but {folder} has a row of {longest} tokens",
            next_step=f"dump again with data.max_tokens: {context_tokens}, or take a student with a longer context",
        )
    return DatasetSource(dataset=dataset, sample_ids=dataset.sample_ids())


def source_identity(source: Source, settings: DataSettings) -> dict[str, Any]:
    """What the run trained on, for its record."""
    if isinstance(source, DatasetSource):
        return {"dataset": settings.dataset, "manifest_sha256": source.dataset.identity()}
    assert settings.text is not None
    return {"files": [str(Path(name)) for name in settings.text.files], "rows": sum(map(len, source.sample_ids))}
