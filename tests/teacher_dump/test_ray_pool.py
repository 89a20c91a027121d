"""Replicas of the teacher under a real Ray on this machine: lost ones are replaced, and the dataset is the same."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.dataset import LogitDataset
from shared.errors import ConfigError, LogitferryError, NonFiniteError
from shared.verification import verify
from shared.workers import Share
from teacher_dump import dump, ray_pool
from teacher_dump.config import RaySettings
from teacher_dump.dump import run_dump
from teacher_dump.ledger import Ledger
from teacher_dump.ray_pool import Replica, _needs, _room_for
from tests.data import chat_records, done_units, dump_settings, sealed_dump, write_jsonl
from tests.teacher_dump.test_seal import UNSCORABLE, blind_teacher

pytestmark = pytest.mark.cluster
__all__ = ["blind_teacher"]

SCORING = "ray::Replica.encoded"
"""What Ray calls a process while it is at a unit."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(num_cpus=2, include_dashboard=False)
    yield ray
    ray.shutdown()


def wait_for(found: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def scoring() -> list[psutil.Process]:
    """The processes that are at a unit right now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if SCORING in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def many(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LogitDataset]:
    """More records, and their dataset by one process."""
    folder = tmp_path_factory.mktemp("many")
    files = write_jsonl(folder / "chats.jsonl", chat_records(400))
    return files, sealed_dump(dump_settings(teacher_folder, files, folder / "out", unit_records=25))


def test_replicas_of_which_some_are_killed_make_the_dataset_of_one_process(
    cluster: Any, many: tuple[Path, LogitDataset], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two are killed while they score; each time another process takes their place and their units."""
    files, whole = many
    killed: list[int] = []

    def kill_two() -> None:
        for number in range(1, 3):
            wait_for(lambda at=number: len(list((tmp_path / "out/data").glob("*.parquet"))) >= at)
            victim = wait_for(scoring)[0]
            victim.kill()
            killed.append(victim.pid)

    seen: list[Any] = []
    seal = dump.seal
    monkeypatch.setattr(dump, "seal", lambda ledger: (seen.extend(done_units(ledger).values()), seal(ledger))[1])
    thread = threading.Thread(target=kill_two)
    thread.start()
    manifest = run_dump(dump_settings(teacher_folder, files, tmp_path / "out", unit_records=25), launcher="ray")
    thread.join()
    assert len(set(killed)) == 2
    assert manifest == whole.manifest, "the same bytes of everything"
    assert verify(LogitDataset.open(tmp_path / "out"), deep=True).faults == []
    workers = {record.worker for record in seen}
    assert all(worker.startswith("a replica on ") for worker in workers)
    assert len(workers) > 2, "more processes than replicas"
    assert not scoring(), "the replicas are gone"


def test_what_one_process_has_begun_replicas_finish(
    cluster: Any, sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out")
    assert run_dump(settings, share=Share(0, 2)) is None
    untouched = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/data").iterdir()}
    assert len(untouched) == 2
    assert run_dump(settings, launcher="ray") == sealed.manifest
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched


def test_an_error_of_a_replica_is_the_error_of_the_run(cluster: Any, blind_teacher: Path, chats: Path, tmp_path: Path):
    settings = dump_settings(blind_teacher, chats, tmp_path / "out")
    with pytest.raises(NonFiniteError, match=r"row 'chat-1?5', token \d+: log p of the realised token is nan"):
        run_dump(settings, launcher="ray")
    (failure, *_) = Ledger(dump.open_folder(settings.output)).failures().values()
    assert "is nan" in failure.error
    assert failure.worker.startswith("on ")
    skipping = dump_settings(blind_teacher, chats, tmp_path / "out", on_unscorable="skip")
    manifest = run_dump(skipping, launcher="ray")
    assert manifest is not None
    assert manifest.inputs[0].tally["unscorable"] == len(UNSCORABLE)


def test_replicas_that_there_is_no_room_for_hold_nothing_up(
    cluster: Any, sealed: LogitDataset, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """Four are asked for and two fit, as where nodes are lost or not there yet."""
    settings = dump_settings(teacher_folder, chats, tmp_path / "out", ray__replicas=4)
    assert run_dump(settings, launcher="ray") == sealed.manifest


class Deadly(Replica):
    def encoded(self, unit: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_unit_that_kills_every_replica_ends_the_run(
    cluster: Any, teacher_folder: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ray_pool, "Replica", Deadly)
    monkeypatch.setattr(ray_pool, "DEATHS", 2)
    # Two replicas have two units in hand each; whose second death is told first is chance.
    with pytest.raises(LogitferryError, match=r"2 replicas died over unit [0-3]: "):
        run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"), launcher="ray")


def test_a_teacher_that_cannot_be_loaded_is_told_as_in_one_process(
    cluster: Any, teacher_folder: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out", teacher__device="meta9")
    with pytest.raises(ConfigError, match="device 'meta9' cannot be used here"):
        run_dump(settings, launcher="ray")


def test_a_replica_that_no_node_has_room_for_is_refused(
    cluster: Any, teacher_folder: Path, chats: Path, tmp_path: Path
):
    settings = dump_settings(teacher_folder, chats, tmp_path / "out", ray__gpus=1)
    with pytest.raises(ConfigError, match=r"one replica takes 1 CPU, 1 GPU, and .* have 2 CPU, 0 GPU"):
        run_dump(settings, launcher="ray")


def test_a_share_and_ray_exclude_each_other(teacher_folder: Path, chats: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--worker and --launcher ray exclude each other"):
        run_dump(dump_settings(teacher_folder, chats, tmp_path / "out"), launcher="ray", share=Share(0, 2))


def test_needs_follow_the_engines_parallelism(teacher_folder: Path, chats: Path, tmp_path: Path):
    class Work:
        teacher = dump_settings(teacher_folder, chats, tmp_path / "out").teacher

    work: Any = Work
    with_gpus = {"CPU": 64.0, "GPU": 8.0}
    assert _needs(work, RaySettings(), {"CPU": 2.0}) == {"CPU": 1}
    assert _needs(work, RaySettings(cpus=4), with_gpus) == {"CPU": 4, "GPU": 1}
    assert _needs(work, RaySettings(resources={"ASIC": 2}), with_gpus) == {"CPU": 1, "ASIC": 2}
    tree = {"model": "m", "engine": "vllm", "vllm": {"tensor_parallel": 2, "pipeline_parallel": 2}}
    Work.teacher = type(Work.teacher).model_validate(tree)
    assert _needs(work, RaySettings(), with_gpus) == {"CPU": 1, "GPU": 4}
    assert _room_for({"CPU": 1, "GPU": 4}, [with_gpus]) == 2
    assert _room_for({"CPU": 1, "GPU": 4}, [{"CPU": 64.0, "GPU": 6.0}] * 3) == 3, "none spans two nodes"
    Work.teacher = type(Work.teacher).model_validate({**tree, "vllm": {"tensor_parallel": 16, "backend": "ray"}})
    assert _needs(work, RaySettings(), with_gpus) == {"CPU": 1}, "vLLM's own workers ask for theirs"


def test_sigterm_ends_the_command_in_seconds_and_one_process_goes_on(
    many: tuple[Path, LogitDataset], teacher_folder: Path, tmp_path: Path
):
    """In a cluster of its own, which ends with it."""
    files, whole = many
    config = tmp_path / "dump.json"
    config.write_text(dump_settings(teacher_folder, files, tmp_path / "out", unit_records=25).model_dump_json())
    command = [sys.executable, "-m", "teacher_dump", "run", str(config), "--launcher", "ray", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((tmp_path / "out/data").glob("*.parquet")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM\n  next: run the same command again" in errors
    assert time.monotonic() - begin_s < 30
    committed = len(list((tmp_path / "out/data").glob("*.parquet")))
    assert 0 < committed < 16
    ran = subprocess.run([*command[:5], "--json"], capture_output=True, text=True, timeout=200, check=False)
    assert json.loads(ran.stdout)["identity"] == whole.identity(), ran.stderr
