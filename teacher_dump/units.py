"""Units of consecutive records: read, scored by the teacher, encoded and committed side by side.

A unit is done when its shard and, after it, a small record of it are on disk.  Running again skips the units whose
record and shard agree.  On a crash the open units are lost and done again; nothing half-written is ever visible
under its final name.

While the teacher scores one unit, the next is read and tokenized in a thread, and the one before is rounded, encoded,
hashed and written in another.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shared.config import Settings
from shared.dataset import shard_path
from shared.errors import MismatchError
from shared.files import sha256_of_file, write_atomically
from shared.manifest import Manifest, Shard
from shared.overlap import Stopwatch, made_ahead, put_away
from shared.progress import progress
from shared.records import RecordReader
from shared.rows import LogitRow, Positions, Row
from shared.shard_writer import Storage, encode_shard
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings
from teacher_dump.keep import Threshold, TopK
from teacher_dump.plan import Plan
from teacher_dump.scoring import Engine, require_finite

WORK_FOLDER = ".logitferry"
UNITS_AHEAD = 2

logger = logging.getLogger("logitferry")


class UnitRecord(Settings):
    """Committed after its shard: the unit is done."""

    shard: Shard | None
    """None where every row of the unit was dropped."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The rows of some consecutive records."""

    number: int
    num_records: int
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Units:
    """All units of a plan."""

    output: Path
    plan: Plan
    text: TextRows
    storage: Storage
    open_engine: Callable[[], AbstractContextManager[Engine]]
    """Loads the teacher, which happens only where a unit is left to do."""

    def shards(self, reader: RecordReader) -> list[Shard]:
        """The shard of every unit that has rows, in order, dumped now or found done.

        Raises:
            NonFiniteError: the teacher's logits are not numbers.
        """
        num_units, unit_records = self.plan.num_units, self.plan.unit_records
        shards: dict[int, Shard | None] = {}
        for number in range(num_units):
            if (done := read_unit_record(self.output, number)) is not None:
                shards[number] = done.shard
        if len(shards) < num_units:
            if shards:
                logger.info("%d of %d units are done already", len(shards), num_units)
            todo = [number for number in range(num_units) if number not in shards]
            with progress("dump", min(len(todo) * unit_records, self.plan.input.tally["records"]), "records") as ticker:
                for unit, shard in self._dumped(reader, set(todo)):
                    shards[unit.number] = shard
                    ticker.advance(unit.num_records)
        return [shard for _, shard in sorted(shards.items()) if shard is not None]

    def _dumped(self, reader: RecordReader, todo: set[int]) -> Iterator[tuple[Unit, Shard | None]]:
        """Every unit to do, and its shard, once it is committed."""
        watch = Stopwatch("text", "the teacher", "writing")
        units = watch.of("text", made_ahead(self._read(reader, todo), UNITS_AHEAD))
        scored = watch.of("the teacher", self._scored(units))
        yield from watch.of("writing", put_away(self._commit, scored, UNITS_AHEAD))
        logger.info("waited for %s", watch.summary())

    def _read(self, reader: RecordReader, todo: set[int]) -> Iterator[Unit]:
        records = reader.records()
        for number in range(self.plan.num_units):
            batch = list(islice(records, self.plan.unit_records))
            if number in todo:
                yield Unit(number=number, num_records=len(batch), rows=list(self.text.rows(batch, Tally())))

    def _scored(self, units: Generator[Unit]) -> Iterator[tuple[Unit, list[Positions]]]:
        with self.open_engine() as engine:
            under_way: deque[Unit] = deque()

            def rows() -> Iterator[list[Row]]:
                for unit in units:
                    under_way.append(unit)
                    yield unit.rows

            with closing(units), closing(engine.score(rows())) as scored:
                for positions in scored:
                    yield under_way.popleft(), positions

    def _commit(self, scored: tuple[Unit, list[Positions]]) -> tuple[Unit, Shard | None]:
        unit, positions = scored
        shard = self._write_shard(unit, positions) if unit.rows else None
        write_unit_record(self.output, unit.number, shard)
        return unit, shard

    def _write_shard(self, unit: Unit, positions: list[Positions]) -> Shard:
        rows: list[LogitRow] = []
        for row, of_row in zip(unit.rows, positions, strict=True):
            require_finite(row, of_row)
            rows.append(LogitRow(**vars(row), teacher=of_row))
        path = shard_path(unit.number)
        data, shard = encode_shard(rows, self.plan.row_format, self.storage, path)
        write_atomically(self.output / path, memoryview(data))
        return shard


def storage_of(settings: DumpSettings, rule: TopK | Threshold) -> Storage:
    """How the values of a dump are stored; the weight of a sampled id is a constant and is not rounded."""
    untouched_logp = rule.sampled_logp if isinstance(rule, Threshold) else None
    return Storage(max_kl=settings.keep.max_kl, zstd_level=settings.zstd_level, untouched_logp=untouched_logp)


def _unit_record_path(output: Path, number: int) -> Path:
    return output / WORK_FOLDER / f"unit-{number:05d}.json"


def write_unit_record(output: Path, number: int, shard: Shard | None) -> None:
    write_atomically(_unit_record_path(output, number), UnitRecord(shard=shard).model_dump_json().encode())


def read_unit_record(output: Path, number: int) -> UnitRecord | None:
    """The record of a done unit whose shard is still there byte for byte; else None, and the unit is done again."""
    try:
        record = UnitRecord.model_validate_json(_unit_record_path(output, number).read_bytes())
        intact = record.shard is None or sha256_of_file(output / record.shard.path) == record.shard.sha256
    except (OSError, ValueError):
        return None
    return record if intact else None


def require_same_units(output: Path, manifest: Manifest, plan: Plan) -> None:
    """Raises MismatchError where the shards of a dataset are not the units of this plan."""
    if manifest.unit_records != plan.unit_records:
        then = manifest.unit_records
        raise MismatchError(
            f"{output}: {len(manifest.missing)} shards are missing, and "
            + (f"its units had {then} records, not {plan.unit_records}" if then else "it was merged or filtered since"),
            next_step=f"set unit_records: {then}" if then else "dump into another `output`, then merge or filter again",
        )


def records_of_present_shards(output: Path, manifest: Manifest, plan: Plan) -> None:
    """Write the unit records of a dataset's shards, so that only its missing ones are left to do."""
    present = {shard.path: shard for shard in manifest.shards}
    for number in range(plan.num_units):
        if (path := shard_path(number)) not in manifest.missing:
            write_unit_record(output, number, present.get(path))
