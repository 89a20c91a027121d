"""A dataset is pushed to folders: nothing twice, nothing half, nothing over another one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shared.card import KEPT_BELOW
from shared.dataset import LogitDataset
from shared.errors import ConfigError, DamagedDataError, MismatchError, UnsealedDatasetError
from shared.folders import RemoteFolder, open_folder
from shared.logit_shards import cli
from shared.push import Pushed, open_destination, push
from shared.verification import verify
from tests.killed import killed_at
from tests.shared.made_datasets import made_rows, write_dataset
from tests.shared.stores import files_of, memory_store

URL = "memory://bucket/my-dump"
ORDER = [*(f"data/part-0000{n}.parquet" for n in range(3)), "tokenizer/tokenizer.json", "README.md", "manifest.json"]


@pytest.fixture
def local(tmp_path: Path) -> LogitDataset:
    return LogitDataset.open(write_dataset(tmp_path / "local", [made_rows(number, 4) for number in range(3)]))


@pytest.fixture
def other(tmp_path: Path) -> LogitDataset:
    return LogitDataset.open(write_dataset(tmp_path / "other", [made_rows(number, 3) for number in range(5, 7)]))


@pytest.fixture
def store() -> Iterator[Any]:
    with memory_store("bucket/my-dump") as found:
        yield found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    paths: list[str] = []
    write = RemoteFolder.write

    def recorded(self: RemoteFolder, path: str, data: Any) -> None:
        paths.append(path)
        write(self, path, data)

    monkeypatch.setattr(RemoteFolder, "write", recorded)
    return paths


def to(dataset: LogitDataset, url: str = URL, **options: Any) -> Pushed:
    return push(dataset, open_destination(url), **options)


def held(store: Any) -> dict[str, bytes]:
    return {path.removeprefix("/bucket/my-dump/"): store.cat_file(path) for path in store.find("/bucket/my-dump")}


def test_push_sends_every_file_the_manifest_last_and_none_twice(local: LogitDataset, store: Any, written: list[str]):
    done = to(local)
    assert written == ORDER
    assert (done.sent, done.kept, done.removed) == (6, 0, 0)
    assert done.sent_bytes == sum(map(len, files_of(local.folder).values()))
    assert held(store) == files_of(local.folder)
    assert (again := to(local)).sent == 0
    assert again.kept == 5
    assert len(written) == 6


def test_what_was_cut_goes_on_where_it_was(
    local: LogitDataset, store: Any, written: list[str], monkeypatch: pytest.MonkeyPatch
):
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(local, on_file=stop)
    with pytest.raises(UnsealedDatasetError, match=r"next: check the name, and whether your key .* finish its push"):
        LogitDataset.open(URL)
    to(local)
    assert written == ORDER
    assert held(store) == files_of(local.folder)


def test_killed_at_any_step_a_push_to_a_folder_is_no_dataset_and_goes_on(local: LogitDataset, tmp_path: Path):
    step, ended = 1, False
    while not ended:
        there = tmp_path / f"there-{step}"
        ended = not killed_at(step, lambda url=str(there): to(local, url))
        if (there / "manifest.json").exists():
            assert verify(LogitDataset.open(there), deep=False).faults == []
        to(local, str(there))
        assert {path: data for path, data in files_of(there).items() if "writing" not in path} == (
            files_of(local.folder)
        )
        step += 5
    assert step > 30


def test_a_damaged_file_here_is_not_sent(local: LogitDataset, store: Any):
    shard = local.folder / ORDER[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    with pytest.raises(DamagedDataError, match=r"part-00001\.parquet: damaged: expected(.|\n)*next: "):
        to(local)
    assert ORDER[1] not in held(store)
    assert "manifest.json" not in held(store)
    shard.unlink()
    with pytest.raises(DamagedDataError, match=r"part-00001\.parquet: is missing"):
        to(local)


@pytest.mark.parametrize(
    ("path", "step"),
    [(ORDER[0], "logit-shards repair {}"), ("tokenizer/tokenizer.json", "copy the tokenizer folder"),
     ("README.md", "logit-shards card {}")],
)  # fmt: skip
def test_what_is_missing_here_is_told_with_what_to_do(path: str, step: str, local: LogitDataset, store: Any):
    (local.folder / path).unlink()
    with pytest.raises(DamagedDataError, match="is missing") as refused:
        to(local)
    assert step.format(local.folder) in str(refused.value.next_step)
    assert "{}" not in str(refused.value.next_step)
    if path == "README.md":
        assert CliRunner().invoke(cli, ["card", str(local.folder)]).exit_code == 0
        to(local)
        assert held(store) == files_of(local.folder)


def test_what_arrives_as_something_else_is_found(local: LogitDataset, store: Any, monkeypatch: pytest.MonkeyPatch):
    write = RemoteFolder.write
    monkeypatch.setattr(RemoteFolder, "write", lambda self, path, data: write(self, path, bytes(data)[:-1] + b"?"))
    with pytest.raises(DamagedDataError, match=r"part-00000\.parquet: what lies there is not what was sent"):
        to(local)
    assert "manifest.json" not in held(store)


def test_what_was_damaged_there_is_mended(local: LogitDataset, store: Any, written: list[str]):
    to(local)
    store.pipe_file(f"/bucket/my-dump/{ORDER[2]}", b"rot")
    assert to(local).sent == 1
    assert written[6:] == [ORDER[2]]
    assert held(store) == files_of(local.folder)


def test_a_new_card_is_sent_to_the_same_dataset(local: LogitDataset, store: Any, written: list[str]):
    to(local)
    CliRunner().invoke(cli, ["card", str(local.folder), "--license", "mit"])
    to(local)
    assert written[6:] == ["README.md"]
    assert b"license: mit" in held(store)["README.md"]


def test_a_card_that_is_replaced_there_is_told(local: LogitDataset, store: Any, caplog: pytest.LogCaptureFixture):
    to(local)
    assert not caplog.text
    store.pipe_file("/bucket/my-dump/README.md", b"edited there")
    assert to(local).sent == 1
    assert f"{URL}/README.md was another, and is replaced by the one here" in caplog.text


def test_a_readme_of_something_else_is_not_written_over(local: LogitDataset, store: Any):
    store.pipe_file("/bucket/my-dump/README.md", b"# A project")
    store.pipe_file("/bucket/my-dump/main.py", b"")
    for replace in (False, True):
        with pytest.raises(ConfigError, match=r"my-dump/README\.md is no card of a dataset(.|\n)*next: "):
            to(local, replace=replace)
    assert set(held(store)) == {"README.md", "main.py"}
    store.pipe_file("/bucket/my-dump/README.md", (local.folder / "README.md").read_bytes())
    to(local)


def test_of_two_that_are_pushed_at_once_one_is_told(local: LogitDataset, other: LogitDataset, store: Any):
    """Nothing there says who else is at work, but the one that comes last sees what the first has done."""
    meanwhile = iter([lambda: to(other, replace=True)])
    with pytest.raises(MismatchError, match=r"pushed there at the same time(.|\n)*next: .*--replace"):
        to(local, on_file=lambda: next(meanwhile, lambda: None)())
    to(local, replace=True)
    assert held(store) == files_of(local.folder)
    meanwhile = iter([lambda: to(local)])
    store.rm("/bucket/my-dump", recursive=True)
    to(local, on_file=lambda: next(meanwhile, lambda: None)())  # twice the same does no harm
    assert held(store) == files_of(local.folder)


def test_another_dataset_is_replaced_only_where_that_is_said(local: LogitDataset, other: LogitDataset, store: Any):
    to(local)
    before = held(store)
    with pytest.raises(MismatchError, match=r"another dataset is there(.|\n)*--replace"):
        to(other)
    assert held(store) == before
    done = to(other, replace=True)
    assert done.removed == 1, "the third shard"
    assert held(store) == files_of(other.folder)


def test_half_of_another_dataset_is_not_written_over_either(local: LogitDataset, other: LogitDataset, store: Any):
    to(local)
    store.rm("/bucket/my-dump/manifest.json")
    store.rm(f"/bucket/my-dump/{ORDER[0]}")
    with pytest.raises(MismatchError, match=r"data/part-00001\.parquet and 1 more files is there"):
        to(other)


def test_cut_while_it_replaces_there_is_neither_dataset(local: LogitDataset, other: LogitDataset, store: Any):
    to(local)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(other, replace=True, on_file=stop)
    assert "manifest.json" not in held(store)
    to(other, replace=True)
    assert held(store) == files_of(other.folder)


def test_what_is_no_part_of_a_dataset_is_left_alone(local: LogitDataset, other: LogitDataset, store: Any):
    store.pipe_file("/bucket/my-dump/notes.txt", b"ours")
    store.pipe_file("/bucket/my-dump/.git/config", b"ours")
    to(local)
    to(other, replace=True)
    assert set(held(store)) - set(files_of(other.folder)) == {"notes.txt", ".git/config"}


def test_into_a_dataset_nor_around_one_none_is_pushed(local: LogitDataset, other: LogitDataset):
    before = files_of(local.folder)
    for inside in (local.folder / "copy", local.folder / "data", local.folder / "x/.." / "data/there"):
        with pytest.raises(ConfigError, match=r"lies in .*of which it would be a part"):
            to(local, str(inside))
    with pytest.raises(ConfigError, match=r"lies in .*of which it would be a part"):
        to(local, str(local.folder.parent))
    assert files_of(local.folder) == before
    assert to(local, str(local.folder)).sent == 0, "onto itself there is nothing to do"


@pytest.mark.parametrize("theirs", ["README.md", "notes.txt", "data/prices.csv"])
def test_a_folder_of_other_things_is_not_written_to(theirs: str, local: LogitDataset, tmp_path: Path):
    file = tmp_path / "project" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("ours")
    with pytest.raises(ConfigError, match=r"not ours to write to|no part of a dataset") as refused:
        to(local, str(tmp_path / "project"))
    assert refused.value.next_step
    assert [path for path in (tmp_path / "project").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "ours"


def test_a_file_is_no_destination(local: LogitDataset, tmp_path: Path):
    (tmp_path / "there").write_text("ours")
    with pytest.raises(ConfigError, match="is a file, not a folder") as refused:
        to(local, str(tmp_path / "there"))
    assert refused.value.next_step


def test_where_a_dump_writes_nothing_is_pushed(local: LogitDataset, store: Any):
    store.pipe_file("/bucket/my-dump/.logitferry/plan.json", b"{}")
    with pytest.raises(MismatchError, match="a dump writes there"):
        to(local, replace=True)


def test_a_damaged_manifest_there_is_another_dataset(local: LogitDataset, store: Any):
    to(local)
    store.pipe_file("/bucket/my-dump/manifest.json", b"{")
    with pytest.raises(MismatchError, match="another dataset is there"):
        to(local)
    to(local, replace=True)
    assert held(store) == files_of(local.folder)


def test_push_says_what_it_did(local: LogitDataset, tmp_path: Path):
    result = CliRunner().invoke(cli, ["push", str(local.folder), (tmp_path / "there").as_uri(), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert (told["sent"], told["identity"]) == (6, local.identity())
    result = CliRunner().invoke(cli, ["push", str(local.folder), str(tmp_path / "there")])
    assert "0 files sent, 0 bytes; 5 were there" in result.output
    assert verify(LogitDataset.open(tmp_path / "there"), deep=True).faults == []


@pytest.mark.parametrize(
    "url", ["hf://org/name", "hf://datasets/name", "hf://datasets/org/name/below", "hf://spaces/org/name"]
)
def test_another_place_of_the_hub_is_refused_before_it_is_asked(url: str):
    with pytest.raises(ConfigError, match="hf://datasets/ORG/NAME"):
        open_destination(url)


def test_without_the_package_of_the_hub_the_extra_is_named(local: LogitDataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'logitferry\[hub\]'"):
        open_destination("hf://datasets/org/name")


def test_a_dataset_in_a_cache_of_the_hub_is_read_and_pushed(local: LogitDataset, tmp_path: Path):
    """Its files are links to blobs beside the snapshots; links to anywhere else are refused as ever."""
    home = tmp_path / "datasets--org--name"
    snapshot = home / "snapshots/0123"
    for number, (path, data) in enumerate(files_of(local.folder).items()):
        blob = home / f"blobs/{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(Path(*[".."] * (2 + path.count("/")), "blobs", str(number)))
    dataset = LogitDataset.open(snapshot)
    assert verify(dataset, deep=True).faults == []
    assert len(dataset.read_shard(0)) == 4
    to(dataset, str(tmp_path / "there"))
    assert files_of(tmp_path / "there") == files_of(local.folder)
    (snapshot / ORDER[0]).unlink()
    shutil.copy(local.folder / ORDER[0], home / "elsewhere")
    (snapshot / ORDER[0]).symlink_to(home / "elsewhere")
    with pytest.raises(DamagedDataError, match="leads outside the dataset"):
        dataset.read_shard(0)


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_a_replacement_goes_on_over_a_card_whose_line_somebody_took_away(
    local: LogitDataset, other: LogitDataset, store: Any, kind: str, tmp_path: Path
):
    """Interrupted, there is no manifest that says what that README.md is."""
    url = URL if kind == "store" else str(tmp_path / "there")
    card = local.folder / "README.md"
    card.write_text(card.read_text().replace(KEPT_BELOW, ""))
    to(local, url)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to(other, url, replace=True, on_file=stop)
    to(other, url, replace=True)
    assert open_folder(url).read("README.md") == (other.folder / "README.md").read_bytes()
