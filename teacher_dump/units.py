"""Units of consecutive records: read and tokenized, scored by the teacher, and encoded as a shard."""

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice, takewhile

from shared.dataset import shard_path
from shared.errors import MismatchError, NonFiniteError
from shared.fingerprint import RowsDigest
from shared.manifest import Teacher
from shared.records import RecordReader
from shared.rows import LogitRow, Positions, Row
from shared.schema import RowFormat
from shared.shard_writer import Storage, encode_shard
from shared.text_rows import Tally, TextRows
from teacher_dump.config import DumpSettings, TeacherSettings
from teacher_dump.engines import open_engine
from teacher_dump.keep import Threshold, TopK
from teacher_dump.ledger import EncodedUnit, UnitRecord, Unscorable
from teacher_dump.plan import Plan
from teacher_dump.scoring import Engine, require_finite

logger = logging.getLogger("logitferry")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """The rows of some consecutive records."""

    number: int
    num_records: int
    rows: list[Row]


def read_units(
    reader: RecordReader, text: TextRows, plan: Plan, wanted: Collection[int], stop: threading.Event
) -> Iterator[Unit]:
    """The units of these numbers, in order; records of others are read, not tokenized.  `stop` ends it at any record.

    Raises:
        MismatchError: a unit's rows are not those of the plan.
    """
    records = takewhile(lambda _: not stop.is_set(), reader.records())
    for number in range(max(wanted) + 1):
        batch = islice(records, plan.unit_records)
        if number not in wanted:
            deque(batch, maxlen=0)
            continue
        of_unit = list(batch)
        rows, digest = list(text.rows(of_unit, Tally())), RowsDigest()
        if stop.is_set():
            return
        for row in rows:
            digest.add(row)
        if digest.text() != plan.unit_digests[number]:
            raise MismatchError(
                f"unit {number}, from record {number * plan.unit_records} on: its rows are not those of the plan: the "
                "input was changed since, or what tokenizes it",
                next_step="put back what was changed and run again, or dump into another `output`",
            )
        yield Unit(number=number, num_records=len(of_unit), rows=rows)


@dataclass(frozen=True, kw_only=True)
class UnitWork:
    """All that it takes to turn units into shards, wherever that is done."""

    plan: str
    """Its identity."""
    teacher: TeacherSettings
    identity: Teacher
    rule: TopK | Threshold
    longest_row: int
    row_format: RowFormat
    storage: Storage
    skips_unscorable: bool

    @staticmethod
    def of(settings: DumpSettings, plan: Plan, rule: TopK | Threshold) -> "UnitWork":
        return UnitWork(
            plan=plan.identity,
            teacher=settings.teacher,
            identity=plan.contents.teacher,
            rule=rule,
            longest_row=plan.longest_row,
            row_format=plan.row_format,
            storage=storage_of(settings, rule),
            skips_unscorable=settings.on_unscorable == "skip",
        )

    def open_engine(
        self, load: Callable[..., AbstractContextManager[Engine]] = open_engine
    ) -> AbstractContextManager[Engine]:
        """Load the teacher."""
        return load(self.teacher, self.identity, self.rule, self.row_format.temperatures, longest_row=self.longest_row)

    def encoded(self, unit: Unit, positions: Iterable[Positions], worker: str) -> EncodedUnit:
        """The shard of a unit, from what the teacher said of its rows.

        Raises:
            NonFiniteError: a row cannot be scored, and the settings do not let it go.
        """
        rows: list[LogitRow] = []
        unscorable: list[Unscorable] = []
        for row, of_row in zip(unit.rows, positions, strict=True):
            try:
                require_finite(row, of_row)
            except NonFiniteError as error:
                if not self.skips_unscorable:
                    raise
                logger.warning("skipped: %s", error.args[0])
                unscorable.append(Unscorable(sample_id=row.sample_id, source=row.source, reason=error.args[0]))
                continue
            rows.append(LogitRow(**vars(row), teacher=of_row))
        data, shard = None, None
        if rows:
            data, shard = encode_shard(rows, self.row_format, self.storage, shard_path(unit.number))
        record = UnitRecord(number=unit.number, plan=self.plan, shard=shard, unscorable=unscorable, worker=worker)
        return EncodedUnit(record=record, data=data, num_records=unit.num_records)


def scored_units(
    units: Generator[Unit], engine: AbstractContextManager[Engine], on_error: Callable[[int, Exception], None]
) -> Iterator[tuple[Unit, list[Positions]]]:
    """What the teacher says of each unit; `on_error` is told which one it was at when it failed."""
    under_way: deque[Unit] = deque()
    unread: list[Exception] = []

    def rows() -> Iterator[list[Row]]:
        try:
            for unit in units:
                under_way.append(unit)
                yield unit.rows
        except Exception as error:  # no fault of the unit that is being scored
            unread.append(error)
            raise

    with engine as opened, closing(units), closing(opened.score(rows())) as scored:
        while True:
            try:
                positions = next(scored, None)
            except Exception as error:
                if under_way and not unread:
                    on_error(under_way[0].number, error)
                raise
            if positions is None:
                return
            yield under_way.popleft(), positions


def storage_of(settings: DumpSettings, rule: TopK | Threshold) -> Storage:
    """How the values of a dump are stored; the weight of a sampled id is a constant and is not rounded."""
    untouched_logp = rule.sampled_logp if isinstance(rule, Threshold) else None
    return Storage(max_kl=settings.keep.max_kl, zstd_level=settings.zstd_level, untouched_logp=untouched_logp)


def this_process() -> str:
    """For people who look for it in a cluster."""
    return f"{socket.gethostname()}, process {os.getpid()}"
