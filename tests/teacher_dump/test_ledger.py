"""What is committed: a unit is done when its shard is there and is what its record says, and not before."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shared.dataset import LogitDataset
from shared.errors import DamagedDataError, DamagedManifestError, DamagedShardError, MismatchError, OutputError
from shared.folders import LocalFolder, open_folder
from shared.workers import Share
from teacher_dump import dump
from teacher_dump.dump import run_dump
from teacher_dump.engines import open_engine
from teacher_dump.ledger import EncodedUnit, Ledger
from tests.data import done_units, dump_settings, sealed_dump


@pytest.fixture
def begun(teacher_folder: Path, chats: Path, tmp_path: Path) -> Any:
    """Settings of a dump of four units of which worker 0 of 2 has done its two."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    assert run_dump(settings, share=Share(0, 2)) is None
    return settings


def ledger_of(settings: Any) -> Ledger:
    return Ledger(open_folder(settings.output))


def test_a_unit_is_done_when_shard_and_record_agree(begun: Any):
    ledger = ledger_of(begun)
    records = done_units(ledger)
    assert len(records) == 2
    assert ledger.intact(records.values()) == records
    first = min(records)
    shard = Path(begun.output) / records[first].shard.path  # pyright: ignore[reportOptionalMemberAccess]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert ledger.intact(records.values()).keys() == records.keys() - {first}
    shard.unlink()
    assert ledger.intact(records.values()).keys() == records.keys() - {first}


def test_a_damaged_record_is_told_and_its_unit_done_again(
    begun: Any, sealed: LogitDataset, caplog: pytest.LogCaptureFixture
):
    record = sorted((Path(begun.output) / ".logitferry/units").iterdir())[0]
    record.write_bytes(record.read_bytes()[:50])
    assert sealed_dump(begun, share=Share()).manifest.shards == sealed.manifest.shards
    assert f"{record}: damaged: its unit is not taken as done" in caplog.text


def test_of_two_workers_at_one_unit_the_first_commit_stays(begun: Any, caplog: pytest.LogCaptureFixture):
    """As where a requeued job begins while the old one still ends."""
    ledger = ledger_of(begun)
    number, record = min(done_units(ledger).items())
    before = Path(begun.output, record.shard.path).read_bytes()  # pyright: ignore[reportOptionalMemberAccess]
    ledger.commit(EncodedUnit(record=record.model_copy(update={"worker": "late"}), data=None, num_records=7))
    assert f"unit {number} was done by another worker meanwhile" in caplog.text
    assert done_units(ledger)[number] == record
    assert Path(begun.output, record.shard.path).read_bytes() == before  # pyright: ignore[reportOptionalMemberAccess]


def test_a_shard_that_is_written_late_into_a_sealed_dataset_is_told(begun: Any, monkeypatch: pytest.MonkeyPatch):
    """As by a worker whose upload stalled, while another one did the unit and sealed."""
    ledger = ledger_of(begun)
    record = next(each for each in done_units(ledger).values() if each.shard is not None)
    data = pa.py_buffer(b"other digits")
    assert record.shard is not None
    other = record.model_copy(update={"shard": record.shard.model_copy(update={"sha256": "0" * 64})})
    monkeypatch.setattr(ledger, "_is_done_by_others", lambda *_: False)  # when it looked, it was not
    sealed_dump(begun, share=Share())
    with pytest.raises(
        DamagedShardError, match=r"was written late[^$]*next: logit-shards repair .*, then run the same"
    ):
        ledger.commit(EncodedUnit(record=other, data=data, num_records=7))


def test_units_of_another_plan_are_not_taken_as_done(
    begun: Any, sealed: LogitDataset, caplog: pytest.LogCaptureFixture
):
    """Two workers with unlike settings, who both saw no plan: the one whose plan is gone has worked for nothing."""
    ledger = ledger_of(begun)
    for record in done_units(ledger).values():
        ledger.write_record(record.model_copy(update={"plan": "0" * 64}))
    assert done_units(ledger) == {}
    assert "2 units were done by another plan and are not taken as done" in caplog.text
    assert sealed_dump(begun, share=Share()).manifest == sealed.manifest


def test_plans_are_the_same_wherever_the_teacher_lies(begun: Any):
    plan = ledger_of(begun).plan()
    assert plan is not None
    teacher = plan.contents.teacher.model_copy(update={"name": "/elsewhere"})
    moved = plan.model_copy(update={"contents": plan.contents.model_copy(update={"teacher": teacher})})
    assert moved.identity == plan.identity
    assert plan.model_copy(update={"unit_records": 9}).identity != plan.identity


def test_a_unit_whose_shard_is_damaged_is_no_longer_done_for_anybody(begun: Any, monkeypatch: pytest.MonkeyPatch):
    """Else whoever finishes first would find it while it is done again."""
    ledger = ledger_of(begun)
    number, record = min(done_units(ledger).items())
    assert record.shard is not None
    (Path(begun.output) / record.shard.path).unlink()

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("teacher_dump.dump._here", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_dump(begun, share=Share(0, 2))
    assert number not in done_units(ledger)


def test_a_straggler_does_not_touch_a_sealed_dataset(begun: Any):
    ledger = ledger_of(begun)
    record = min(done_units(ledger).values(), key=lambda each: each.number)
    sealed_dump(begun, share=Share())
    before = {path: path.read_bytes() for path in Path(begun.output).rglob("*") if path.is_file()}
    ledger.commit(EncodedUnit(record=record, data=None, num_records=7))
    assert {path: path.read_bytes() for path in Path(begun.output).rglob("*") if path.is_file()} == before


def test_a_plan_that_is_there_is_never_replaced(begun: Any):
    ledger = ledger_of(begun)
    plan = ledger.plan()
    assert plan is not None
    other = plan.model_copy(update={"unit_records": 3})
    assert ledger.commit_plan(other, {}) == plan
    assert ledger.plan() == plan


def test_a_plan_of_another_release_or_of_none_is_refused(begun: Any):
    ledger, path = ledger_of(begun), Path(begun.output) / ".logitferry/plan.json"
    tree = json.loads(path.read_bytes())
    path.write_text(json.dumps(tree | {"plan_version": 2, "more": 1}, indent=1))
    with pytest.raises(MismatchError, match=r"another release of logitferry made this plan[^$]*finish the dump with"):
        ledger.plan()
    path.write_bytes(path.read_bytes()[:99])
    with pytest.raises((DamagedDataError, MismatchError)):
        ledger.plan()
    path.write_text("{}")
    with pytest.raises(DamagedDataError, match="is no plan"):
        ledger.plan()


def test_a_tokenizer_that_was_damaged_since_is_refused(begun: Any):
    ledger = ledger_of(begun)
    plan = ledger.plan()
    assert plan is not None
    assert set(ledger.tokenizer_files(plan)) == plan.files.keys() >= {"tokenizer/tokenizer.json"}
    path = Path(begun.output) / ".logitferry/tokenizer/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"fox", b"dog"))
    with pytest.raises(DamagedDataError, match=r"tokenizer\.json: damaged\n  next: copy it from the teacher's"):
        run_dump(begun, share=Share())


def test_a_failure_is_noted_and_of_no_account_once_the_unit_is_done(begun: Any):
    ledger = ledger_of(begun)
    number = next(iter(set(range(4)) - done_units(ledger).keys()))
    ledger.fail(number, "1/2 on somewhere", ValueError("it broke"))
    assert ledger.failures()[number].error == "it broke"
    assert run_dump(begun, share=Share()) is not None


def test_a_failure_that_cannot_be_noted_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = LocalFolder(tmp_path)

    def full(*_: Any) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(folder, "write", full)
    Ledger(folder).fail(3, "w", ValueError("it broke"))


def test_a_manifest_that_is_there_in_part_is_written_again_while_there_is_a_plan(begun: Any, sealed: LogitDataset):
    """Over sftp and the like, where an upload shows while it goes on."""
    (Path(begun.output) / "manifest.json").write_bytes(b'{"format_version": 1,')
    assert sealed_dump(begun, share=Share()).manifest == sealed.manifest
    (Path(begun.output) / "manifest.json").write_bytes(b'{"format_version": 1,')
    with pytest.raises(DamagedManifestError):
        run_dump(begun, share=Share())


def test_records_that_vanish_while_they_are_listed_are_of_a_sealed_dataset(begun: Any, monkeypatch: pytest.MonkeyPatch):
    ledger = ledger_of(begun)
    plan = ledger.plan()
    assert plan is not None
    files = ledger.output.files

    def sealed_meanwhile(below: str) -> list[str]:
        found = files(below)
        monkeypatch.undo()
        sealed_dump(begun, share=Share())
        return found

    monkeypatch.setattr(ledger.output, "files", sealed_meanwhile)
    assert ledger.records(plan) == {}
    assert ledger.sealed() is not None


def test_who_loses_the_plan_to_another_worker_is_told(begun: Any):
    """Nothing of what he did is in the dataset."""
    path = Path(begun.output) / ".logitferry/plan.json"
    plan = ledger_of(begun).plan()
    assert plan is not None
    other = plan.model_copy(update={"unit_digests": ["0" * 32, *plan.unit_digests[1:]]})

    @contextmanager
    def replaced(*arguments: Any, **options: Any) -> Any:
        path.write_text(other.model_dump_json(indent=1))
        with open_engine(*arguments, **options) as engine:
            yield engine

    with pytest.raises(MismatchError, match="another worker, who planned at the same moment, has other settings"):
        run_dump(begun, share=Share(1, 2), load=replaced)
    assert not (Path(begun.output) / "manifest.json").exists()


@pytest.mark.parametrize("moment", ["make_plan", "seal"])
def test_a_dataset_that_others_sealed_with_other_settings_is_not_ones_own(
    teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """While this worker read its input, or scored its last unit."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    run = getattr(dump, moment)

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(dump, moment, run)
        found = run(*arguments) if moment == "make_plan" else None
        shutil.rmtree(tmp_path / "out")
        sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out", keep__k=5))
        return run(*arguments) if found is None else found

    monkeypatch.setattr(dump, moment, late)
    with pytest.raises(MismatchError, match=r"keep\.k: was 5, is 8"):
        run_dump(settings)
