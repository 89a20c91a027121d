"""Datasets at URLs: fetched when needed, verified, mended from where they came, never trusted."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import LogitDataset
from shared.dataset_cache import default_cache
from shared.errors import ConfigError, DamagedDataError, DamagedManifestError, OutputError, UnsealedDatasetError
from tests.shared.made_datasets import made_rows, write_dataset
from tests.shared.stores import memory_store

URL = "memory://bucket/my-dump"


@pytest.fixture
def local(tmp_path: Path) -> LogitDataset:
    write_dataset(tmp_path / "local", [made_rows(number, 4) for number in range(3)])
    return LogitDataset.open(tmp_path / "local")


@pytest.fixture
def store(local: LogitDataset) -> Iterator[Any]:
    with memory_store("bucket/my-dump", local.folder) as found:
        yield found


def shards(paths: list[str]) -> list[str]:
    return [path for path in paths if path.endswith(".parquet")]


def same_rows(one: LogitDataset, other: LogitDataset, index: int) -> bool:
    pairs = zip(one.read_shard(index), other.read_shard(index), strict=True)
    return all(
        a.sample_id == b.sample_id and np.array_equal(a.teacher.kept_logp_E, b.teacher.kept_logp_E) for a, b in pairs
    )


def test_a_shard_is_fetched_when_it_is_read_and_never_again(
    local: LogitDataset, store: Any, fetched: list[str], tmp_path: Path
):
    dataset = LogitDataset.open(URL, cache=tmp_path / "cache")
    assert dataset.identity() == local.identity()
    assert dataset.name == URL
    dataset.tokenizer()
    assert dataset.sample_ids() == local.sample_ids()
    assert not shards(fetched), "of sample ids only their columns are read"
    assert same_rows(dataset, local, 1)
    assert same_rows(dataset, local, 1)
    again = LogitDataset.open(URL, cache=tmp_path / "cache")
    assert same_rows(again, local, 1)
    assert again.sample_ids() == local.sample_ids()
    assert shards(fetched) == ["data/part-00001.parquet"]
    [folder] = (tmp_path / "cache").iterdir()
    assert folder.name == local.identity()


def test_what_is_damaged_on_this_machine_is_fetched_again(
    local: LogitDataset, store: Any, fetched: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    dataset = LogitDataset.open(URL, cache=tmp_path / "cache")
    dataset.read_shard(0)
    kept = dataset.folder / "data/part-00000.parquet"
    for damage in (lambda data: data[:50] + b"?" + data[51:], lambda data: data[:-7], lambda _: b""):
        kept.write_bytes(damage(kept.read_bytes()))
        assert dataset.sample_ids() == local.sample_ids()
        assert same_rows(dataset, local, 0)
    assert shards(fetched) == ["data/part-00000.parquet"] * 4
    assert caplog.text.count("is damaged and is fetched again") == 3
    tokenizer = dataset.folder / "tokenizer/tokenizer.json"
    tokenizer.write_text("{}")
    LogitDataset.open(URL, cache=tmp_path / "cache").tokenizer()


def test_what_is_damaged_at_the_url_is_refused_and_not_kept(local: LogitDataset, store: Any, tmp_path: Path):
    path = "/bucket/my-dump/data/part-00001.parquet"
    whole = store.cat_file(path)
    store.pipe_file(path, whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    dataset = LogitDataset.open(URL, cache=tmp_path / "cache")
    with pytest.raises(DamagedDataError, match=rf"{URL}/data/part-00001\.parquet: damaged: expected(.|\n)*next: "):
        dataset.read_shard(1)
    assert not (dataset.folder / "data/part-00001.parquet").exists()
    store.pipe_file(path, whole)
    assert same_rows(dataset, local, 1)
    store.rm(path)
    shutil.rmtree(dataset.folder / "data")
    with pytest.raises(DamagedDataError, match=r"part-00001\.parquet: is missing"):
        dataset.read_shard(1)
    with pytest.raises(DamagedDataError, match=r"part-00001\.parquet: is missing"):
        dataset.names(1)


def test_a_dataset_made_anew_at_the_same_url_is_another_one(store: Any, tmp_path: Path):
    first = LogitDataset.open(URL, cache=tmp_path / "cache")
    manifest = json.loads(store.cat_file("/bucket/my-dump/manifest.json"))
    store.pipe_file("/bucket/my-dump/manifest.json", json.dumps(manifest, indent=4).encode())
    second = LogitDataset.open(URL, cache=tmp_path / "cache")
    assert second.folder != first.folder
    assert first.read_shard(0)[0].sample_id == second.read_shard(0)[0].sample_id


def test_several_who_need_the_same_shard_fetch_it_once(
    local: LogitDataset, store: Any, fetched: list[str], tmp_path: Path
):
    datasets = [LogitDataset.open(URL, cache=tmp_path / "cache") for _ in range(6)]
    barrier = threading.Barrier(6)

    def read(dataset: LogitDataset) -> int:
        barrier.wait()
        return len(dataset.read_shard(2))

    with ThreadPoolExecutor(6) as threads:
        assert set(threads.map(read, datasets)) == {local.manifest.shards[2].rows}
    assert shards(fetched) == ["data/part-00002.parquet"]


def test_without_a_manifest_there_is_no_dataset(store: Any, tmp_path: Path):
    store.rm("/bucket/my-dump/manifest.json")
    with pytest.raises(UnsealedDatasetError, match=f"{URL} is no sealed dataset"):
        LogitDataset.open(URL, cache=tmp_path)
    store.pipe_file("/bucket/my-dump/manifest.json", b"[]")
    with pytest.raises(DamagedManifestError):
        LogitDataset.open(URL, cache=tmp_path)


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_read(store: Any, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises((ConfigError, OutputError), match="file"):
        LogitDataset.open(URL, cache=tmp_path / "file")
    with pytest.raises(ConfigError, match="Protocol not known"):
        LogitDataset.open("s4://bucket/my-dump", cache=tmp_path)


def test_the_cache_is_where_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "logitferry/datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/logitferry/datasets"
