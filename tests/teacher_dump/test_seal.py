"""Who seals, and what: several workers, rows that cannot be scored, and datasets that were repaired."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedShardError, MismatchError, NonFiniteError
from shared.folders import open_folder
from shared.reseal import filter_rows, merge, repair
from shared.verification import verify
from shared.workers import Share
from teacher_dump.dump import run_dump
from teacher_dump.ledger import Ledger
from teacher_dump.seal import seal, unseal
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.stores import files_of
from tests.tiny import make_model, make_tokenizer


@pytest.mark.parametrize("count", [2, 3, 5])
def test_workers_one_after_the_other_make_the_dataset_of_one(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, count: int
):
    """Four units; with five workers one of them has nothing to do."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    ended = [run_dump(settings, share=Share(index, count)) for index in reversed(range(count))]
    assert [each is not None for each in ended].index(True) >= count - 2, "nobody seals while units are left"
    assert ended[-1] is not None, "who finishes last seals"
    assert files_of(tmp_path / "out") == files_of(sealed.folder)


@pytest.mark.cluster
def test_workers_as_processes_side_by_side(sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path):
    """By srun's variables; at least one of them seals, and the end is the same."""
    config = tmp_path / "dump.json"
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    config.write_text(settings.model_dump_json())  # JSON is YAML
    command = [sys.executable, "-m", "teacher_dump", "run", str(config), "--json"]
    processes = [
        subprocess.Popen(
            command, env=os.environ | {"SLURM_PROCID": str(n), "SLURM_NTASKS": "2"}, stdout=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    told = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert any(each["sealed"] for each in told)
    assert files_of(tmp_path / "out") == files_of(sealed.folder)


def test_several_seal_at_once(sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path):
    """They find the manifest, or write the same."""
    for attempt in range(5):
        output = tmp_path / f"out-{attempt}"
        settings = dump_settings(teacher_folder, chats, output)
        run_dump(settings, share=Share(0, 2))
        ended: list[Any] = []
        stalled = threading.Barrier(4)

        class Stalled(Ledger):
            def plan(self, barrier: threading.Barrier = stalled) -> Any:
                plan = super().plan()
                barrier.wait(timeout=60)
                return plan

        with pytest.MonkeyPatch.context() as patch:  # all units done, and nobody has sealed yet
            patch.setattr("teacher_dump.dump.seal", lambda ledger: None)
            run_dump(settings, share=Share(1, 2))
        threads = [
            threading.Thread(target=lambda at=output, to=ended: to.append(seal(Stalled(open_folder(str(at))))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ended) == 4
        assert all(each == sealed.manifest for each in ended)
        assert files_of(output) == files_of(sealed.folder)


def test_a_shard_that_is_damaged_before_sealing_is_not_sealed(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    run_dump(settings, share=Share(0, 2))
    (shard, *_) = sorted((tmp_path / "out/data").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedShardError, match=rf"1 shards are not what was committed: data/{shard.name}"):
        run_dump(settings, share=Share(1, 2))
    assert not (tmp_path / "out/manifest.json").exists()
    assert sealed_dump(settings).manifest == sealed.manifest


def test_nothing_is_sealed_where_nothing_was_begun(tmp_path: Path, teacher_folder: Path, chats: Path):
    with pytest.raises(ConfigError, match="no dump was begun here"):
        seal(Ledger(open_folder(str(tmp_path / "nowhere"))))
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    assert run_dump(settings, plan_only=True) is None
    assert seal(Ledger(open_folder(settings.output))) is None, "a plan alone is no dataset"
    assert not (tmp_path / "out/data").exists()


def test_a_run_goes_by_the_plan_and_reads_no_text_twice(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    run_dump(settings, plan_only=True)

    def refused(*_: Any) -> None:
        raise AssertionError("the input was surveyed again")

    monkeypatch.setattr("teacher_dump.dump.make_plan", refused)
    assert run_dump(settings) == sealed.manifest


def test_the_teacher_may_lie_elsewhere_where_its_digests_are_the_same(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """Nodes mount it where they like; the manifest has the path of the plan."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(teacher_folder)
    run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"), share=Share(0, 2))
    assert run_dump(dump_settings(elsewhere, chats, tmp_path / "out"), share=Share(1, 2)) == sealed.manifest


def test_too_many_units_are_refused_before_the_first(
    teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr("teacher_dump.plan.MAX_UNITS", 3)
    with pytest.raises(
        ConfigError, match=r"makes 4 units, at most 3 are allowed\n  next: set unit_records to 8 or more"
    ):
        run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.json"))


@pytest.fixture(scope="module")
def blind_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives NaN from the first "5" on: in chat-5 and chat-15."""
    teacher = make_model(tmp_path_factory.mktemp("blind") / "teacher", seed=1)
    make_tokenizer(teacher)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("5")] = torch.nan
    model.save_pretrained(teacher)
    return teacher


UNSCORABLE = ["chat-5", "chat-15"]


def test_rows_that_cannot_be_scored_stop_the_run_or_are_listed(
    blind_teacher: Path, chats: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The setting may change in the middle of a dump; nothing else is skipped."""
    settings = dump_settings(blind_teacher, chats, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"row 'chat-5', token \d+: .* is nan[^$]*next: .*on_unscorable: skip"):
        run_dump(settings)
    failure = Ledger(open_folder(settings.output)).failures()[0]
    assert "row 'chat-5'" in failure.error
    dataset = sealed_dump(dump_settings(blind_teacher, chats, tmp_path / "out", on_unscorable="skip"))
    names = [name for names in dataset.sample_ids() for name in names]
    assert names == [f"chat-{n}" for n in range(23) if f"chat-{n}" not in UNSCORABLE]
    lines = [json.loads(line) for line in (tmp_path / "out/unscorable.jsonl").read_text().splitlines()]
    assert [(line["unit"], line["sample_id"], line["source"]) for line in lines] == [
        (0, "chat-5", "chats.jsonl"),
        (2, "chat-15", "chats.jsonl"),
    ]
    assert all("is nan" in line["reason"] for line in lines)
    assert "skipped: row 'chat-5'" in caplog.text
    assert dataset.manifest.inputs[0].tally["unscorable"] == 2
    assert verify(dataset, deep=True).faults == []


def test_what_one_run_may_skip_another_may_not(blind_teacher: Path, chats: Path, tmp_path: Path):
    settings = dump_settings(blind_teacher, chats, tmp_path / "out", on_unscorable="skip")
    run_dump(settings, share=Share(0, 4))
    run_dump(settings, share=Share(1, 4))
    strict = dump_settings(blind_teacher, chats, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"row 'chat-1?5'"):
        run_dump(strict)


def test_what_could_not_be_scored_is_known_after_repair_merge_and_filter(
    blind_teacher: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(blind_teacher, chats, tmp_path / "out", on_unscorable="skip")
    whole = sealed_dump(settings)
    listed = (tmp_path / "out/unscorable.jsonl").read_bytes()
    shard = tmp_path / "out/data/part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert repair(whole) == ["data/part-00001.parquet"]
    again = sealed_dump(settings)
    assert (tmp_path / "out/unscorable.jsonl").read_bytes() == listed
    assert again.manifest.shards == whole.manifest.shards

    records = [record | {"id": f"more-{record['id']}"} for record in chat_records(8)]
    more = write_jsonl(tmp_path / "more.jsonl", records)
    other = sealed_dump(dump_settings(blind_teacher, more, tmp_path / "other", on_unscorable="skip"))
    merged = merge([again, other], tmp_path / "both")
    assert (merged.folder / "unscorable.jsonl").read_bytes() == listed + (
        other.folder / "unscorable.jsonl"
    ).read_bytes()
    filtered = filter_rows(merged, tmp_path / "few", sources=["more.jsonl"])
    assert b"chat-15" in (filtered.folder / "unscorable.jsonl").read_bytes()
    assert verify(merged, deep=True).faults == verify(filtered, deep=True).faults == []


def test_a_dump_of_nothing_but_unscorable_rows_is_an_error(blind_teacher: Path, tmp_path: Path):
    files = write_jsonl(tmp_path / "chats.jsonl", [chat_records(6)[5]])
    with pytest.raises(NonFiniteError, match="not one row could be scored; the first: row 'chat-5'"):
        run_dump(dump_settings(blind_teacher, files, tmp_path / "out", on_unscorable="skip"))


def test_repaired_units_cannot_be_cut_otherwise(teacher_folder: Path, chats: Path, tmp_path: Path):
    whole = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "out"))
    (whole.folder / "data/part-00001.parquet").unlink()
    repair(whole)
    with pytest.raises(MismatchError, match="its units had 7 records, not 8"):
        run_dump(dump_settings(teacher_folder, chats, tmp_path / "out", unit_records=8))


@pytest.mark.parametrize("count", [1, 3])
def test_a_repaired_dataset_is_finished_by_any_number_of_workers(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, count: int
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    whole = sealed_dump(settings)
    for name in ("part-00001.parquet", "part-00003.parquet"):
        (whole.folder / "data" / name).unlink()
    repair(whole)
    ended = [run_dump(settings, share=Share(index, count)) for index in range(count)]
    assert ended[-1] is not None
    assert ended[-1].shards == sealed.manifest.shards
    assert [event.operation for event in ended[-1].history] == ["repair"]


def test_a_late_worker_leaves_a_dataset_alone_that_others_have_completed(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After a repair; the others make the missing shard and seal while this one still reads."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    whole = sealed_dump(settings)
    (whole.folder / "data/part-00001.parquet").unlink()
    repair(whole)
    from teacher_dump import dump

    make_plan = dump.make_plan

    def slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(dump, "make_plan", make_plan)
        assert run_dump(settings) is not None
        return make_plan(*arguments)

    monkeypatch.setattr(dump, "make_plan", slowly)
    late = run_dump(settings)
    assert late is not None
    assert late.missing == []
    assert late.shards == sealed.manifest.shards
    assert not (whole.folder / ".logitferry").exists()


def test_a_dataset_that_others_unseal_is_not_unsealed_twice(teacher_folder: Path, chats: Path, tmp_path: Path):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    whole = sealed_dump(settings)
    (whole.folder / "data/part-00001.parquet").unlink()
    repair(whole)
    repaired = LogitDataset.open(whole.folder).manifest
    assert run_dump(settings, share=Share(0, 1), plan_only=True) is None  # which unseals it
    ledger = Ledger(open_folder(settings.output))
    plan = ledger.plan()
    assert plan is not None
    unseal(ledger, repaired, plan)
    assert sealed_dump(settings).manifest.missing == []


def test_a_tokenizer_with_another_end_is_another_one(teacher_folder: Path, chats: Path, tmp_path: Path):
    """Vocabulary and merges are the same, and with them the fingerprint."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    run_dump(dump_settings(teacher, chats, tmp_path / "out"), share=Share(0, 2))
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    with pytest.raises(MismatchError, match=r"input\.settings\.tokenizer_sha256: was"):
        run_dump(dump_settings(teacher, chats, tmp_path / "out"), share=Share(1, 2))


def test_a_template_may_lie_elsewhere_where_it_is_the_same(teacher_folder: Path, chats: Path, tmp_path: Path):
    template = (teacher_folder / "chat_template.jinja").read_text()
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text(template)
    run_dump(
        dump_settings(teacher_folder, chats, tmp_path / "out", data__chat_template=str(tmp_path / "a.jinja")),
        share=Share(0, 2),
    )
    settings = dump_settings(teacher_folder, chats, tmp_path / "out", data__chat_template=str(tmp_path / "b.jinja"))
    assert run_dump(settings, share=Share(1, 2)) is not None


def test_the_unit_that_an_engine_failed_at_is_noted(teacher_folder: Path, chats: Path, tmp_path: Path):
    from contextlib import contextmanager

    from teacher_dump.engines import open_engine

    class Failing:
        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def score(self, units: Any) -> Any:
            for number, positions in enumerate(self._engine.score(units)):
                if number == 2:
                    raise RuntimeError("the device fell off")
                yield positions

    @contextmanager
    def load(*arguments: Any, **options: Any) -> Any:
        with open_engine(*arguments, **options) as engine:
            yield Failing(engine)

    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    with pytest.raises(RuntimeError, match="fell off"):
        run_dump(settings, load=load)
    (failure,) = Ledger(open_folder(settings.output)).failures().values()
    assert (failure.number, failure.error) == (2, "the device fell off")
