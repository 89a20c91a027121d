"""What `status` says of a dump at every stage, from what is committed alone."""

from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from shared.folders import open_folder
from shared.workers import Share
from teacher_dump.dump import run_dump
from teacher_dump.ledger import Ledger, UnitRecord
from teacher_dump.status import _workers, describe, status
from tests.data import done_units, dump_settings

NOW = 1_000_000.0


def set_commits(ledger: Ledger, times: dict[int, tuple[str, float]]) -> None:
    """Say that units were committed by these workers at these times."""
    for number, record in done_units(ledger).items():
        worker, time = times[number]
        ledger.write_record(record.model_copy(update={"worker": worker, "committed_at": time}))


@pytest.fixture
def ledger(teacher_folder: Path, chats: Path, tmp_path: Path) -> Ledger:
    """Six units of which four are done."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out", unit_records=4)
    for index in range(2):
        run_dump(settings, share=Share(index, 3))
    return Ledger(open_folder(settings.output))


def test_pace_and_time_left_are_those_of_who_is_at_work(ledger: Ledger):
    done = sorted(done_units(ledger))
    assert len(done) == 4
    # One commits every 10 s; the other did every 20 s and stopped a day ago.
    set_commits(
        ledger,
        {
            done[0]: ("0/2 on quick", NOW - 12),
            done[1]: ("0/2 on quick", NOW - 2),
            done[2]: ("1/2 on lost", NOW - 86420),
            done[3]: ("1/2 on lost", NOW - 86400),
        },
    )
    found = status(ledger, NOW)
    assert (found.units, found.done, found.sealed) == (6, 4, False)
    assert found.units_per_s == pytest.approx(0.1)
    assert found.seconds_left == pytest.approx(20)
    assert found.positions_per_s == pytest.approx(0.1 * found.positions / 4)
    quick, lost = found.workers
    assert (quick.worker, quick.units, quick.unit_s, quick.at_work) == ("0/2 on quick", 2, pytest.approx(10), True)
    assert (lost.worker, lost.units, lost.last_commit_s, lost.at_work) == ("1/2 on lost", 2, 86400, False)
    told = "\n".join(describe(found, "my-dump"))
    assert "my-dump: 4 of 6 units (66.7%)" in told
    assert "6 units a minute" in told
    assert "20 s left" in told
    assert "1/2 on lost: 2 units, one in 20 s, the last 24.0 h ago; not at work" in told


def test_a_pause_between_two_runs_does_not_count(ledger: Ledger):
    done = sorted(done_units(ledger))
    times = [NOW - 90000, NOW - 89990, NOW - 10, NOW]
    set_commits(ledger, {number: ("0/1 here", time) for number, time in zip(done, times, strict=True)})
    (worker,) = status(ledger, NOW).workers
    assert worker.unit_s == pytest.approx(10)


def test_a_workers_pace_is_that_of_its_last_commits():
    times = [NOW - 5000 + 100 * n for n in range(20)] + [NOW - 24 + 2 * n for n in range(13)]
    records = [
        UnitRecord(number=n, plan="p", shard=None, worker="0/1 here", committed_at=time) for n, time in enumerate(times)
    ]
    (worker,) = _workers(records, NOW)
    assert worker.unit_s == pytest.approx(2)


def test_where_nobody_is_at_work_no_time_is_promised(ledger: Ledger):
    set_commits(ledger, dict.fromkeys(done_units(ledger), ("0/1 here", NOW - 9999)))
    found = status(ledger, NOW)
    assert found.units_per_s is found.seconds_left is None
    told = "\n".join(describe(found, "out"))
    assert "no worker has committed two units, or none is at work" in told
    assert told.endswith("next: where no worker is at work, run the same `teacher-dump run` again: it goes on")


def test_a_unit_that_failed_is_named_until_it_is_done(ledger: Ledger):
    left, done = min(set(range(6)) - done_units(ledger).keys()), min(done_units(ledger))
    for number in (left, done):
        ledger.fail(number, "2/3 on sick", ValueError("row 'a': nan\nand more"))
    found = status(ledger, NOW)
    assert [failure.number for failure in found.failed] == [left]
    (line,) = [line for line in describe(found, "out") if "failed" in line]
    assert line.startswith(f"  failed     unit {left}, 2/3 on sick, ")
    assert line.endswith("UTC: row 'a': nan")


def test_a_plan_alone_and_nothing_at_all_and_a_sealed_dataset(teacher_folder: Path, chats: Path, tmp_path: Path):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    ledger = Ledger(open_folder(settings.output))
    with pytest.raises(ConfigError, match="no dump was begun here"):
        status(ledger)
    run_dump(settings, plan_only=True)
    found = status(ledger)
    assert (found.units, found.done, found.workers) == (4, 0, [])
    run_dump(settings)
    found = status(ledger)
    assert found.sealed
    assert (found.units, found.done, found.rows) == (4, 4, 23)
    assert describe(found, "out")[-1] == "  next: logit-shards info out"


def test_all_done_and_not_sealed_says_what_to_run(teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    monkeypatch.setattr("teacher_dump.dump.seal", lambda ledger: None)
    run_dump(settings)
    found = status(Ledger(open_folder(settings.output)))
    assert found.done == found.units
    assert describe(found, "out")[-1] == "  next: teacher-dump seal out"
