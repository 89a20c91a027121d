"""How far a dump is, from what is committed alone: any machine that reaches the output can say so.

A worker's pace is the median time between its last commits, so that a pause between two runs does not count.  It
counts as at work while its last commit is not much older than that.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

from shared.amounts import duration
from shared.errors import ConfigError
from shared.manifest import Manifest
from teacher_dump.ledger import Failure, Ledger, UnitRecord

LAST_COMMITS = 12
AT_WORK_S = 120.0
AT_WORK_INTERVALS = 4.0


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    worker: str
    units: int
    last_commit_s: float
    """Seconds ago, by the clocks of the worker and of this machine."""
    unit_s: float | None
    """Seconds for a unit; null before its second commit."""
    at_work: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    sealed: bool
    units: int
    done: int
    rows: int
    positions: int
    size_bytes: int
    unscorable: int
    units_per_s: float | None = None
    """Of all workers that are at work together; null where nobody is, or nobody's pace is known."""
    positions_per_s: float | None = None
    seconds_left: float | None = None
    workers: list[WorkerStatus] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    """Units that stopped a worker and are not done since."""


def status(ledger: Ledger, now: float | None = None) -> Status:
    """Raises ConfigError where no dump was begun; see also `Ledger`."""
    now = time.time() if now is None else now
    plan, failures = ledger.plan(), ledger.failures()
    records = ledger.records(plan) if plan is not None else {}
    if (sealed := ledger.sealed()) is not None:  # after what sealing removes was read
        return _of_sealed(sealed)
    if plan is None:
        raise ConfigError(
            f"{ledger.output.name}: no dump was begun here",
            next_step="check the path; `teacher-dump run` begins with its plan, which takes one reading of the input",
        )
    shards = [record.shard for record in records.values() if record.shard is not None]
    positions = sum(shard.positions for shard in shards)
    workers = _workers(list(records.values()), now)
    at_work = [worker for worker in workers if worker.at_work]
    known = [worker.unit_s for worker in at_work if worker.unit_s]
    # One that has not committed twice yet is as quick as the others.
    rate = len(at_work) * statistics.fmean(1 / unit_s for unit_s in known) if known else None
    return Status(
        sealed=False,
        units=plan.num_units,
        done=len(records),
        rows=sum(shard.rows for shard in shards),
        positions=positions,
        size_bytes=sum(shard.size_bytes for shard in shards),
        unscorable=sum(len(record.unscorable) for record in records.values()),
        units_per_s=rate,
        positions_per_s=rate * positions / len(records) if rate else None,
        seconds_left=(plan.num_units - len(records)) / rate if rate else None,
        workers=workers,
        failed=[failure for number, failure in sorted(failures.items()) if number not in records],
    )


def _workers(records: list[UnitRecord], now: float) -> list[WorkerStatus]:
    commits: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.committed_at is not None:
            commits[record.worker].append(record.committed_at)
    found: list[WorkerStatus] = []
    for worker, times in sorted(commits.items()):
        times.sort()
        waits = [later - earlier for earlier, later in pairwise(times)][-LAST_COMMITS:]
        unit_s = max(statistics.median(waits), 1e-3) if waits else None
        ago_s = now - times[-1]
        at_work = ago_s < max(AT_WORK_S, AT_WORK_INTERVALS * (unit_s or 0))
        found.append(WorkerStatus(worker=worker, units=len(times), last_commit_s=ago_s, unit_s=unit_s, at_work=at_work))
    return found


def _of_sealed(manifest: Manifest) -> Status:
    return Status(
        sealed=True,
        units=len(manifest.shards) + len(manifest.missing),
        done=len(manifest.shards),
        rows=manifest.total("rows"),
        positions=manifest.total("positions"),
        size_bytes=manifest.total("size_bytes"),
        unscorable=sum(each.tally.get("unscorable", 0) for each in manifest.inputs),
    )


def describe(found: Status, output: str) -> list[str]:
    """For people."""
    amounts = f"{found.rows:,} rows, {found.positions:,} positions, {found.size_bytes / 1e6:,.1f} MB"
    if found.sealed:
        missing = found.units - found.done
        state = f"sealed, and {missing} shards are missing" if missing else "sealed"
        step = "run the same `teacher-dump run` again" if missing else f"logit-shards info {output}"
        return [f"{output}: {state}; {amounts}", f"  next: {step}"]
    lines = [f"{output}: {found.done} of {found.units} units ({found.done / found.units:.1%}); {amounts}"]
    if found.unscorable:
        lines.append(f"  unscorable {found.unscorable:,} rows were skipped")
    if found.units_per_s and found.positions_per_s and found.seconds_left is not None:
        pace = f"{60 * found.units_per_s:.3g} units a minute, {found.positions_per_s:,.0f} positions/s"
        lines.append(f"  pace       {pace}; {duration(found.seconds_left)} left")
    elif found.done < found.units:
        lines.append("  pace       not known: no worker has committed two units, or none is at work")
    for worker in found.workers:
        pace = f", one in {duration(worker.unit_s)}" if worker.unit_s else ""
        state = "" if worker.at_work else "; not at work"
        lines.append(
            f"  worker     {worker.worker}: {worker.units} units{pace}, "
            f"the last {duration(worker.last_commit_s)} ago{state}"
        )
    for failure in found.failed:
        when = datetime.fromtimestamp(failure.failed_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
        lines.append(f"  failed     unit {failure.number}, {failure.worker}, {when}: {failure.error.splitlines()[0]}")
    if found.done == found.units:
        lines.append(f"  next: teacher-dump seal {output}")
    elif found.failed or not any(worker.at_work for worker in found.workers):
        lines.append("  next: where no worker is at work, run the same `teacher-dump run` again: it goes on")
    return lines
