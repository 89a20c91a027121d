"""What of a rollout is committed, in its output folder; several workers may write there.

    plan.json                  first
    data/part-00003.jsonl      replies of a unit that are trained on
    dropped/part-00003.jsonl   its other replies, each with the reason
    units/00003.json           after them: the unit is done
    rollout.json               last, when all units are

A unit without replies of one kind has no file of it.  On a crash the open units are lost and done again.
"""

import json
import logging
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

from shared.config import Settings
from shared.errors import DamagedDataError, MismatchError
from shared.files import sha256_of_bytes
from shared.folders import Folder
from student_train.rollout.plan import PLAN_VERSION, Plan

PLAN, RESULT, UNITS = "plan.json", "rollout.json", "units"
DATA, DROPPED = "data", "dropped"
LEFT_BEHIND_S = 3600.0

logger = logging.getLogger("logitferry")


class Part(Settings):
    """A file of replies."""

    path: str
    rows: int
    sha256: str


class Counts(Settings):
    """Of the replies of a unit, kept or not."""

    replies: int
    tokens: int
    cut: int
    right: int
    wrong: int
    """Those that the verifier marked."""
    dropped: dict[str, int]
    """By reason."""
    nll: float
    """Mean over the replies of theirs."""


class UnitRecord(Settings):
    """Committed after the unit's files: it is done."""

    number: int
    plan: str
    """The identity of the plan that it is a unit of."""
    parts: list[Part]
    counts: Counts
    seconds: float
    worker: str


class Ledger:
    """Reads and writes what is committed of the rollout in one folder."""

    def __init__(self, output: Folder) -> None:
        self.output = output

    def plan(self) -> Plan | None:
        """The plan that is there.

        Raises:
            DamagedDataError: it is none.
            MismatchError: another release made it.
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
        if b'"plan_version"' in data and f'"plan_version": {PLAN_VERSION},'.encode() not in data:
            raise MismatchError(
                f"{where}: another release of logitferry made this plan", next_step="finish with that release"
            )
        raise DamagedDataError(
            f"{where}: is no plan of a rollout",
            next_step="remove this file alone and run again, if the folder is a rollout's; its units are still good",
        )

    def commit_plan(self, plan: Plan) -> Plan:
        """Write a plan, unless there is one by now, which is given back."""
        if (earlier := self.plan()) is None:
            self.output.write(PLAN, plan.model_dump_json(indent=1).encode())
            earlier = self.plan()  # another worker's, maybe, who wrote his at the same moment
        return earlier or plan

    def done(self, plan: Plan) -> dict[int, UnitRecord]:
        """The units of this plan that are done, and whose files are there byte for byte; by their numbers."""
        found: dict[int, UnitRecord] = {}
        for path in self.output.files(UNITS):
            with suppress(FileNotFoundError, ValueError):
                record = UnitRecord.model_validate_json(self.output.read(path))
                if record.plan == plan.identity and int(PurePosixPath(path).stem) == record.number:
                    found[record.number] = record
        return {number: record for number, record in sorted(found.items()) if self._is_intact(record)}

    def commit(self, number: int, plan: Plan, texts: dict[str, bytes], **facts: Any) -> UnitRecord:
        """Make a unit durable: its files by their folders, then its record.

        Raises:
            OutputError: one cannot be written; what was committed before stays whole.
        """
        parts = []
        for folder, text in texts.items():
            path = f"{folder}/part-{number:05d}.jsonl"
            if text:
                self.output.write(path, text)
                parts.append(Part(path=path, rows=text.count(b"\n"), sha256=sha256_of_bytes(text)))
            else:  # of who was stopped before the record
                self.output.remove(path)
        record = UnitRecord(number=number, plan=plan.identity, parts=parts, **facts)
        self.output.write(f"{UNITS}/{number:05d}.json", record.model_dump_json().encode())
        return record

    def result(self) -> dict[str, Any] | None:
        """What rollout.json says, where it is there."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self.output.read(RESULT))
        return None

    def finish(self, result: dict[str, Any]) -> None:
        """Write rollout.json, and remove what writers who were killed have left."""
        self.output.sweep("part-*", older_than_s=0)
        self.output.sweep("*", older_than_s=LEFT_BEHIND_S)  # younger ones may be of somebody else who finishes just now
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        self.output.write(RESULT, text.encode())

    def _is_intact(self, record: UnitRecord) -> bool:
        return all(self.output.sha256(part.path) == part.sha256 for part in record.parts)
