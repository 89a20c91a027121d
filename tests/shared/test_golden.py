"""Datasets of format version 1 stay readable, to the last bit, and damage to them stays damage.

tests/golden/make.py says how they were made.  They are the format as people have it on their disks: where one of
these tests fails, the reader is wrong, not the file.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from shared import errors
from shared.dataset import LogitDataset
from shared.verification import verify
from tests.golden.make import plain_rows

GOLDEN = Path(__file__).parents[1] / "golden"
DAMAGED = GOLDEN / "v1-damaged"
WHOLE = ("v1-topk", "v1-threshold", "v1-exact")


def expected_of(folder: Path) -> dict[str, Any]:
    path = folder / "expected.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@pytest.mark.parametrize("name", WHOLE)
def test_golden_datasets_read_as_they_were_written(name: str):
    expected = expected_of(GOLDEN)
    assert set(expected) == set(WHOLE)
    assert plain_rows(GOLDEN / name) == expected[name]
    assert sum(map(len, expected[name])) >= 2


@pytest.mark.parametrize("name", WHOLE)
def test_golden_datasets_are_whole(name: str):
    dataset = LogitDataset.open(GOLDEN / name)
    assert verify(dataset, deep=True).faults == []
    assert verify(dataset, deep=False).faults == []
    assert dataset.info()["format_version"] == 1
    assert dataset.tokenizer().encode("abc√").tokens == ["abc", "√"]
    ids = [[row["sample_id"] for row in rows] for rows in expected_of(GOLDEN)[name]]
    assert dataset.sample_ids() == ids


def test_golden_damage_is_all_there():
    folders = {path.name for path in DAMAGED.glob("*") if path.is_dir()}
    assert folders == set(expected_of(DAMAGED))
    assert len(folders) > 30


@pytest.mark.parametrize("name", expected_of(DAMAGED) or ["not made"])
def test_golden_damage_ends_in_its_error(name: str):
    expected = expected_of(DAMAGED)[name]
    step = expected["step"]
    steps = {
        "open": lambda: LogitDataset.open(DAMAGED / name),
        "read": lambda: LogitDataset.open(DAMAGED / name).read_shard(0),
        "tokenizer": lambda: LogitDataset.open(DAMAGED / name).tokenizer(),
    }
    if step == "verify":
        dataset = LogitDataset.open(DAMAGED / name)
        dataset.read_shard(0)
        assert expected["words"] in "; ".join(verify(dataset, deep=True).faults)
        return
    with pytest.raises(errors.LogitferryError) as caught:
        steps[step]()
    assert type(caught.value).__name__ == expected["error"]
    assert expected["words"] in str(caught.value)
    assert name in str(caught.value)  # it says which dataset
    if step != "open":
        assert verify(LogitDataset.open(DAMAGED / name), deep=True).faults
