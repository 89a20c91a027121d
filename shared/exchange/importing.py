"""Datasets of other toolkits, read row by row, become a sealed dataset of ours.

It is made aside and renamed when it is whole, so that what was interrupted can be run again.  The lists are laid
against the tokens they should predict all the while (`shared.exchange.alignment`), and nothing is sealed that is off by
one, or whose tails were normalised away without that being said.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.card import dataset_card
from shared.dataset import CARD_NAME, LogitDataset, shard_path
from shared.errors import ConfigError, DamagedDataError, MismatchError, RecordError
from shared.exchange.alignment import Alignment
from shared.exchange.foreign_tokenizer import ForeignTokenizer
from shared.exchange.lists import ForeignRow
from shared.exchange.records import ForeignRecord, foreign_records
from shared.exchange.unsaid import positions_of, wrong_lists
from shared.files import claim_folder, sha256_of_bytes, sync_tree, write_atomically
from shared.manifest import (
    CREATED_BY,
    FORMAT_VERSION,
    Input,
    InputFile,
    Manifest,
    Shard,
    Teacher,
    row_format,
    write_manifest,
)
from shared.rows import LogitRow
from shared.shard_writer import Storage, encode_shard
from shared.text_files import TextFile

logger = logging.getLogger("logitferry")

Tail = Literal["auto", "difference", "unknown"]
SHARD_ROWS = 512
SHARD_POSITIONS = 1 << 19
NORMALISED_SHARE = 0.9
"""Of lists that add up to one: more than sharp teachers leave behind."""
FEW_LISTS = 20

Reader = Callable[[ForeignRecord, str, str], list[ForeignRow]]
"""A record, its sample id and source to rows."""


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What the files do not say."""

    format: str
    columns: Sequence[str]
    read: Reader
    teacher: str
    revision: str | None
    vocab_size: int
    offset: int
    tail: Tail
    drops_wrong_lists: bool
    max_kl: float
    read_with: dict[str, Any] = field(default_factory=dict)
    """More of it, for the manifest."""

    @property
    def has_tail(self) -> bool:
        return self.tail != "unknown"


@dataclass(kw_only=True)
class _Found:
    """What has been seen so far."""

    alignment: Alignment = field(default_factory=Alignment)
    tally: Counter[str] = field(default_factory=Counter)
    most_kept: int = 0
    sample_ids: set[str] = field(default_factory=set)


def import_dataset(
    files: Sequence[TextFile],
    tokenizer: ForeignTokenizer,
    output: Path,
    settings: ImportSettings,
    on_row: Callable[[], None] = lambda: None,
) -> tuple[LogitDataset, dict[str, Any]]:
    """The sealed dataset, and what was found of its lists' alignment.

    Raises:
        RecordError: a record cannot become rows.
        MismatchError: lists predict other tokens than they are said to; their tails were normalised away; the
            vocabulary is smaller than the tokenizer's.
        ConfigError: the output is taken, or no token of all rows has a list.
    """
    tokenizer.require_within(settings.vocab_size)
    claim_folder(output, [])
    aside = output.with_name(f".{output.name}.importing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        found, shards = _Found(), list[Shard]()
        for rows in _batches(_rows(files, settings, found, on_row)):
            _require_sound(found, settings, files)
            data, shard = _encoded(rows, settings, len(shards))
            write_atomically(aside / shard.path, data)
            shards.append(shard)
        _require_sound(found, settings, files)
        if not shards:
            raise ConfigError(
                f"no supervised token of {found.tally['records']} records has a list",
                next_step="check labels, target_mask and --offset",
            )
        if not found.alignment.is_telling(settings.offset):
            logger.warning(
                "alignment: too little to tell by that offset %d is the right one; of the lists hold the token: %s",
                settings.offset,
                ", ".join(
                    f"{each['share_in_list']:.1%} at {offset}" for offset, each in found.alignment.summary().items()
                ),
            )
        _seal(aside, tokenizer, settings, found, shards, files)
        sync_tree(aside)
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return LogitDataset.open(output), found.alignment.summary()


def _rows(
    files: Sequence[TextFile], settings: ImportSettings, found: _Found, on_row: Callable[[], None]
) -> Iterator[LogitRow]:
    for file in files:
        name = Path(file.name).name
        for record in foreign_records(file, settings.columns):
            found.tally["records"] += 1
            sample_id = record.name("sample_id", "id") or f"{name}:{record.number}"
            for foreign in settings.read(record, sample_id, record.name("source") or name):
                row = _row(foreign, settings, found)
                if row is None:
                    found.tally["dropped_no_label"] += 1
                    continue
                if row.sample_id in found.sample_ids:
                    raise DamagedDataError(
                        f"{record.where}: sample id {row.sample_id!r} comes twice",
                        next_step="give files of unlike names, or records with distinct ids",
                    )
                found.sample_ids.add(row.sample_id)
                on_row()
                yield row


def _row(foreign: ForeignRow, settings: ImportSettings, found: _Found) -> LogitRow | None:
    """None where no supervised token has a list."""
    if wrong := wrong_lists(foreign):
        at, why = next(iter(wrong.items()))
        if not settings.drops_wrong_lists:
            raise RecordError(
                f"{foreign.where}: the list at index {at} {why}: these are no log-probabilities over a vocabulary",
                next_step="give log_softmax values at temperature 1; --on-wrong-list drop leaves out such lists",
            )
        foreign = foreign.without(list(wrong))
        found.tally["wrong_lists"] += len(wrong)
    found.alignment.add(foreign)
    aligned = foreign.at(settings.offset)
    found.tally["labels_without_a_list"] += aligned.num_unlisted
    if not len(aligned.counts_P):
        return None
    label_ids_P = foreign.input_ids_L[aligned.label_mask_L]
    teacher, put_right = positions_of(aligned, label_ids_P, vocab_size=settings.vocab_size, has_tail=settings.has_tail)
    found.tally.update(put_right)
    found.tally.update(rows=1, tokens=len(foreign.input_ids_L), positions=len(label_ids_P))
    found.most_kept = max(found.most_kept, int(aligned.counts_P.max()))
    return LogitRow(
        sample_id=foreign.sample_id,
        source=foreign.source,
        input_ids_L=foreign.input_ids_L,
        label_mask_L=aligned.label_mask_L,
        teacher=teacher,
    )


def _batches(rows: Iterator[LogitRow]) -> Iterator[list[LogitRow]]:
    batch: list[LogitRow] = []
    positions = 0
    for row in rows:
        batch.append(row)
        positions += row.num_positions
        if len(batch) >= SHARD_ROWS or positions >= SHARD_POSITIONS:
            yield batch
            batch, positions = [], 0
    if batch:
        yield batch


def _encoded(rows: list[LogitRow], settings: ImportSettings, number: int) -> tuple[memoryview, Shard]:
    form = row_format({"method": "topk"}, [1.0], settings.vocab_size)
    data, shard = encode_shard(rows, form, Storage(max_kl=settings.max_kl), shard_path(number))
    return memoryview(data), shard


def _require_sound(found: _Found, settings: ImportSettings, files: Sequence[TextFile]) -> None:
    where = files[0].name if len(files) == 1 else f"{len(files)} files"
    found.alignment.require(settings.offset, where)
    positions, ones = found.tally["positions"], found.tally["lists_that_add_up_to_one"]
    if settings.tail == "auto" and positions >= FEW_LISTS and ones >= NORMALISED_SHARE * positions:
        raise MismatchError(
            f"{where}: {ones:,} of {positions:,} lists add up to one: they were renormalised, and what they left out "
            "cannot be had back",
            next_step="import the log-probabilities from before, as the engine gave them; or --tail unknown, which "
            "trains with loss.tail: renormalise alone; or, of a teacher that is so sure, --tail difference",
        )


def _seal(
    folder: Path,
    tokenizer: ForeignTokenizer,
    settings: ImportSettings,
    found: _Found,
    shards: list[Shard],
    files: Sequence[TextFile],
) -> None:
    read_with = {
        "imported_from": settings.format,
        "offset": settings.offset,
        "tail": "unknown" if not settings.has_tail else "by difference from one",
        "entropy": "of the kept ids and one outcome for the rest: a lower bound",
        "realised_logprob": "where it is not kept, of all the rest: an upper bound",
        "alignment": found.alignment.summary(),
        **settings.read_with,
    }
    keep = {
        "method": "topk",
        "k": found.most_kept,
        "max_kl": settings.max_kl,
        "tail": "by_difference" if settings.has_tail else "unknown",
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        teacher=Teacher(
            name=settings.teacher,
            architecture="unknown",
            dtype="unknown",
            vocab_size=settings.vocab_size,
            engine=f"imported from {settings.format} by {CREATED_BY}",
            revision=settings.revision,
        ),
        vocab_size=settings.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        chat_template_sha256=tokenizer.chat_template_sha256,
        keep=keep,
        temperatures=[1.0],
        inputs=[
            Input(
                files=[InputFile(name=Path(file.name).name, sha256=file.sha256()) for file in files],
                settings=read_with,
                tally=dict(found.tally),
            )
        ],
        unit_records=None,
        shards=shards,
        missing=[],
        history=[],
        files={},
    )
    others = tokenizer.files | {CARD_NAME: dataset_card(manifest).encode()}
    for path, data in others.items():
        write_atomically(folder / path, data)
    digests = {path: sha256_of_bytes(data) for path, data in sorted(others.items())}
    write_manifest(folder, manifest.model_copy(update={"files": digests}))
