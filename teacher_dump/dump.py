"""Phase 1 from text files to a sealed dataset.

The input is cut into units of consecutive records.  A first pass tokenizes everything, so that a bad record is
found before the teacher has run for a night.  Then unit by unit: tokenize, score, encode, write the shard, and
last a small record that says the unit is done.  Running again skips the units whose record and shard agree.
When all are done the dataset is sealed: tokenizer, card, and last of all the manifest.

On a crash the open unit is lost and done again; nothing half-written is ever visible under its final name.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from shared.config import Settings
from shared.dataset import CARD_NAME, DATA_FOLDER, TOKENIZER_FOLDER, LogitDataset
from shared.errors import ConfigError, MismatchError
from shared.files import TEMPORARY_PREFIX, claim_folder, sha256_of_file, write_atomically
from shared.fingerprint import sha256_of_text, tokenizer_fingerprint
from shared.manifest import MANIFEST_NAME, Input, InputFile, Shard, write_manifest
from shared.pretrained import context_tokens, load_tokenizer
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import LogitRow, Row
from shared.shards import encode_shard
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from teacher_dump.card import dataset_card
from teacher_dump.config import DumpSettings, KeepSettings
from teacher_dump.keep import KeepRule
from teacher_dump.plan import Plan, commit_plan
from teacher_dump.transformers_engine import TransformersEngine

WORK_FOLDER = ".logitferry"

logger = logging.getLogger("logitferry")


class UnitRecord(Settings):
    """Committed after its shard: the unit is done."""

    shard: Shard | None
    """None where every row of the unit was dropped."""


def run_dump(settings: DumpSettings) -> LogitDataset:
    """Dump everything that is not done yet, and seal.

    Raises:
        ConfigError, RecordError: the input cannot be used.
        MismatchError: the output folder belongs to a dump with other settings, input, teacher or tokenizer.
        NonFiniteError: the teacher's logits are not numbers.
    """
    output = Path(settings.output)
    claim_folder(output, [MANIFEST_NAME, WORK_FOLDER])
    (output / WORK_FOLDER).mkdir(exist_ok=True)
    tokenizer = load_tokenizer(settings.teacher)
    rule = keep_rule(settings.keep, tokenizer)
    reader = RecordReader(settings.data)
    with TextRows(tokenizer, settings.data, context_tokens=context_tokens(settings.teacher)) as text:
        tally, largest_id = _survey(reader, text)
        engine = TransformersEngine(settings.teacher, rule, settings.temperatures)
        vocab_size = engine.identity.vocab_size
        largest_id = max(largest_id, *rule.always_ids, 0)
        if largest_id >= vocab_size:
            raise MismatchError(
                f"the tokenizer gives id {largest_id}, but the teacher's vocabulary ends at {vocab_size}",
                next_step="name the tokenizer that belongs to the teacher as teacher.tokenizer",
            )
        template = tokenizer.chat_template
        plan = Plan(
            teacher=engine.identity,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer.backend_tokenizer),
            chat_template_sha256=sha256_of_text(template) if isinstance(template, str) else None,
            keep=settings.keep.model_dump(mode="json"),
            temperatures=settings.temperatures,
            input=_input_identity(settings.data, reader, tally),
            unit_records=settings.unit_records,
        )
        if (output / MANIFEST_NAME).is_file():
            sealed = LogitDataset.open(output)
            plan.require_same(sealed.manifest.model_dump(mode="json"), output / MANIFEST_NAME)
            shutil.rmtree(output / WORK_FOLDER)
            return sealed
        commit_plan(plan, output / WORK_FOLDER)
        shards = [shard for shard in _dump_units(output, plan, reader, text, engine) if shard is not None]
    if _input_identity(settings.data, reader, tally) != plan.input:
        raise MismatchError(
            f"{', '.join(settings.data.files)} changed while they were read: the dump is of neither version",
            next_step=f"remove {output} and dump again from files that stay as they are",
        )
    return _seal(output, plan, shards, tokenizer)


def keep_rule(settings: KeepSettings, tokenizer: Any) -> KeepRule:
    """The rule with its always-kept tokens as ids; raises ConfigError for one that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in settings.always if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"keep.always: the tokenizer has no token {unknown[0]!r}",
            next_step="give tokens exactly as the tokenizer spells them",
        )
    ids = {vocabulary[token] for token in settings.always}
    return KeepRule(k=settings.k, min_prob=settings.min_prob, always_ids=tuple(sorted(ids)))


def _survey(reader: RecordReader, text: TextRows) -> tuple[Tally, int]:
    """Tokenize everything once: counts, the largest id, and every bad record before anything is run."""
    tally, largest_id = Tally(), -1
    with progress("read", None, "rows") as ticker:
        for row in text.rows(reader.records(), tally):
            largest_id = max(largest_id, int(row.input_ids_L.max()))
            ticker.advance()
    logger.info("read: %s", tally.summary())
    tally.require_rows()
    return tally, largest_id


def _input_identity(settings: TextSettings, reader: RecordReader, tally: Tally) -> Input:
    files = [InputFile(name=Path(file.name).name, sha256=file.sha256()) for file in reader.files]
    # Not how many processes tokenize, which changes nothing.
    read_with = settings.model_dump(mode="json", exclude={"files", "processes"})
    return Input(files=files, settings=read_with, tally=asdict(tally))


def _dump_units(
    output: Path, plan: Plan, reader: RecordReader, text: TextRows, engine: TransformersEngine
) -> Iterator[Shard | None]:
    """The shard of every unit in order, dumped now or found done; None for a unit that has no row."""
    records = reader.records()
    with progress("dump", plan.input.tally["records"], "records") as ticker:
        for unit in range(plan.num_units):
            batch = list(islice(records, plan.unit_records))
            done = _read_unit_record(output, unit)
            yield done.shard if done else _dump_unit(output, plan, unit, list(text.rows(batch, Tally())), engine)
            ticker.advance(len(batch))


def _dump_unit(output: Path, plan: Plan, unit: int, rows: list[Row], engine: TransformersEngine) -> Shard | None:
    shard = _write_shard(output, plan, unit, rows, engine) if rows else None
    write_atomically(_unit_record_path(output, unit), UnitRecord(shard=shard).model_dump_json().encode())
    return shard


def _write_shard(output: Path, plan: Plan, unit: int, rows: list[Row], engine: TransformersEngine) -> Shard:
    scored = [
        LogitRow(sample_id=row.sample_id, input_ids_L=row.input_ids_L, label_mask_L=row.label_mask_L, teacher=positions)
        for row, positions in zip(rows, engine.score(rows), strict=True)
    ]
    path = f"{DATA_FOLDER}/part-{unit:05d}.parquet"
    data, shard = encode_shard(scored, plan.temperatures, plan.vocab_size, path)
    write_atomically(output / path, memoryview(data))
    return shard


def _unit_record_path(output: Path, unit: int) -> Path:
    return output / WORK_FOLDER / f"unit-{unit:05d}.json"


def _read_unit_record(output: Path, unit: int) -> UnitRecord | None:
    """The record of a done unit whose shard is still there byte for byte; else None, and the unit is done again."""
    try:
        record = UnitRecord.model_validate_json(_unit_record_path(output, unit).read_bytes())
        intact = record.shard is None or sha256_of_file(output / record.shard.path) == record.shard.sha256
    except (OSError, ValueError):
        return None
    return record if intact else None


def _seal(output: Path, plan: Plan, shards: list[Shard], tokenizer: Any) -> LogitDataset:
    work = output / WORK_FOLDER
    for leftover in (output / DATA_FOLDER).glob(f"{TEMPORARY_PREFIX}*"):  # of a run that was killed while it wrote
        leftover.unlink()
    tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
    for path in filter(Path.is_file, (work / TOKENIZER_FOLDER).rglob("*")):
        write_atomically(output / path.relative_to(work), path.read_bytes())
    write_atomically(output / CARD_NAME, dataset_card(plan.manifest(shards, {})).encode())
    paths = [output / CARD_NAME, *sorted((output / TOKENIZER_FOLDER).rglob("*"))]
    files = {path.relative_to(output).as_posix(): sha256_of_file(path) for path in paths if path.is_file()}
    write_manifest(output, plan.manifest(shards, files))
    shutil.rmtree(work)
    return LogitDataset.open(output)
