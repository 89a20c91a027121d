"""Dumps from and to an object store: a real S3 server process, spoken to over HTTP; and the store in memory."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset, read_info
from shared.folders import open_folder
from shared.verification import verify
from shared.workers import Share
from teacher_dump.dump import run_dump
from teacher_dump.ledger import Ledger
from teacher_dump.status import status
from tests.data import dump_settings
from tests.killed import Steps, killed_at
from tests.s3_server import Store, s3_server, traced_requests
from tests.shared.stores import files_of


def as_local(files: dict[str, bytes], folder: Path) -> LogitDataset:
    """A dataset of an object store, copied here."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return LogitDataset.open(folder)


def test_a_dump_from_and_to_memory_is_the_one_of_this_machine(
    sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    inputs, output = open_folder(f"memory:/{tmp_path}/in"), f"memory:/{tmp_path}/out"
    inputs.write("chats.jsonl", chats.read_bytes())
    settings = dump_settings(teacher_folder, Path("unused"), Path("unused")).model_copy(update={"output": output})
    data = settings.data.model_copy(update={"files": [f"{inputs.name}/chats.jsonl"]})
    settings = settings.model_copy(update={"data": data})
    assert run_dump(settings, share=Share(1, 2)) is None
    found = status(Ledger(open_folder(output)))
    assert (found.done, found.units) == (2, 4)
    assert run_dump(settings, share=Share(0, 2)) == sealed.manifest
    folder = open_folder(output)
    assert {name: folder.read(name) for name in folder.files()} == files_of(sealed.folder)
    assert run_dump(settings) == sealed.manifest, "run again, it says what is there"
    assert read_info(output)["identity"] == sealed.identity()


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with s3_server() as found:
        yield found


def settings_to(output: str, teacher: Path, chats: Path) -> Any:
    return dump_settings(teacher, chats, Path("unused")).model_copy(update={"output": output})


def in_a_process(settings: Any, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """So that this one, which is forked below, never has the threads of an S3 client."""
    config = folder / f"{abs(hash(settings.output))}.json"
    config.write_text(settings.model_dump_json())
    command = [sys.executable, "-m", "teacher_dump", "run", str(config), "--json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.cluster
@pytest.mark.parametrize("first", [1, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 3, 4))])
def test_killed_between_any_two_requests_twice_in_a_row(
    store: Store, sealed: LogitDataset, teacher_folder: Path, chats: Path, first: int
):
    """Every fourth step, then a later one, then to the end.  A shard is PUT, then its record, the manifest last."""
    expected = files_of(sealed.folder)
    step, ended = first, False
    while not ended:
        settings = settings_to(f"s3://bucket/killed-{step}", teacher_folder, chats)
        ended = not killed_at(step, lambda at=settings: run_dump(at), traced_requests)
        killed_at(1 + step * 7 % 19, lambda at=settings: run_dump(at), traced_requests)
        seen = store.files(f"killed-{step}")
        for name, data in seen.items():
            if name.startswith("data/") or name == "manifest.json":
                assert data == expected[name], (step, name)
        done = [json.loads(data)["shard"] for name, data in seen.items() if "/units/" in name]
        assert all(seen[shard["path"]] == expected[shard["path"]] for shard in done)
        assert killed_at(10_000, lambda at=settings: run_dump(at), traced_requests) is False
        assert store.files(f"killed-{step}") == expected, step
        step += 4
    assert step > 2 * (4 * 2 + 4 + 4), "two of each shard, record, file of the plan and file of the dataset"


@pytest.mark.cluster
def test_an_upload_in_parts_that_was_cut_leaves_nothing_to_be_seen(
    store: Store, sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """As large shards are sent; killed after the second part of the first one."""
    settings = settings_to("s3://bucket/parts", teacher_folder, chats)

    @contextmanager
    def in_parts(steps: Steps) -> Iterator[None]:
        import s3fs

        call = s3fs.S3FileSystem._call_s3
        upload = s3fs.S3FileSystem._pipe_file

        async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
            answer = await call(self, method, *arguments, **options)
            if method == "upload_part":
                steps.reach("a part")
            return answer

        async def in_small_parts(self: Any, path: str, data: bytes, **options: Any) -> Any:
            small = {"chunksize": 1000, "max_concurrency": 1} if path.endswith(".parquet") else {}
            return await upload(self, path, data, **options, **small)

        s3fs.S3FileSystem._call_s3 = counted
        s3fs.S3FileSystem._pipe_file = in_small_parts
        yield

    assert killed_at(2, lambda: run_dump(settings), in_parts)
    assert store.open_uploads() == ["parts/data/part-00000.parquet"], "what the store's own rules are to remove"
    assert not [name for name in store.files("parts") if name.startswith("data/")]
    ran = in_a_process(settings, tmp_path)
    assert json.loads(ran.communicate(timeout=120)[0])["sealed"]
    assert store.files("parts") == files_of(sealed.folder)


@pytest.mark.cluster
def test_workers_from_and_to_s3_one_of_them_stopped_and_started_again(
    store: Store, sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    store.client.put_object(Bucket="bucket", Key="in/chats.jsonl", Body=chats.read_bytes())
    settings = settings_to("s3://bucket/two", teacher_folder, Path("unused"))
    data = settings.data.model_copy(update={"files": ["s3://bucket/in/chats.jsonl"]})
    settings = settings.model_copy(update={"data": data, "unit_records": 1})
    first, second = (in_a_process(settings, tmp_path, f"--worker={n}/2") for n in range(2))
    deadline = time.monotonic() + 120
    while not any("/units/" in name for name in store.files("two")):
        assert time.monotonic() < deadline
        assert first.poll() is None or second.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) in (75, 0)
    second.communicate(timeout=120)
    assert second.returncode == 0
    again = in_a_process(settings, tmp_path, "--worker=0/2")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    told = json.loads(output)
    assert told["sealed"]
    copy = as_local(store.files("two"), tmp_path / "copy")
    assert verify(copy, deep=True).faults == []
    assert [name for names in copy.sample_ids() for name in names] == [f"chat-{n}" for n in range(23)]
    shown = subprocess.run(
        [sys.executable, "-m", "shared.logit_shards", "info", "s3://bucket/two", "--json"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(shown.stdout)["identity"] == told["identity"] == copy.identity()


@pytest.mark.cluster
def test_a_bucket_that_is_not_there_and_a_server_that_is_gone(
    store: Store, teacher_folder: Path, chats: Path, tmp_path: Path
):
    ran = in_a_process(settings_to("s3://nowhere/out", teacher_folder, chats), tmp_path)
    _, errors = ran.communicate(timeout=120)
    assert ran.returncode == 1, errors
    assert "s3://nowhere/out/.probe-" in errors
    assert "cannot be written: The specified bucket does not exist\n  next: make the bucket" in errors


READ = """
import sys
from pathlib import Path
from shared.dataset import LogitDataset

here, cache = LogitDataset.open(sys.argv[1]), Path(sys.argv[2])
there = LogitDataset.open("s3://bucket/read", cache=cache)
assert there.sample_ids() == here.sample_ids()
assert not list(cache.rglob("*.parquet")), "of ids only their columns are read"
there.tokenizer()
for index in (1, 0, 1):
    rows = zip(there.read_shard(index), here.read_shard(index), strict=True)
    assert all((one.input_ids_L == other.input_ids_L).all() for one, other in rows)
assert len(list(cache.rglob("*.parquet"))) == 2
print("read")
"""


@pytest.mark.cluster
def test_a_sealed_dataset_is_read_shard_by_shard(store: Store, sealed: LogitDataset, tmp_path: Path):
    """As a student reads it, in a process of its own."""
    for name, data in files_of(sealed.folder).items():
        store.client.put_object(Bucket="bucket", Key=f"read/{name}", Body=data)
    command = [sys.executable, "-c", READ, str(sealed.folder), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "read\n", done.stderr
