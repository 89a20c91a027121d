"""Where the student's rows come from: sealed datasets, or text files for plain SFT.

Rows lie in blocks: the shards of a dataset, or equally long runs of text records.  Opening a source checks all that
can be checked before training starts: tokenizer, vocabulary, context, and that there are rows.  What leaves a source
has the student's ids, whatever the dataset's are; see `student_train.vocabulary`.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from shared.dataset import LogitDataset
from shared.errors import DamagedDataError, MismatchError
from shared.fingerprint import RowsDigest, sha256_of_json
from shared.manifest import losses_line
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import Bool, Int32, LogitRow, Row, fitted
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from student_train.asked import as_asked
from student_train.data_config import SourceSettings
from student_train.facts import Facts
from student_train.objective import Tail
from student_train.source_protocol import Manners, Source
from student_train.vocabulary import FirstRows, Vocabulary, cut_otherwise, vocabulary_of

logger = logging.getLogger("logitferry")

UNKNOWN_TOKEN = "dropped_unknown_token"
TEXT_BLOCK_RECORDS = 512  # the default unit of a dump, so that text and its dataset are shuffled alike
READERS = 16  # of sample ids, which from afar are mostly waited for
OUTLINE_READERS = 2
LOOKED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """A sealed dataset; a block is a shard, and is verified whenever it is read."""

    dataset: LogitDataset
    sample_ids: list[pa.StringArray]
    vocabulary: Vocabulary | None = None
    """Its ids in the student's vocabulary; None where they are the same.  What the student has beyond them is in the
    student's own tail."""
    mapped: FirstRows | None = None
    """What was found of the first rows where they are mapped by token."""
    cut_otherwise: str | None = None
    """For people: that the student's tokenizer, which is the same, cuts text into other tokens; see `vocabulary`."""
    temperature: float | None = 1.0
    """That the teacher's tails are read at; None leaves the teacher out."""
    context_tokens: int | None = None
    """Longer rows are cut, or left out; None where there are none."""
    truncate: bool = False
    tally: dict[str, int] = field(default_factory=dict)
    """What became of longer rows, and of those with tokens that the student lacks."""
    taken: list[Int32] | None = None
    """Which of the rows of each block, as they were fitted, it has; None for all."""
    facts: Facts | None = field(default=None, repr=False)
    manners: Manners | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.dataset.name

    @property
    def temperatures(self) -> list[float]:
        return list(self.dataset.manifest.temperatures)

    @property
    def tail(self) -> Tail:
        manifest = self.dataset.manifest
        return "none" if not manifest.row_format.has_tails else "renormalise" if manifest.tail_is_unknown else "bucket"

    @property
    def in_pieces(self) -> Sequence[str]:
        return () if self.vocabulary is None else self.vocabulary.added

    @property
    def longest_row(self) -> int:
        longest = max((shard.longest_row for shard in self.dataset.manifest.shards), default=0)
        return longest if self.context_tokens is None else min(longest, self.context_tokens)

    def at(self, temperature: float | None) -> "DatasetSource":
        if temperature is not None and self.tail == "none" and self.vocabulary is not None and self.vocabulary.lacking:
            raise MismatchError(
                f"{self.name} keeps a sample of ids, without a tail that could have tokens which the student lacks: "
                f"{self.vocabulary.line()}",
                next_step="add them to the student (its tokenizer, and model.resize_token_embeddings), or dump with "
                "keep.method: topk",
            )
        return replace(self, temperature=temperature)

    def read_block(self, index: int) -> Sequence[Row]:
        return [self._read(row) for row in self._taken(index, self.fitted(self.dataset.read_shard(index)))]

    def read_outline(self, index: int) -> Sequence[Row]:
        return self._taken(index, self.fitted(self.dataset.outlines(index)))

    def _taken(self, index: int, fitted: list[tuple[LogitRow | None, str | None]]) -> list[LogitRow]:
        rows = [row for row, _ in fitted if row is not None]
        return rows if self.taken is None else [rows[row] for row in self.taken[index]]

    def origins(self, index: int) -> pa.StringArray:
        names = self.dataset.names(index)
        places = pc.call_function("index_in", [self.sample_ids[index]], pc.SetLookupOptions(names["sample_id"]))
        return names["source"].take(places).combine_chunks()

    def taking(self, is_taken: Sequence[Bool], facts: Facts | None, manners: Manners | None) -> "DatasetSource":
        before = self.taken or [np.arange(len(ids), dtype=np.int32) for ids in self.sample_ids]
        return replace(
            self,
            sample_ids=[ids.filter(pa.array(marks)) for ids, marks in zip(self.sample_ids, is_taken, strict=True)],
            taken=[rows[marks] for rows, marks in zip(before, is_taken, strict=True)],
            facts=facts,
            manners=manners,
        )

    def _read(self, row: LogitRow) -> Row:
        if self.temperature is None:
            return row.without_teacher()
        teacher, manifest = row.teacher, self.dataset.manifest
        if self.vocabulary is not None:
            teacher = self.vocabulary.teacher(teacher, manifest.row_format.tail_temperatures)
        if self.tail != "none":
            teacher = teacher.at_temperature(manifest.temperatures.index(self.temperature))
        return replace(row, teacher=teacher)

    def fitted(self, rows: Sequence[LogitRow]) -> list[tuple[LogitRow | None, str | None]]:
        """Every row of a block with the student's ids, or none where it does not fit, with the count it goes under."""
        return [self._fitted(row) for row in rows]

    def _fitted(self, row: LogitRow) -> tuple[LogitRow | None, str | None]:
        whole, fate = row, None
        if self.context_tokens is not None:
            whole, fate = fitted(row, self.context_tokens, truncate=self.truncate)
        if whole is None or self.vocabulary is None:
            return whole, fate
        mapped = self.vocabulary.row(whole)
        if mapped is None and not self.vocabulary.lacking:  # nobody has looked for such rows: no text has them
            raise MismatchError(
                f"{self.name}: {self.vocabulary.first_unknown(whole)}, which is no token, and the student has no such",
                next_step="take the row out: logit-shards filter",
            )
        return mapped, UNKNOWN_TOKEN if mapped is None else fate

    def identity(self) -> dict[str, Any]:
        cut = {} if self.context_tokens is None else {"context_tokens": self.context_tokens, "truncate": self.truncate}
        own = self.vocabulary
        mapped = {} if own is None or own.is_same_tokenizer else {"vocabulary_sha256": own.digest()}
        return {"manifest_sha256": self.dataset.identity(), **cut, **mapped}

    def record(self) -> dict[str, Any]:
        vocabulary = {}
        if self.vocabulary is not None and self.mapped is not None:
            vocabulary = {"vocabulary": self.vocabulary.record() | {"first_rows": asdict(self.mapped)}}
        known = {"dataset": self.dataset.name, **self.identity(), **vocabulary, "tally": self.tally}
        return {**known, **_counted(self.manners)}


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text files, tokenized once and held in memory."""

    files: list[str]
    blocks: list[list[Row]]
    tally: Tally
    temperatures: tuple[float, ...] = ()
    tail: Tail = "bucket"
    in_pieces: tuple[str, ...] = ()
    facts: Facts | None = field(default=None, repr=False)
    manners: Manners | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return ", ".join(self.files)

    @property
    def sample_ids(self) -> list[pa.StringArray]:
        return [pa.array([row.sample_id for row in block], pa.string()) for block in self.blocks]

    @property
    def longest_row(self) -> int:
        return max(row.num_tokens for block in self.blocks for row in block)

    def at(self, temperature: float | None) -> "TextSource":
        assert temperature is None, "text has no teacher"
        return self

    def read_block(self, index: int) -> Sequence[Row]:
        return self.blocks[index]

    def read_outline(self, index: int) -> Sequence[Row]:
        return self.blocks[index]

    def origins(self, index: int) -> pa.StringArray:
        return pa.array([row.source for row in self.blocks[index]], pa.string())

    def taking(self, is_taken: Sequence[Bool], facts: Facts | None, manners: Manners | None) -> "TextSource":
        blocks = [
            [row for row, mark in zip(block, marks, strict=True) if mark]
            for block, marks in zip(self.blocks, is_taken, strict=True)
        ]
        return replace(self, blocks=blocks, facts=facts, manners=manners)

    def identity(self) -> dict[str, Any]:
        digest = RowsDigest()
        for block in self.blocks:
            for row in block:
                digest.add(row)
        return {"rows_digest": digest.text(), "blocks_sha256": sha256_of_json([len(block) for block in self.blocks])}

    def record(self) -> dict[str, Any]:
        return {"files": self.files, **self.identity(), "tally": asdict(self.tally), **_counted(self.manners)}


def _counted(manners: Manners | None) -> dict[str, Any]:
    return {} if manners is None else {"manners": manners.counts}


def open_source(
    settings: SourceSettings, tokenizer: Any, *, vocab_size: int, context_tokens: int | None, cache: str | None = None
) -> Source:
    """The rows that a config names, checked against the student.

    Rows of a manner that is not asked for are left out.  Where manner or curriculum ask what stands in rows, all of
    them are read; else no block is.

    Raises:
        ConfigError: there is no row of a manner that is asked for.
        DamagedDataError: see `shared.dataset`.
        MismatchError: the student's vocabulary is smaller than its tokenizer; the dataset was made with another
            tokenizer that is not to be mapped, or has rows that are too long or have tokens that the student lacks.
        RecordError: text that cannot become rows.
    """
    num_tokens = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if vocab_size < num_tokens:
        raise MismatchError(
            f"the tokenizer has {num_tokens} tokens, but the student's vocabulary ends at {vocab_size}",
            next_step=f"resize the student: model.resize_token_embeddings({num_tokens})",
        )
    if settings.dataset is not None:
        dataset = open_dataset(settings.dataset, cache)
        source: Source = _checked(dataset, settings, tokenizer.backend_tokenizer, vocab_size, context_tokens)
    else:
        assert settings.text is not None
        source = _read_text(settings.text, tokenizer, context_tokens)
    return as_asked(source, settings, tokenizer.backend_tokenizer)


def open_dataset(name: str, cache: str | None) -> LogitDataset:
    """A dataset at a path or URL; see `LogitDataset.open`."""
    return LogitDataset.open(name, cache=None if cache is None else Path(cache))


def _read_text(settings: TextSettings, tokenizer: Any, context_tokens: int | None) -> TextSource:
    reader, tally, blocks = RecordReader(settings), Tally(), []
    records = reader.records()
    with TextRows(tokenizer, settings, context_tokens=context_tokens) as text, progress("read", None, "rows") as ticker:
        while batch := list(islice(records, TEXT_BLOCK_RECORDS)):
            blocks.append(list(text.rows(batch, tally)))
            ticker.advance(len(blocks[-1]))
    logger.info("read: %s", tally.summary())
    tally.require_rows()
    return TextSource(files=[file.name for file in reader.files], blocks=blocks, tally=tally)


def _checked(
    dataset: LogitDataset, settings: SourceSettings, tokenizer: Tokenizer, vocab_size: int, context_tokens: int | None
) -> DatasetSource:
    manifest, name = dataset.manifest, dataset.name
    if manifest.missing:
        logger.warning("%s: %d damaged shards were taken out of it", name, len(manifest.missing))
    is_mapped = bool(settings.map_vocabulary)
    vocabulary = vocabulary_of(dataset, tokenizer, num_student_ids=vocab_size, is_mapped=is_mapped)
    with ThreadPoolExecutor(READERS if dataset.origin else 1) as readers:
        tables = list(readers.map(dataset.names, range(len(manifest.shards))))
    sample_ids = [table["sample_id"].combine_chunks() for table in tables]
    _require_unique(pa.chunked_array(sample_ids, pa.string()), name)
    longest = max((shard.longest_row for shard in manifest.shards), default=0)
    limit = None if context_tokens is None or longest <= context_tokens else context_tokens
    if limit is not None and settings.on_too_long == "error":
        raise MismatchError(
            f"the student's context is {context_tokens}, but {name} has a row of {longest} tokens",
            next_step="set data.on_too_long: drop or truncate, which count such rows",
        )
    source = DatasetSource(
        dataset=dataset,
        sample_ids=sample_ids,
        vocabulary=vocabulary,
        context_tokens=limit,
        truncate=settings.on_too_long == "truncate",
    )

    def first_rows() -> list[LogitRow]:
        return dataset.read_shard(0)[:LOOKED_ROWS] if manifest.shards else []

    is_same = vocabulary is None or vocabulary.is_same_tokenizer
    if is_same and (said := cut_otherwise(first_rows, dataset.tokenizer(), tokenizer)):
        logger.warning("%s: %s", name, said)
        source = replace(source, cut_otherwise=said)
    if vocabulary is not None:
        logger.info("%s: %s", name, vocabulary.line())
        if not is_same:
            mapped = FirstRows.of(first_rows(), vocabulary, dataset.tokenizer(), tokenizer)
            logger.log(logging.WARNING if mapped.is_cut_otherwise else logging.INFO, "%s: %s", name, mapped.line())
            source = replace(source, mapped=mapped)
    return _without_misfits(source, drops_unknown=settings.map_vocabulary == "drop")


def _without_misfits(source: DatasetSource, *, drops_unknown: bool) -> DatasetSource:
    """With the ids of those rows alone that fit; shards that may have others are read for it.

    Raises:
        MismatchError: a row has a token that the student lacks and is not to be dropped, or all of them have.
    """
    limit, own, shards = source.context_tokens, source.vocabulary, source.dataset.manifest.shards
    lacks = own is not None and bool(own.lacking)
    some = [index for index, shard in enumerate(shards) if lacks or (limit and shard.longest_row > limit)]
    if not some:
        return source
    fates, first_unknown = Counter[str](), None
    with progress("look at rows", len(some), "blocks") as ticker, ThreadPoolExecutor(OUTLINE_READERS) as readers:

        def look(index: int) -> tuple[list[str], list[str], str | None]:
            rows = source.dataset.outlines(index)
            results = source.fitted(rows)
            ticker.advance(1)
            unknown = [row for row, (_, fate) in zip(rows, results, strict=True) if fate == UNKNOWN_TOKEN]
            first = own.first_unknown(unknown[0]) if own is not None and unknown else None
            return [row.sample_id for row, _ in results if row], [fate for _, fate in results if fate], first

        try:
            for index, (ids, found, first) in zip(some, readers.map(look, some), strict=True):
                source.sample_ids[index] = pa.array(ids, pa.string())
                fates.update(found)
                first_unknown = first_unknown or first
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    num_rows, num_left = source.dataset.manifest.total("rows"), sum(map(len, source.sample_ids))
    if fates[UNKNOWN_TOKEN] and not (drops_unknown and num_left):
        drop_them = "set map_vocabulary: drop, which drops such rows and counts them, or "
        raise MismatchError(
            f"{source.name}: {fates[UNKNOWN_TOKEN]:,} of {num_rows:,} rows have tokens that the student lacks, "
            f"the first: {first_unknown}",
            next_step=f"{'' if drops_unknown else drop_them}add the tokens to the student: its tokenizer, and "
            "model.resize_token_embeddings",
        )
    logger.info("%s: %d of %d rows%s", source.name, num_left, num_rows, losses_line(fates))
    return replace(source, tally=dict(fates))


def _require_unique(sample_ids: pa.ChunkedArray, name: str) -> None:
    num_repeats = len(sample_ids) - pc.call_function("count_distinct", [sample_ids]).as_py()
    if num_repeats:
        first = next(each["values"] for each in sample_ids.value_counts().to_pylist() if each["counts"] > 1)
        raise DamagedDataError(f"{name}: {num_repeats} sample ids come again, first {first!r}")
