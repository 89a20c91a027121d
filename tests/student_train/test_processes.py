"""Real processes: torchrun with two ranks, the command line under signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import LogitDataset
from shared.files import alone_in
from shared.push import open_destination, push
from student_train.evaluation import Evaluation
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.s3_server import s3_server
from tests.student_train.test_train import log_of, weights_of

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
STEPS = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> LogitDataset:
    folder = tmp_path_factory.mktemp("dataset")
    chats = write_jsonl(folder / "chats.jsonl", chat_records(60))
    return sealed_dump(dump_settings(teacher_folder, chats, folder / "out"))


def config(student: Path, dataset: LogitDataset, folder: Path, name: str, **changes: Any) -> Path:
    tree: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {"dataset": str(dataset.folder)},
        "held_out": {"fraction": 0.2},
        "output": str(folder / name),
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "steps": STEPS,
        "rows_per_step": 7,
        "batch_tokens": 600,
        "evaluate_every": 15,
        "device": "cpu",
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree | changes))
    return path


def start(config: Path, *options: str, ranks: int = 1) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher = [*torchrun, "-m"] if ranks > 1 else ["-m"]
    return subprocess.Popen(
        [sys.executable, *launcher, "student_train", "run", str(config), *options], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run(config: Path, *options: str, ranks: int = 1, code: int = 0) -> str:
    process = start(config, *options, ranks=ranks)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, output + errors
    return output + errors


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in log_of(folder) if "loss" in entry]


def held_out_of(folder: Path) -> list[float]:
    return [entry["held_out"]["kl"] for entry in log_of(folder) if "held_out" in entry]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    log = folder / "log.jsonl"
    while not (log.exists() and f'"step": {step}, "loss"' in log.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_two_ranks_train_as_one_does_and_each_goes_on_from_the_other(
    student_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    """Under DDP, under FSDP2, and by turns under FSDP2, alone and under DDP: the same rows in every step; losses,
    gradients and weights equal but for the order of sums."""
    one = config(student_folder, dataset, tmp_path, "one")
    two = config(student_folder, dataset, tmp_path, "two")
    spread = config(student_folder, dataset, tmp_path, "spread", parallel="fsdp")
    changing = config(student_folder, dataset, tmp_path, "changing", checkpoint={"every_steps": 5, "keep": 1})
    run(one)
    told = json.loads(run(two, "--json", ranks=2).splitlines()[0])
    assert told["steps"] == STEPS, "the first rank alone says so"
    run(spread, ranks=2)
    for ranks, how, step in ((2, "fsdp", 8), (1, "fsdp", 20)):
        process = start(changing, "--set", f"parallel={how}", ranks=ranks)
        wait_for_step(tmp_path / "changing", step, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode != 0
    run(changing, ranks=2)
    whole = steps_of(tmp_path / "one")
    for name in ("two", "spread", "changing"):
        entries = steps_of(tmp_path / name)
        assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
        for key in ("loss", "ce", "kd", "grad_norm"):
            assert entries[0][key] == pytest.approx(whole[0][key], rel=1e-5), "nothing has added up yet"
        for key in ("positions", "lr", "loss", "ce", "kd", "grad_norm", "kept_mass", "student_kept_mass"):
            np.testing.assert_allclose([e[key] for e in entries], [e[key] for e in whole], rtol=2e-3, err_msg=key)
        held_out, expected = (
            [entry["held_out"]["kl"] for entry in log_of(tmp_path / each) if "held_out" in entry]
            for each in (name, "one")
        )
        np.testing.assert_allclose(held_out, expected, rtol=1e-3)
        looks = [Evaluation.read(tmp_path / each / "held_out.json") for each in (name, "one")]
        assert looks[0].rows == looks[1].rows > 0
        assert looks[0].means.positions == looks[1].means.positions == sum(each.count for each in looks[0].calibration)
        assert {row.sample_id for row in looks[0].worst} == {row.sample_id for row in looks[1].worst}
        assert [row.kl for row in looks[0].worst] == pytest.approx([row.kl for row in looks[1].worst], rel=1e-2)
        weights, other = weights_of(tmp_path / name / "model"), weights_of(tmp_path / "one/model")
        assert max(float((weights[each] - other[each]).abs().max()) for each in weights) < 2e-3


def test_two_ranks_from_an_object_store_take_the_rows_of_a_curriculum_and_a_mix_as_one_does(
    student_folder: Path, teacher_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    """Interrupted, and finished by one: both ranks fill one cache from a real server, verified."""
    chats = write_jsonl(tmp_path / "more.jsonl", chat_records(80)[60:])
    more = sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "more"))
    pace = {"difficulty": "teacher_nll", "order": "competence", "quantiles": [0, 0.9]}

    def mix(of: str) -> dict[str, Any]:
        return {
            "mix": [
                {"dataset": of.format(dataset.folder), "weight": 3, "curriculum": pace},
                {"dataset": of.format(more.folder), "weight": 1},
            ]
        }

    here = config(student_folder, dataset, tmp_path, "here", data=mix("{}"))
    run(here)
    with s3_server():
        url = "s3://bucket{}"
        for each in (dataset, more):
            push(each, open_destination(url.format(each.folder)))
        data = mix(url) | {"cache": str(tmp_path / "cache")}
        there = config(student_folder, dataset, tmp_path, "there", data=data, checkpoint={"every_steps": 5, "keep": 1})
        process = start(there, ranks=2)
        wait_for_step(tmp_path / "there", 8, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert "goes on after step" in run(there)
    expected, entries = steps_of(tmp_path / "here"), steps_of(tmp_path / "there")
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for key in ("positions", "loss", "ce", "kd", "grad_norm"):
        np.testing.assert_allclose([e[key] for e in entries], [e[key] for e in expected], rtol=2e-3, err_msg=key)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.parquet")}
    assert fetched == {Path(shard.path).name for each in (dataset, more) for shard in each.manifest.shards}


def test_fewer_held_out_rows_than_ranks_are_looked_at_and_nothing_is_said_of_ddp(
    student_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    chats = write_jsonl(tmp_path / "one.jsonl", chat_records(1))
    held_out = {"data": {"text": {"files": [str(chats)]}}}
    for how in ("ddp", "fsdp"):
        said = run(config(student_folder, dataset, tmp_path, how, steps=3, held_out=held_out, parallel=how), ranks=2)
        assert Evaluation.read(tmp_path / how / "held_out.json").rows == 1
        assert "find_unused_parameters" not in said
        assert "FutureWarning" not in said


def test_sigterm_leaves_a_checkpoint_and_exit_code_75_and_the_same_command_goes_on(
    student_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    whole, stopped = (config(student_folder, dataset, tmp_path, name) for name in ("whole", "stopped"))
    run(whole)
    for number, step in ((signal.SIGTERM, 5), (signal.SIGINT, 15)):
        process = start(stopped)
        wait_for_step(tmp_path / "stopped", step, process)
        process.send_signal(number)
        begin_s = time.monotonic()
        errors = process.communicate(timeout=60)[1]
        assert time.monotonic() - begin_s < 10
        assert process.returncode == 75, errors
        assert "checkpoint: " in errors
        assert errors.endswith("\n  next: run the same command again\n")
    said = run(stopped)
    assert "goes on after step" in said
    assert f"  next: student-train report {tmp_path}/stopped\n" in said
    for one, other in zip(steps_of(tmp_path / "whole"), steps_of(tmp_path / "stopped"), strict=True):
        assert [one[key] for key in ("step", "loss", "grad_norm")] == [
            other[key] for key in ("step", "loss", "grad_norm")
        ]
    assert "goes on" not in run(stopped), "it is finished, and says so again"


def test_out_of_time_is_an_interruption(student_folder: Path, dataset: LogitDataset, tmp_path: Path):
    long = config(student_folder, dataset, tmp_path, "long", steps=100_000)
    checkpoints, seconds = tmp_path / "long/checkpoints", 12
    while not checkpoints.exists():  # a busy machine may not come to its first step in time
        errors = run(long, "--stop-after", f"{seconds}s", code=75)
        assert "out of time" in errors
        seconds *= 3
    [checkpoint] = checkpoints.iterdir()
    done = steps_of(tmp_path / "long")[-1]["step"]
    assert checkpoint.name == f"step-{done:08d}"


def test_a_damaged_shard_ends_it_with_exit_code_3_and_a_checkpoint(
    student_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    damaged = config(student_folder, dataset, tmp_path, "damaged", held_out={}, shuffle_blocks=1, rows_per_step=2)
    shards = [dataset.folder / shard.path for shard in dataset.manifest.shards]
    whole = [shard.read_bytes() for shard in shards]
    try:
        for shard, data in zip(shards[3:], whole[3:], strict=True):
            half = len(data) // 2  # not among the sample ids, which are read at the start
            shard.write_bytes(data[:half] + bytes([data[half] ^ 8]) + data[half + 1 :])
        said = run(damaged, code=3)
    finally:
        for shard, data in zip(shards, whole, strict=True):
            shard.write_bytes(data)
    assert "damaged: expected sha256" in said
    assert "logit-shards repair" in said
    run(damaged)
    assert [entry["step"] for entry in steps_of(tmp_path / "damaged")] == list(range(1, STEPS + 1))


def test_ranks_all_end_where_another_process_writes_to_their_folder(
    student_folder: Path, dataset: LogitDataset, tmp_path: Path
):
    """Only the first holds the lock: the others learn that from it, and not from a connection that breaks."""
    taken = config(student_folder, dataset, tmp_path, "taken")
    (tmp_path / "taken" / "checkpoints").mkdir(parents=True)
    with alone_in(tmp_path / "taken"):
        said = run(taken, ranks=2, code=1)
    assert "another process is writing to it" in said
    assert "RuntimeError" not in said
    assert not (tmp_path / "taken" / "config.yaml").exists()
