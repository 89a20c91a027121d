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
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shared.card import dataset_card
from shared.config import Settings
from shared.dataset import CARD_NAME, TOKENIZER_FOLDER, LogitDataset, shard_path
from shared.errors import ConfigError, MismatchError
from shared.files import TEMPORARY_PREFIX, claim_folder, sha256_of_file, sync_folder, write_atomically
from shared.fingerprint import sha256_of_text, tokenizer_fingerprint
from shared.manifest import MANIFEST_NAME, Input, InputFile, Manifest, Shard, read_manifest, write_manifest
from shared.pretrained import context_tokens, load_tokenizer
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import LogitRow, Row
from shared.shard_writer import Storage, encode_shard
from shared.text_config import TextSettings
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings, KeepSettings
from teacher_dump.keep import Threshold, TopK
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
            keep=settings.keep.in_force(),
            temperatures=settings.temperatures,
            input=_input_identity(settings.data, reader, tally),
            unit_records=settings.unit_records,
        )
        if (output / MANIFEST_NAME).is_file():
            sealed = LogitDataset.open(output)
            plan.require_same_as_manifest(sealed.manifest, output / MANIFEST_NAME)
            if not sealed.manifest.missing:
                shutil.rmtree(output / WORK_FOLDER)
                return sealed
            _require_same_units(output, sealed.manifest, plan)
            commit_plan(plan, output / WORK_FOLDER)  # first: what is unsealed must have a plan to be checked against
            _unseal(output, sealed.manifest, plan)
        commit_plan(plan, output / WORK_FOLDER)
        untouched_logp = rule.sampled_logp if isinstance(rule, Threshold) else None
        storage = Storage(max_kl=settings.keep.max_kl, zstd_level=settings.zstd_level, untouched_logp=untouched_logp)
        units = Units(output=output, plan=plan, text=text, engine=engine, storage=storage)
        shards = [shard for shard in units.shards(reader) if shard is not None]
    if _input_identity(settings.data, reader, tally) != plan.input:
        raise MismatchError(
            f"{', '.join(settings.data.files)} changed while they were read: the dump is of neither version",
            next_step=f"remove {output} and dump again from files that stay as they are",
        )
    return _seal(output, plan, shards, tokenizer)


def keep_rule(settings: KeepSettings, tokenizer: Any) -> TopK | Threshold:
    """The rule with its always-kept tokens as ids; raises ConfigError for one that the tokenizer lacks."""
    vocabulary = tokenizer.get_vocab()
    unknown = [token for token in settings.always if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"keep.always: the tokenizer has no token {unknown[0]!r}",
            next_step="give tokens exactly as the tokenizer spells them",
        )
    ids = tuple(sorted({vocabulary[token] for token in settings.always}))
    if settings.method == "threshold":
        return Threshold(tau=settings.tau, seed=settings.seed, always_ids=ids)
    return TopK(k=settings.k, min_prob=settings.min_prob, always_ids=ids)


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


@dataclass(frozen=True, kw_only=True)
class Units:
    """The pieces of a planned dump, each of which becomes one shard and its record."""

    output: Path
    plan: Plan
    text: TextRows
    engine: TransformersEngine
    storage: Storage

    def shards(self, reader: RecordReader) -> Iterator[Shard | None]:
        """The shard of every unit in order, dumped now or found done; None for a unit that has no row."""
        records = reader.records()
        with progress("dump", self.plan.input.tally["records"], "records") as ticker:
            for unit in range(self.plan.num_units):
                batch = list(islice(records, self.plan.unit_records))
                done = _read_unit_record(self.output, unit)
                yield done.shard if done else self._dump(unit, list(self.text.rows(batch, Tally())))
                ticker.advance(len(batch))

    def _dump(self, unit: int, rows: list[Row]) -> Shard | None:
        shard = self._write_shard(unit, rows) if rows else None
        _write_unit_record(self.output, unit, shard)
        return shard

    def _write_shard(self, unit: int, rows: list[Row]) -> Shard:
        scored = [
            LogitRow(**vars(row), teacher=positions)
            for row, positions in zip(rows, self.engine.score(rows), strict=True)
        ]
        path = shard_path(unit)
        data, shard = encode_shard(scored, self.plan.row_format, self.storage, path)
        write_atomically(self.output / path, memoryview(data))
        return shard


def _unit_record_path(output: Path, unit: int) -> Path:
    return output / WORK_FOLDER / f"unit-{unit:05d}.json"


def _write_unit_record(output: Path, unit: int, shard: Shard | None) -> None:
    write_atomically(_unit_record_path(output, unit), UnitRecord(shard=shard).model_dump_json().encode())


def _read_unit_record(output: Path, unit: int) -> UnitRecord | None:
    """The record of a done unit whose shard is still there byte for byte; else None, and the unit is done again."""
    try:
        record = UnitRecord.model_validate_json(_unit_record_path(output, unit).read_bytes())
        intact = record.shard is None or sha256_of_file(output / record.shard.path) == record.shard.sha256
    except (OSError, ValueError):
        return None
    return record if intact else None


def _require_same_units(output: Path, manifest: Manifest, plan: Plan) -> None:
    """Raises MismatchError where the shards of a dataset are not the units of this plan."""
    if manifest.unit_records != plan.unit_records:
        then = manifest.unit_records
        raise MismatchError(
            f"{output}: {len(manifest.missing)} shards are missing, and "
            + (f"its units had {then} records, not {plan.unit_records}" if then else "it was merged or filtered since"),
            next_step=f"set unit_records: {then}" if then else "dump into another `output`, then merge or filter again",
        )


def _unseal(output: Path, manifest: Manifest, plan: Plan) -> None:
    """Make a repaired dataset the unfinished dump that it is, so that its missing units are done again."""
    present = {shard.path: shard for shard in manifest.shards}
    for unit in range(plan.num_units):
        if (path := shard_path(unit)) not in manifest.missing:
            _write_unit_record(output, unit, present.get(path))
    (output / MANIFEST_NAME).replace(output / WORK_FOLDER / MANIFEST_NAME)
    sync_folder(output / WORK_FOLDER)
    sync_folder(output)


def _seal(output: Path, plan: Plan, shards: list[Shard], tokenizer: Any) -> LogitDataset:
    work = output / WORK_FOLDER
    for leftover in output.rglob(f"{TEMPORARY_PREFIX}*"):  # of a run that was killed while it wrote
        leftover.unlink()
    tokenizer.save_pretrained(work / TOKENIZER_FOLDER)
    for path in filter(Path.is_file, (work / TOKENIZER_FOLDER).rglob("*")):
        write_atomically(output / path.relative_to(work), path.read_bytes())
    write_atomically(output / CARD_NAME, dataset_card(plan.manifest(shards, {}, [])).encode())
    paths = [output / CARD_NAME, *sorted((output / TOKENIZER_FOLDER).rglob("*"))]
    files = {path.relative_to(output).as_posix(): sha256_of_file(path) for path in paths if path.is_file()}
    unsealed = read_manifest(work).history if (work / MANIFEST_NAME).is_file() else []
    write_manifest(output, plan.manifest(shards, files, unsealed))
    sealed = LogitDataset.open(output)
    shutil.rmtree(work)
    return sealed
