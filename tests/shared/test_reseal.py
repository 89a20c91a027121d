"""What becomes of sealed datasets: joined, freed of rows, mended.  Every result verifies, deep."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, ForeignTokenizerError, LogitferryError, MismatchError
from shared.files import sha256_of_file
from shared.logit_shards import cli
from shared.reseal import filter_rows, merge, repair
from shared.rows import LogitRow
from shared.verification import verify
from teacher_dump.transformers_engine import TransformersEngine
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.shared.made_rows import assert_same_rows
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    records = [record | {"origin": f"origin-{n % 3}"} for n, record in enumerate(chat_records(24))]
    write_jsonl(folder / "first.jsonl", records[:14])
    write_jsonl(folder / "second.jsonl", records[14:])
    return folder


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, texts: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dumps")
    names = ("first", "second")
    for name in names:
        sealed_dump(settings(teacher_folder, texts / f"{name}.jsonl", folder / name))
    return folder / "first", folder / "second"


def settings(teacher: Path, files: Path, output: Path, **changes: Any) -> Any:
    changes = {"keep__max_kl": 1e-4, "data__source_field": "origin"} | changes
    return dump_settings(teacher, files, output, **changes)


@pytest.fixture
def copy(dumps: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(dumps[0], tmp_path / "copy"))


def rows_of(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]


def assert_whole(dataset: LogitDataset) -> None:
    assert verify(dataset, deep=True).faults == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_merge_holds_the_rows_of_all_in_order(dumps: tuple[Path, Path], tmp_path: Path):
    parts = [LogitDataset.open(folder) for folder in dumps]
    merged = merge(parts, tmp_path / "out")
    assert_whole(merged)
    assert_same_rows(rows_of(merged), rows_of(parts[0]) + rows_of(parts[1]))
    assert [each.files[0].name for each in merged.manifest.inputs] == ["first.jsonl", "second.jsonl"]
    (event,) = merged.manifest.history
    assert (event.operation, event.parents) == ("merge", [part.identity() for part in parts])
    assert merged.info()["mean_kl_nats"] <= 1e-4
    assert merged.info()["positions"] == sum(part.info()["positions"] for part in parts)


def test_merge_of_merges_remembers_where_all_came_from(dumps: tuple[Path, Path], tmp_path: Path):
    first, second = (LogitDataset.open(folder) for folder in dumps)
    part = filter_rows(first, tmp_path / "part", sources=["origin-0"], reason="licence withdrawn")
    again = merge([part, second], tmp_path / "again")
    assert [event.operation for event in again.manifest.history] == ["filter", "merge"]
    assert again.manifest.history[1].parents == [part.identity(), second.identity()]


def test_merge_takes_what_two_engines_said_of_one_teacher(dumps: tuple[Path, Path], tmp_path: Path):
    second = shutil.copytree(dumps[1], tmp_path / "second")
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["teacher"]["engine"] = "vllm 0.32.0"
    (second / "manifest.json").write_text(json.dumps(manifest))
    merged = merge([LogitDataset.open(dumps[0]), LogitDataset.open(second)], tmp_path / "both")
    assert merged.manifest.total("rows") == 24
    manifest["teacher"]["engine_settings"] = {"quantization": "fp8"}
    (second / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="has teacher"):
        merge([LogitDataset.open(dumps[0]), LogitDataset.open(second)], tmp_path / "other")


def test_merge_refuses_samples_that_come_twice(dumps: tuple[Path, Path], tmp_path: Path):
    first = LogitDataset.open(dumps[0])
    with pytest.raises(
        MismatchError, match=r"(?s)sample id 'chat-0' is in .*first and in .*first.*logit-shards filter"
    ):
        merge([first, first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"keep__k": 9}, "has keep "),
        ({"temperatures": [1]}, "has temperatures "),
        ({"keep__max_kl": 0}, "has keep "),
        ({"keep": {"method": "threshold"}, "temperatures": [1]}, "has keep "),
    ],
)
def test_merge_refuses_other_settings(
    changes: dict[str, Any], named: str, dumps: tuple[Path, Path], teacher_folder: Path, texts: Path, tmp_path: Path
):
    changes = {"keep__max_kl": 1e-4} | changes if "keep" not in changes else changes
    other = sealed_dump(settings_of(teacher_folder, texts / "second.jsonl", tmp_path / "other", changes))
    with pytest.raises(MismatchError, match=named):
        merge([LogitDataset.open(dumps[0]), other], tmp_path / "out")


def settings_of(teacher: Path, files: Path, output: Path, changes: dict[str, Any]) -> Any:
    if "keep" in changes:
        return dump_settings(teacher, files, output, **changes)
    return settings(teacher, files, output, **changes)


def test_merge_refuses_another_teacher_and_another_tokenizer(dumps: tuple[Path, Path], texts: Path, tmp_path: Path):
    teacher = make_model(tmp_path / "teacher", seed=77)
    make_tokenizer(teacher)
    other = sealed_dump(settings(teacher, texts / "second.jsonl", tmp_path / "other"))
    with pytest.raises(MismatchError, match="has teacher "):
        merge([LogitDataset.open(dumps[0]), other], tmp_path / "out")
    make_tokenizer(teacher, sentences=["quite other words were read here, and merged in another way"] * 9)
    foreign = sealed_dump(settings(teacher, texts / "second.jsonl", tmp_path / "foreign"))
    with pytest.raises(ForeignTokenizerError, match=r"the tokenizers differ: .*first at id"):
        merge([LogitDataset.open(dumps[0]), foreign], tmp_path / "out")


def test_merge_copies_no_damage(copy: Path, dumps: tuple[Path, Path], tmp_path: Path):
    flip(copy / "data/part-00001.parquet")
    with pytest.raises(DamagedDataError, match=r"part-00001\.parquet: damaged"):
        merge([LogitDataset.open(copy), LogitDataset.open(dumps[1])], tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_filter_leaves_out_sources_and_ids_and_nothing_else(dumps: tuple[Path, Path], tmp_path: Path):
    whole = LogitDataset.open(dumps[0])
    filtered = filter_rows(
        whole, tmp_path / "out", sources=["origin-1"], sample_ids=["chat-0", "nowhere"], reason="a benchmark leaked in"
    )
    assert_whole(filtered)
    expected = [row for row in rows_of(whole) if row.source != "origin-1" and row.sample_id != "chat-0"]
    assert_same_rows(rows_of(filtered), expected)
    (event,) = filtered.manifest.history
    assert event.model_dump(exclude={"created_by"}) == {
        "operation": "filter",
        "parents": [whole.identity()],
        "removed_rows": 14 - len(expected),
        "removed_sources": ["origin-1"],
        "removed_shards": [],
        "reason": "a benchmark leaked in",
    }
    losses = {row.sample_id: loss for row, loss in zip(rows_of(whole), row_losses(whole), strict=True)}
    assert filtered.manifest.total("rows") == len(expected)
    assert sum(shard.loss_nats[0] for shard in filtered.manifest.shards) == pytest.approx(
        sum(losses[row.sample_id] for row in expected), rel=1e-6
    )


def row_losses(dataset: LogitDataset) -> list[float]:
    tables = [pq.read_table(dataset.folder / shard.path) for shard in dataset.manifest.shards]
    return [loss[0] for table in tables for loss in table["storage_loss"].to_pylist()]


def test_filter_copies_a_shard_that_loses_nothing_byte_for_byte(dumps: tuple[Path, Path], tmp_path: Path):
    whole = LogitDataset.open(dumps[0])
    only = rows_of(whole)[0].sample_id
    filtered = filter_rows(whole, tmp_path / "out", sample_ids=[only])
    assert filtered.manifest.shards[1].sha256 == whole.manifest.shards[1].sha256
    assert filtered.manifest.shards[0].sha256 != whole.manifest.shards[0].sha256


def test_filter_drops_a_shard_of_which_nothing_is_left(dumps: tuple[Path, Path], tmp_path: Path):
    whole = LogitDataset.open(dumps[0])
    gone = [row.sample_id for row in whole.read_shard(0)]
    filtered = filter_rows(whole, tmp_path / "out", sample_ids=gone)
    assert [shard.path for shard in filtered.manifest.shards] == ["data/part-00000.parquet"]
    assert_same_rows(rows_of(filtered), whole.read_shard(1))


@pytest.mark.parametrize(
    ("unwanted", "message"),
    [
        ({"sources": ["origin-9"]}, "no row is of source 'origin-9'; did you mean 'origin-"),
        ({"sample_ids": ["nowhere"]}, "has none of the 1 sample ids"),
        ({"sources": ["origin-0", "origin-1", "origin-2"]}, "no row would be left"),
    ],
)
def test_filter_refuses_what_cannot_be_meant(
    unwanted: dict[str, Any], message: str, dumps: tuple[Path, Path], tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        filter_rows(LogitDataset.open(dumps[0]), tmp_path / "out", **unwanted)


def test_repair_and_the_same_dump_again_give_the_dataset_that_was(copy: Path, teacher_folder: Path, texts: Path):
    before = LogitDataset.open(copy)
    identity = before.identity()
    flip(copy / "data/part-00000.parquet")
    assert repair(before) == ["data/part-00000.parquet"]
    repaired = LogitDataset.open(copy)
    assert_whole(repaired)
    assert repaired.manifest.missing == ["data/part-00000.parquet"]
    aside = copy.parent / f"copy.set-aside-{identity[:8]}"
    assert (aside / "data/part-00000.parquet").is_file()
    assert sha256_of_file(aside / "manifest.json") == identity
    assert_same_rows(rows_of(repaired), before.read_shard(1))
    again = sealed_dump(settings(teacher_folder, texts / "first.jsonl", copy))
    assert_whole(again)
    assert again.manifest.shards == before.manifest.shards
    assert again.manifest.missing == []
    assert [event.operation for event in again.manifest.history] == ["repair"]


def test_repair_of_a_missing_shard_dumps_that_unit_alone(
    copy: Path, teacher_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    (copy / "data/part-00001.parquet").unlink()
    assert repair(LogitDataset.open(copy)) == ["data/part-00001.parquet"]
    scored: list[str] = []
    original = TransformersEngine.score

    def score(self: TransformersEngine, units: Any) -> Any:
        for rows in units:
            scored.extend(row.sample_id for row in rows)
            yield from original(self, [rows])

    monkeypatch.setattr(TransformersEngine, "score", score)
    again = sealed_dump(settings(teacher_folder, texts / "first.jsonl", copy))
    assert_whole(again)
    assert scored == [f"chat-{n}" for n in range(7, 14)]


def test_repair_of_a_whole_dataset_changes_nothing(copy: Path):
    before = LogitDataset.open(copy).identity()
    assert repair(LogitDataset.open(copy)) == []
    assert LogitDataset.open(copy).identity() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "README.md"),
        lambda folder: (folder / "README.md").unlink(),
        lambda folder: (folder / "data/part-00009.parquet").write_bytes(b"stray"),
        lambda folder: (folder / "data/.writing-part").write_bytes(b"left by a crash"),
        lambda folder: (folder / "notes.txt").write_bytes(b"somebody's"),
    ],
)
def test_repair_mends_what_is_not_a_shard(damage: Callable[[Path], Any], copy: Path):
    before = rows_of(LogitDataset.open(copy))
    damage(copy)
    assert repair(LogitDataset.open(copy)) == []
    assert_whole(LogitDataset.open(copy))
    assert_same_rows(rows_of(LogitDataset.open(copy)), before)


def test_repair_cannot_make_a_tokenizer_and_changes_nothing(copy: Path):
    flip(copy / "tokenizer/tokenizer.json")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(DamagedDataError, match=r"(?s)tokenizer\.json.*copy the tokenizer folder"):
        repair(LogitDataset.open(copy))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_dataset_with_missing_shards_is_not_merged_filtered_or_filled_with_other_units(
    copy: Path, dumps: tuple[Path, Path], teacher_folder: Path, texts: Path, tmp_path: Path
):
    flip(copy / "data/part-00000.parquet")
    repair(LogitDataset.open(copy))
    repaired = LogitDataset.open(copy)
    for work in (
        lambda: merge([repaired, LogitDataset.open(dumps[1])], tmp_path / "out"),
        lambda: filter_rows(repaired, tmp_path / "out", sources=["origin-1"]),
        lambda: sealed_dump(settings(teacher_folder, texts / "first.jsonl", copy, unit_records=5)),
    ):
        with pytest.raises(LogitferryError, match=r"1 shards are missing"):
            work()
    assert_whole(LogitDataset.open(copy))


def test_rows_that_were_filtered_out_do_not_come_back_through_a_repair(
    dumps: tuple[Path, Path], teacher_folder: Path, texts: Path, tmp_path: Path
):
    filtered = filter_rows(LogitDataset.open(dumps[0]), tmp_path / "out", sources=["origin-1"])
    flip(filtered.folder / "data/part-00000.parquet")
    repair(filtered)
    with pytest.raises(MismatchError, match="it was merged or filtered since"):
        sealed_dump(settings(teacher_folder, texts / "first.jsonl", filtered.folder))


def test_the_history_survives_the_manifest_on_disk(dumps: tuple[Path, Path], tmp_path: Path):
    filtered = filter_rows(LogitDataset.open(dumps[0]), tmp_path / "out", sources=["origin-1"], reason="x")
    tree = json.loads((filtered.folder / "manifest.json").read_text())
    assert tree["history"][0]["removed_sources"] == ["origin-1"]
    assert tree["unit_records"] is None


def test_repair_refuses_where_nothing_is_whole_and_changes_nothing(copy: Path):
    """More likely a folder that is not mounted than a hundred damaged files."""
    shutil.move(copy / "data", copy.parent / "unmounted")
    before = (copy / "manifest.json").read_bytes()
    with pytest.raises(DamagedDataError, match=r"(?s)not one of its 2 shards is whole.*Nothing was changed") as told:
        repair(LogitDataset.open(copy))
    assert str(told.value).count("next:") == 1, "not to repair it once more"
    assert (copy / "manifest.json").read_bytes() == before


def test_what_begins_with_a_dot_beside_the_data_is_nobodys_fault(copy: Path):
    (copy / ".git").mkdir()
    (copy / ".git/config").write_text("x")
    assert_whole(LogitDataset.open(copy))


def test_merge_takes_one_teacher_from_two_places(
    teacher_folder: Path, texts: Path, dumps: tuple[Path, Path], tmp_path: Path
):
    shutil.copytree(teacher_folder, tmp_path / "mounted-elsewhere")
    other = sealed_dump(settings(tmp_path / "mounted-elsewhere", texts / "second.jsonl", tmp_path / "other"))
    assert_whole(merge([LogitDataset.open(dumps[0]), other], tmp_path / "out"))


def test_what_is_unsealed_has_a_plan_already(
    copy: Path, teacher_folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
):
    """Killed there, the next run must find what to compare its settings with."""
    flip(copy / "data/part-00000.parquet")
    repair(LogitDataset.open(copy))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("teacher_dump.dump.unseal", killed)
    with pytest.raises(KeyboardInterrupt):
        sealed_dump(settings(teacher_folder, texts / "first.jsonl", copy))
    assert (copy / ".logitferry/plan.json").is_file()
    assert_whole(LogitDataset.open(copy))


def test_filter_reads_ids_as_lines_and_nothing_else_ends_one(dumps: tuple[Path, Path], tmp_path: Path):
    """A file from Windows, with the mark that its editor puts first; and U+2028 is no line's end."""
    (tmp_path / "ids.txt").write_bytes("chat-0\r\nodd\u2028chat-1\n".encode("utf-8-sig"))
    command = ["filter", str(dumps[0]), "--output", str(tmp_path / "out"), "--sample-ids", str(tmp_path / "ids.txt")]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 0, result.output
    names = {row.sample_id for row in rows_of(LogitDataset.open(tmp_path / "out"))}
    assert "chat-0" not in names
    assert "chat-1" in names
