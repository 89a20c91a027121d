"""Datasets pushed to and pulled from a real S3 server process."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from shared.push import open_destination, push
from shared.verification import verify
from tests.killed import killed_at
from tests.s3_server import Store, s3_server, traced_requests
from tests.shared.made_datasets import made_rows, write_dataset
from tests.shared.stores import files_of

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCY"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with s3_server() as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        found.client.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> LogitDataset:
    folder = tmp_path_factory.mktemp("made") / "set"
    return LogitDataset.open(write_dataset(folder, [made_rows(number, 4) for number in range(3)]))


def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.logit_shards", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | changes, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert SECRET not in done.stdout + done.stderr
    return done


def times_written(store: Store, prefix: str) -> Counter[str]:
    found: Any = store.client.list_object_versions(Bucket="bucket", Prefix=f"{prefix}/")
    return Counter(each["Key"].removeprefix(f"{prefix}/") for each in found.get("Versions", []))


def test_killed_between_any_two_requests_a_push_writes_nothing_twice(store: Store, local: LogitDataset):
    """In a forked process; this one never has the threads of an S3 client."""
    expected = files_of(local.folder)
    for step in range(1, 2 * len(expected) + 2):
        prefix = f"killed-{step}"

        def work(url: str = f"s3://bucket/{prefix}") -> None:
            push(local, open_destination(url))

        killed = killed_at(step, work, traced_requests)
        assert killed == (step <= 2 * len(expected))
        seen = store.files(prefix)
        assert seen.items() <= expected.items()
        assert ("manifest.json" in seen) == (len(seen) == len(expected)), "last of all"
        assert killed_at(99, work, traced_requests) is False
        assert store.files(prefix) == expected
        assert times_written(store, prefix) == dict.fromkeys(expected, 1)


def test_what_is_pushed_is_pulled_and_a_flipped_byte_is_found(store: Store, local: LogitDataset, tmp_path: Path):
    pushed = run("push", local.folder, "s3://bucket/one", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["sent"] == 6
    assert json.loads(run("push", local.folder, "s3://bucket/one", "--json").stdout)["sent"] == 0
    assert run("pull", "s3://bucket/one", tmp_path / "here").returncode == 0
    assert files_of(tmp_path / "here") == files_of(local.folder)
    assert run("pull", "s3://bucket/one", tmp_path / "part", "--share", "0.5").returncode == 0
    part = LogitDataset.open(tmp_path / "part")
    assert verify(part, deep=True).faults == []
    assert part.manifest.total("rows") == 6
    shard = store.files("one")["data/part-00001.parquet"]
    store.client.put_object(Bucket="bucket", Key="one/data/part-00001.parquet", Body=shard[:-20] + b"?" + shard[-19:])
    damaged = run("pull", "s3://bucket/one", tmp_path / "damaged")
    assert damaged.returncode == 3
    assert "s3://bucket/one/data/part-00001.parquet: damaged: expected sha256" in damaged.stderr
    assert not (tmp_path / "damaged/manifest.json").exists()
    assert json.loads(run("push", local.folder, "s3://bucket/one", "--json").stdout)["sent"] == 1, "which mends it"


def test_another_dataset_there_is_refused_with_its_exit_code(store: Store, local: LogitDataset, tmp_path: Path):
    other = write_dataset(tmp_path / "other", [made_rows(9, 3)])
    assert run("push", local.folder, "s3://bucket/two").returncode == 0
    refused = run("push", other, "s3://bucket/two")
    assert refused.returncode == 4
    assert "s3://bucket/two: another dataset is there" in refused.stderr
    assert run("push", other, "s3://bucket/two", "--replace").returncode == 0
    assert store.files("two") == files_of(other)


def test_secrets_are_never_repeated(store: Store, local: LogitDataset, tmp_path: Path):
    for arguments in (
        ["push", local.folder, f"s3://AKIAEXAMPLE:{SECRET}@bucket/three"],
        ["pull", f"s3://AKIAEXAMPLE:{SECRET}@bucket/one", tmp_path / "x"],
        ["info", f"s3://AKIAEXAMPLE:{SECRET}@bucket/one"],
    ):
        refused = run(*arguments)
        assert refused.returncode == 2
        assert "has a key or password in it" in refused.stderr
    assert not store.files("three")
    nowhere = run("push", local.folder, "s3://nowhere/at-all")
    assert nowhere.returncode == 1
    assert "make the bucket" in nowhere.stderr
    gone = run("pull", "s3://bucket/one", tmp_path / "x", AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert gone.returncode == 1
    assert "cannot be reached" in gone.stderr
