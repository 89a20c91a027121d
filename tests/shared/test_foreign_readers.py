"""Readers that know nothing of us see the values that our reader sees, every one of them.

And what the guide says about them is run as it stands there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow.parquet as pq
import pytest

from shared.dataset import LogitDataset
from shared.rows import LogitRow
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl

GUIDE = Path(__file__).parents[2] / "shared/DATASET.md"


@pytest.fixture(scope="module", params=["topk", "threshold"])
def dataset(request: Any, tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> LogitDataset:
    folder = tmp_path_factory.mktemp("foreign")
    files = write_jsonl(folder / "chats.jsonl", chat_records(20))
    topk = request.param == "topk"
    changes = {"keep": {"method": request.param, "always": ["<|im_end|>"]}, "temperatures": [1, 2] if topk else [1]}
    return sealed_dump(dump_settings(teacher_folder, files, folder / "my-dump", **changes))


def with_duckdb(folder: Path) -> list[dict[str, Any]]:
    relation = duckdb.sql(f"SELECT * FROM '{folder}/data/*.parquet' ORDER BY filename, file_row_number")
    return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def with_polars(folder: Path) -> list[dict[str, Any]]:
    return polars.read_parquet(f"{folder}/data/*.parquet").to_dicts()


def with_datasets(folder: Path) -> list[dict[str, Any]]:
    return list(datasets.load_dataset(str(folder), split="train", cache_dir=str(folder.parent / "cache")))


def with_datasets_streaming(folder: Path) -> list[dict[str, Any]]:
    return list(datasets.load_dataset(str(folder), split="train", streaming=True))


def with_pandas(folder: Path) -> list[dict[str, Any]]:
    frames = [pandas.read_parquet(path) for path in sorted(folder.glob("data/*.parquet"))]
    return pandas.concat(frames).to_dict("records")


def with_pyarrow(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("data/*.parquet")) for row in pq.read_table(path).to_pylist()]


def ours(dataset: LogitDataset) -> list[LogitRow]:
    return [row for index in range(len(dataset.manifest.shards)) for row in dataset.read_shard(index)]


def flat(lists: Any) -> list[Any]:
    return [value for each in lists for value in each]


@pytest.mark.parametrize(
    "read", [with_duckdb, with_polars, with_datasets, with_datasets_streaming, with_pandas, with_pyarrow]
)
def test_every_value_agrees_with_our_reader(
    read: Callable[[Path], list[dict[str, Any]]], dataset: LogitDataset, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = read(dataset.folder)
    tails = dataset.manifest.row_format.tail_columns
    assert len(tails) == (2 if dataset.manifest.keep["method"] == "topk" else 0)
    for row, expected in zip(theirs, ours(dataset), strict=True):
        teacher = expected.teacher
        assert (row["sample_id"], row["source"]) == (expected.sample_id, expected.source)
        assert [len(ids) for ids in row["kept_ids"]] == teacher.kept_counts_P.tolist()
        assert [len(logp) for logp in row["kept_logprobs"]] == teacher.kept_counts_P.tolist()
        pairs = [
            (row["input_ids"], expected.input_ids_L),
            (row["label_mask"], expected.label_mask_L),
            (flat(row["kept_ids"]), teacher.kept_ids_E),
            (flat(row["kept_logprobs"]), teacher.kept_logp_E),
            (row["realised_logprob"], teacher.realised_logp_P),
            (row["entropy"], teacher.entropy_P),
            *((row[name], teacher.tail_logsum_PT[:, j]) for j, name in enumerate(tails)),
        ]
        for value, mine in pairs:
            np.testing.assert_array_equal(np.asarray(value, dtype=mine.dtype), mine)


def test_what_the_readme_says_about_other_readers_is_true(
    dataset: LogitDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    section = GUIDE.read_text(encoding="utf-8").split("## Reading the dataset without us")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert all(name in "".join(blocks) for name in ("duckdb", "polars", "load_dataset"))
    monkeypatch.chdir(dataset.folder.parent)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(dataset.folder.parent / "readme-cache"))
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), {})
    assert "positions" in capsys.readouterr().out
