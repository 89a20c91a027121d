"""What of a dump is committed, in a folder beside the data; nothing else is known of a dump by any of its workers.

    .logitferry/plan.json              the plan, after the tokenizer's files that it names
    .logitferry/tokenizer/             for the one who seals, who need not have the teacher
    .logitferry/units/00042.json       after its shard: the unit is done
    .logitferry/failed/00042.json      why a unit stopped a worker
    .logitferry/manifest.json          of a dataset that was sealed and is an unfinished dump again
    data/part-00042.parquet
    manifest.json                      last of all; then .logitferry is removed

On a crash the open units are lost and done again.  Two workers do the same unit only where a run is started beside
another one that has the same share.  Then the first commit stays, except where both write a shard at the same time.
All digests are compared before the manifest is written, and who writes a shard into a sealed dataset says so.
"""

import logging
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa

from shared.config import Settings
from shared.dataset import shard_path
from shared.errors import DamagedDataError, DamagedManifestError, DamagedShardError, LogitferryError, MismatchError
from shared.files import sha256_of_bytes
from shared.folders import Folder
from shared.manifest import MANIFEST_NAME, WORK_FOLDER, Manifest, Shard, parse_manifest
from teacher_dump.plan import PLAN_VERSION, Plan

PLAN = f"{WORK_FOLDER}/plan.json"
UNITS, FAILED = f"{WORK_FOLDER}/units", f"{WORK_FOLDER}/failed"
UNSEALED_MANIFEST = f"{WORK_FOLDER}/{MANIFEST_NAME}"
OURS = (MANIFEST_NAME, WORK_FOLDER)
"""An output folder that holds neither is not ours."""
READERS = 8
LEFT_BEHIND_S = 3600.0

logger = logging.getLogger("logitferry")

S = TypeVar("S", bound=Settings)


class Unscorable(Settings):
    """A row that the teacher could not score."""

    sample_id: str
    source: str
    reason: str


class UnitRecord(Settings):
    """Committed after the unit's shard: it is done."""

    number: int
    plan: str
    """The identity of the plan that it is a unit of."""
    shard: Shard | None
    """None where the unit has no rows."""
    unscorable: list[Unscorable] = []
    worker: str
    committed_at: float | None = None
    """Seconds since 1970, by the worker's clock; null for what a repaired dataset had."""


class Failure(Settings):
    """Why a unit stopped a worker; of no account once the unit is done."""

    number: int
    worker: str
    failed_at: float
    error: str


@dataclass(frozen=True, kw_only=True)
class EncodedUnit:
    """A unit that is ready to be committed."""

    record: UnitRecord
    data: pa.Buffer | None
    num_records: int


class Ledger:
    """Reads and writes what is committed of the dump in one output folder."""

    def __init__(self, output: Folder) -> None:
        self.output = output

    def sealed(self) -> Manifest | None:
        """The manifest, where the dataset is sealed.

        Raises:
            DamagedManifestError, UnknownVersionError: it cannot be read.
        """
        try:
            return parse_manifest(self.output.read(MANIFEST_NAME), f"{self.output.name}/{MANIFEST_NAME}")
        except FileNotFoundError:
            return None
        except DamagedManifestError as error:
            if not self.output.exists(PLAN):
                raise
            # Where an upload shows while it goes on, as over sftp, one that was cut leaves a part.
            logger.warning("%s; the dump is not sealed yet, and it will be written again", error.args[0])
            return None

    def plan(self) -> Plan | None:
        """The plan that is there.

        Raises:
            DamagedDataError: it is none.
            MismatchError: another release made it, otherwise than this one would.
        """
        where = f"{self.output.name}/{PLAN}"
        try:
            data = self.output.read(PLAN)
        except FileNotFoundError:
            return None
        with suppress(ValueError):
            plan = Plan.model_validate_json(data)
            if plan.plan_version == PLAN_VERSION:
                return plan
        if b'"created_by"' in data and f'"plan_version": {PLAN_VERSION},'.encode() not in data:
            raise MismatchError(
                f"{where}: another release of logitferry made this plan", next_step="finish the dump with that release"
            )
        raise DamagedDataError(
            f"{where}: is no plan",
            next_step="remove this file alone and run again: the same plan is made, and its units are still good",
        )

    def commit_plan(self, plan: Plan, files: dict[str, bytes]) -> Plan:
        """Write a plan and the files it names, unless there is one by now, which is given back."""
        if (earlier := self.plan()) is None:
            for path, data in files.items():
                self.output.write(f"{WORK_FOLDER}/{path}", data)
            self.output.write(PLAN, plan.model_dump_json(indent=1).encode())
            earlier = self.plan()  # another worker's, maybe, who wrote his at the same moment
        return earlier or plan

    def tokenizer_files(self, plan: Plan) -> dict[str, bytes]:
        """By their paths in the dataset; raises DamagedDataError where one is not what it was."""
        found: dict[str, bytes] = {}
        for path, digest in plan.files.items():
            with suppress(FileNotFoundError):
                found[path] = self.output.read(f"{WORK_FOLDER}/{path}")
            if path not in found or sha256_of_bytes(found[path]) != digest:
                raise DamagedDataError(
                    f"{self.output.name}/{WORK_FOLDER}/{path}: {'damaged' if path in found else 'is missing'}",
                    next_step=f"copy it from the teacher's tokenizer; its sha256 is {digest}",
                )
        return found

    def records(self, plan: Plan) -> dict[int, UnitRecord]:
        """Of all units of this plan that are done, by their numbers; their shards are not looked at."""
        found = self._numbered(UNITS, UnitRecord)
        ours = {number: record for number, record in found.items() if record.plan == plan.identity}
        if len(ours) < len(found):
            logger.warning("%d units were done by another plan and are not taken as done", len(found) - len(ours))
        return ours

    def failures(self) -> dict[int, Failure]:
        """Of all units that stopped a worker, by their numbers."""
        return self._numbered(FAILED, Failure)

    def intact(self, records: Collection[UnitRecord]) -> dict[int, UnitRecord]:
        """Those whose shards are there byte for byte, by their numbers."""
        with ThreadPoolExecutor(READERS) as executor:
            are = executor.map(self._is_intact, records)
            return {record.number: record for record, is_intact in zip(records, are, strict=True) if is_intact}

    def forget(self, number: int) -> None:
        """Of a unit whose shard is damaged or gone: it is not done."""
        self.output.remove(_record_path(number))

    def commit(self, unit: EncodedUnit) -> EncodedUnit:
        """Make a unit durable: its shard, then its record.

        Raises:
            OutputError: one cannot be written; what was committed before stays whole.
            DamagedShardError: others did the unit and sealed the dataset while its shard was written, which replaced
                theirs by one with other digits.
        """
        record = unit.record
        if self._is_done_by_others(record.number, record.plan):
            logger.warning("unit %d was done by another worker meanwhile, whose result stays", record.number)
            return unit
        if record.shard is not None:
            assert unit.data is not None
            self.output.write(record.shard.path, memoryview(unit.data))
        self.write_record(record.model_copy(update={"committed_at": time.time()}))
        if record.shard is not None and (sealed := self.sealed()) is not None and record.shard not in sealed.shards:
            raise DamagedShardError(
                f"{self.output.name}/{record.shard.path}: was written late, into a dataset that others had sealed",
                next_step=f"logit-shards repair {self.output.name}, then run the same `teacher-dump run` again",
            )
        return unit

    def write_record(self, record: UnitRecord) -> None:
        """Say that a unit is done whose shard is there."""
        self.output.write(_record_path(record.number), record.model_dump_json().encode())

    def fail(self, number: int, worker: str, error: Exception) -> None:
        """Note what a unit ended in; says nothing where even that cannot be written, since the error itself is told."""
        failure = Failure(number=number, worker=worker, failed_at=time.time(), error=str(error) or type(error).__name__)
        with suppress(LogitferryError):
            self.output.write(f"{FAILED}/{number:05d}.json", failure.model_dump_json().encode())

    def clear(self) -> None:
        """Remove all but the dataset."""
        self.output.remove(WORK_FOLDER)
        self.output.sweep("part-*", older_than_s=0)
        self.output.sweep("*", older_than_s=LEFT_BEHIND_S)  # younger ones may be of somebody else who seals just now

    def _numbered(self, below: str, kind: type[S]) -> dict[int, S]:
        paths = [path for path in self.output.files(below) if path.endswith(".json")]
        found: dict[int, S] = {}
        try:
            read = self.output.read_all(paths)
        except FileNotFoundError:  # removed since they were listed, as by who has sealed the dataset
            return {}
        for path, data in zip(paths, read, strict=True):
            try:
                found[int(PurePosixPath(path).stem)] = kind.model_validate_json(data)
            except ValueError:
                logger.warning("%s/%s: damaged: its unit is not taken as done", self.output.name, path)
        return found

    def _is_intact(self, record: UnitRecord) -> bool:
        shard = record.shard
        return shard is None or (
            shard.path == shard_path(record.number) and self.output.sha256(shard.path) == shard.sha256
        )

    def _is_done_by_others(self, number: int, plan: str) -> bool:
        if self.sealed() is not None:
            return True
        try:
            record = UnitRecord.model_validate_json(self.output.read(_record_path(number)))
        except (FileNotFoundError, ValueError):
            return False
        return record.plan == plan and self._is_intact(record)


def _record_path(number: int) -> str:
    return f"{UNITS}/{number:05d}.json"
