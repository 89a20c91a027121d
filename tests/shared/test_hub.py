"""The Hugging Face Hub: the real client in processes of its own, and a server here that speaks the Hub's API.

Without xet, whose protocol is not spoken here.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.dataset import LogitDataset
from shared.verification import verify
from tests.shared.hub_server import SIGNATURE, TOKEN, Hub, hub_server
from tests.shared.made_datasets import made_rows, write_dataset
from tests.shared.stores import files_of

URL = "hf://datasets/org/name"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as found:
        yield found


@pytest.fixture
def local(tmp_path: Path) -> LogitDataset:
    return LogitDataset.open(write_dataset(tmp_path / "local", [made_rows(number, 4) for number in range(3)]))


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    changes = {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    return dict(os.environ) | changes


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begins `logit-shards` in a process; whatever any of them says is free of secrets, and so is every file."""
    said: list[str] = []

    def started(*arguments: object, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "shared.logit_shards", *map(str, arguments)]
        process = subprocess.Popen(
            command, env=environment | changes, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        communicate = process.communicate

        def noted(*a: Any, **options: Any) -> tuple[str, str]:
            texts = communicate(*a, **options)
            said.extend(texts)
            return texts

        process.communicate = noted  # type: ignore[method-assign]
        return process

    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    yield started
    assert TOKEN not in "".join(said)
    assert SIGNATURE not in "".join(said)
    assert said
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[str]]) -> Run:
    def ran(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **changes)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, output, errors)

    return ran


def shards_in(uploads: list[str]) -> list[str]:
    return [each for each in uploads if len(each) == 64]


def test_push_and_pull_bring_the_same_dataset_and_send_nothing_twice(
    hub: Hub, local: LogitDataset, run: Run, tmp_path: Path
):
    pushed = run("push", local.folder, URL, "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["sent"] == 6
    assert hub.repos["org/name"].private
    assert hub.files("org/name") == files_of(local.folder)
    assert len(hub.repos["org/name"].commits) == 2, "the empty one, and one with all of it"
    assert len(hub.uploads) == 6
    assert json.loads(run("push", local.folder, URL, "--json").stdout)["sent"] == 0
    assert len(hub.uploads) == 6
    pulled = run("pull", URL, tmp_path / "here")
    assert pulled.returncode == 0, pulled.stderr
    assert files_of(tmp_path / "here") == files_of(local.folder)


@pytest.mark.cluster
def test_killed_in_the_middle_a_push_goes_on_where_it_was(
    hub: Hub, local: LogitDataset, run: Run, start: Any, tmp_path: Path
):
    for number in (1, 2, 3):
        process = start("push", local.folder, URL)
        hub.on_upload = lambda process=process: os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        assert len(hub.uploads) == number, "one more each time"
        hub.on_upload = lambda: None
        assert hub.files("org/name") == {}
    refused = run("pull", URL, tmp_path / "none")
    assert refused.returncode == 3
    assert "is no sealed dataset" in refused.stderr
    assert run("push", local.folder, URL).returncode == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == 6
    assert hub.files("org/name") == files_of(local.folder)


@pytest.mark.cluster
def test_stopped_by_sigterm_it_says_so_and_runs_again(hub: Hub, local: LogitDataset, run: Run, start: Any):
    process = start("push", local.folder, URL)
    hub.on_upload = lambda: os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM\n  next: run the same command again" in errors
    hub.on_upload = lambda: None
    assert run("push", local.folder, URL).returncode == 0
    assert len(hub.uploads) == len(set(hub.uploads)) == 6


@pytest.mark.cluster
def test_killed_in_the_middle_a_pull_goes_on_where_it_was(
    hub: Hub, local: LogitDataset, run: Run, start: Any, tmp_path: Path
):
    assert run("push", local.folder, URL).returncode == 0
    process = start("pull", URL, tmp_path / "here")
    hub.on_download = lambda: len(hub.downloads) == 4 and os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "here/manifest.json").exists()
    hub.on_download = lambda: None
    again = run("pull", URL, tmp_path / "here", "--json")
    assert json.loads(again.stdout)["kept"] == 2, "the tokenizer and a shard; the second shard was under way"
    assert hub.downloads.count("data/part-00000.parquet") == 1
    assert files_of(tmp_path / "here") == files_of(local.folder)


@pytest.mark.cluster
def test_a_flipped_byte_on_the_hub_is_found(hub: Hub, local: LogitDataset, run: Run, tmp_path: Path):
    assert run("push", local.folder, URL).returncode == 0
    oid = local.manifest.shards[1].sha256
    hub.objects[oid] = hub.objects[oid][:-9] + b"?" + hub.objects[oid][-8:]
    pulled = run("pull", URL, tmp_path / "here")
    assert pulled.returncode == 3
    assert f"{URL}/data/part-00001.parquet: damaged: expected sha256 {oid[:16]}…" in pulled.stderr
    assert not (tmp_path / "here/manifest.json").exists()


@pytest.mark.cluster
def test_another_dataset_is_replaced_at_once_and_only_where_that_is_said(
    hub: Hub, local: LogitDataset, run: Run, tmp_path: Path
):
    other = write_dataset(tmp_path / "other", [made_rows(number, 3) for number in range(5, 7)])
    assert run("push", local.folder, URL).returncode == 0
    refused = run("push", other, URL)
    assert refused.returncode == 4
    assert "another dataset is there" in refused.stderr
    assert "--replace" in refused.stderr
    assert hub.files("org/name") == files_of(local.folder)
    assert run("push", other, URL, "--replace").returncode == 0
    assert hub.files("org/name") == files_of(other)
    assert len(hub.repos["org/name"].commits) == 3, "nobody sees half of both"


@pytest.mark.cluster
@pytest.mark.parametrize("path", ["data/part-00001.parquet", "README.md"])
def test_what_the_hub_did_not_take_as_it_was_sent_is_told(path: str, hub: Hub, local: LogitDataset, run: Run):
    hub.on_commit = lambda files: files.update({path: b"something else"})
    failed = run("push", local.folder, URL)
    assert failed.returncode == 3
    assert f"{URL}/{path}: the Hub says" in failed.stderr
    hub.on_commit = lambda files: files.pop(path)
    assert "the Hub says that it has no such file" in run("push", local.folder, URL).stderr
    hub.on_commit = lambda files: None
    assert run("push", local.folder, URL).returncode == 0
    assert hub.files("org/name") == files_of(local.folder)


@pytest.mark.cluster
def test_what_was_pushed_there_meanwhile_is_not_written_over(
    hub: Hub, local: LogitDataset, run: Run, start: Any, tmp_path: Path
):
    other = write_dataset(tmp_path / "other", [made_rows(number, 3) for number in range(5, 7)])

    def meanwhile() -> None:
        hub.on_upload = lambda: None
        assert run("push", other, URL).returncode == 0

    hub.on_upload = meanwhile
    late = run("push", local.folder, URL)
    assert late.returncode == 4, late.stderr
    assert "somebody else has changed it since it was looked at\n  next: run the same command again" in late.stderr
    assert hub.files("org/name") == files_of(other)
    assert "another dataset is there" in run("push", local.folder, URL).stderr


@pytest.mark.cluster
def test_what_the_hub_says_of_an_upload_is_told_without_its_signature(hub: Hub, local: LogitDataset, run: Run):
    hub.refusals = [429, 403]
    refused = run("push", local.folder, URL)
    assert refused.returncode == 1
    assert "HTTP Error 429 thrown while requesting PUT" in refused.stderr, "the library's own log"
    assert "part-00000.parquet cannot be reached: Error while uploading" in refused.stderr
    assert "the signature has expired" in refused.stderr
    assert "X-Amz-Signature=***" in refused.stderr
    assert run("push", local.folder, URL).returncode == 0


LOAD = """
import datasets
rows = datasets.load_dataset("org/name", split="train")
print(len(rows), sorted(rows[0])[:2])
"""


@pytest.mark.cluster
def test_datasets_loads_it_from_the_hub_by_its_name(
    hub: Hub, local: LogitDataset, run: Run, environment: dict[str, str]
):
    assert run("push", local.folder, URL).returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "12 ['entropy', 'input_ids']\n", done.stderr


IN_SMALL_COMMITS = """
import sys
import shared.hub
from shared.logit_shards import main

shared.hub.COMMIT_FILES = 2
sys.argv = ["logit-shards", *sys.argv[1:]]
main()
"""


@pytest.mark.cluster
def test_of_a_dataset_too_large_for_one_commit_no_commit_is_half_a_dataset(
    hub: Hub, local: LogitDataset, environment: dict[str, str], tmp_path: Path
):
    other = write_dataset(tmp_path / "other", [made_rows(number, 2) for number in range(5, 10)])
    for folder, options in ((local.folder, []), (other, ["--replace"])):
        command = [sys.executable, "-c", IN_SMALL_COMMITS, "push", str(folder), URL, *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert hub.files("org/name") == files_of(folder)
    assert len(hub.repos["org/name"].commits) == 1 + 3 + 4
    for _, files in hub.repos["org/name"].commits:
        if manifest := files.get("manifest.json"):
            shards = {shard["path"]: shard["sha256"] for shard in json.loads(manifest)["shards"]}
            assert {path: each for path, each in files.items() if path.startswith("data/")} == shards


@pytest.mark.cluster
def test_what_was_edited_on_the_hub_comes_along(hub: Hub, local: LogitDataset, run: Run, tmp_path: Path):
    assert run("push", local.folder, URL).returncode == 0
    hub.repos["org/name"].add(hub.repos["org/name"].commits[-1][1] | {"README.md": b"---\nlicense: mit\n---\nOurs\n"})
    assert run("pull", URL, tmp_path / "here").returncode == 0
    assert (tmp_path / "here/README.md").read_text().endswith("Ours\n")
    assert verify(LogitDataset.open(tmp_path / "here"), deep=True).faults == []


@pytest.mark.cluster
def test_a_public_repository_is_no_surprise(hub: Hub, local: LogitDataset, run: Run):
    assert run("push", local.folder, URL, "--public").returncode == 0
    assert not hub.repos["org/name"].private
    refused = run("push", local.folder, URL)
    assert refused.returncode == 4
    assert "is public: everybody would see the dataset" in refused.stderr


@pytest.mark.cluster
def test_without_the_token_nothing_is_seen_or_made(hub: Hub, local: LogitDataset, run: Run, tmp_path: Path):
    refused = run("push", local.folder, URL, HF_TOKEN="")
    assert refused.returncode == 1
    assert "check your access" in refused.stderr
    assert not hub.repos
    assert run("push", local.folder, URL).returncode == 0
    refused = run("pull", URL, tmp_path / "here", HF_TOKEN="")
    assert refused.returncode == 3
    assert "whether HF_TOKEN lets you read it" in refused.stderr
    wrong = run("pull", URL, tmp_path / "here", HF_TOKEN="hf_somebodyelses")
    assert wrong.returncode == 3
    assert "hf_somebodyelses" not in wrong.stderr


@pytest.mark.cluster
def test_a_server_that_is_gone_is_named(hub: Hub, local: LogitDataset, run: Run):
    gone = run("push", local.folder, URL, HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 1
    assert f"{URL} cannot be reached" in gone.stderr


READ = """
import sys
from pathlib import Path
from huggingface_hub import snapshot_download
from shared.dataset import LogitDataset
from shared.verification import verify

expected = LogitDataset.open(sys.argv[1])
dataset = LogitDataset.open("hf://datasets/org/name")
assert dataset.identity() == expected.identity()
assert dataset.sample_ids() == expected.sample_ids()
assert len(dataset.read_shard(2)) == 4
snapshot = Path(snapshot_download("org/name", repo_type="dataset"))
assert (snapshot / "manifest.json").is_symlink()
found = LogitDataset.open(snapshot)
assert verify(found, deep=True).faults == []
assert found.identity() == expected.identity()
print("read")
"""


@pytest.mark.cluster
def test_a_dataset_on_the_hub_is_read_in_place_and_from_the_hubs_own_cache(
    hub: Hub, local: LogitDataset, run: Run, environment: dict[str, str]
):
    assert run("push", local.folder, URL).returncode == 0
    command = [sys.executable, "-c", READ, str(local.folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "read\n", done.stderr
    shown = run("info", URL, "--json")
    assert json.loads(shown.stdout)["identity"] == local.identity()
