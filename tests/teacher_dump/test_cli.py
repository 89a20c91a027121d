"""The verbs of `teacher-dump` for dumps that take more than one run or worker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from shared.amounts import duration, seconds_of, size
from shared.cli import run_command
from shared.errors import ConfigError, LogitferryError
from teacher_dump.cli import cli
from tests.data import chat_records, dump_settings, write_jsonl

Invoke = Callable[..., Result]


@pytest.fixture
def config(teacher_folder: Path, chats: Path, tmp_path: Path) -> Path:
    path = tmp_path / "dump.yaml"
    path.write_text(dump_settings(teacher_folder, chats, tmp_path / "out").model_dump_json())
    return path


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: CliRunner().invoke(cli, list(map(str, arguments)))


def test_workers_say_what_is_left_and_the_last_one_that_it_sealed(config: Path, invoke: Invoke, tmp_path: Path):
    first = invoke("run", config, "--worker", "1/2")
    assert first.exit_code == 0, first.output
    assert f"{tmp_path}/out: 2 of 4 units (50.0%); " in first.output
    told = json.loads(invoke("status", config, "--json").stdout)
    assert (told["sealed"], told["done"], told["units"]) == (False, 2, 4)
    assert [worker["units"] for worker in told["workers"]] == [2]
    assert told["workers"][0]["worker"].startswith("1/2 on ")
    last = invoke("run", config, "--worker", "0/2", "--json")
    assert json.loads(last.stdout)["sealed"]
    told = json.loads(invoke("status", tmp_path / "out", "--json").stdout)
    assert (told["sealed"], told["done"], told["units"]) == (True, 4, 4)


def test_ranks_come_from_the_environment(config: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 of 4 units" in invoke("run", config).output
    assert "sealed" in invoke("run", config, "--worker", "0/1").output


def test_an_array_job_without_shares_is_warned(
    config: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Under srun each task is the first of one."""
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1"), ("SLURM_ARRAY_TASK_COUNT", "8")):
        monkeypatch.setenv(name, value)
    assert invoke("run", config, "--plan-only").exit_code == 0
    assert "this is one of 8 tasks of an array job and takes all units" in caplog.text


def test_a_plan_alone(config: Path, invoke: Invoke, tmp_path: Path):
    told = invoke("run", config, "--plan-only")
    assert told.exit_code == 0, told.output
    assert "0 of 4 units" in told.output
    assert (tmp_path / "out/.logitferry/plan.json").is_file()
    assert not (tmp_path / "out/data").exists()


def test_sealing_by_hand(config: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in (tmp_path / "nowhere", tmp_path / "out"):
        nothing = invoke("seal", place)
        assert isinstance(nothing.exception, ConfigError)
        assert "no dump was begun here" in str(nothing.exception)
    invoke("run", config, "--worker", "0/2")
    early = invoke("seal", config)
    assert isinstance(early.exception, LogitferryError)
    assert "there are units left to do" in str(early.exception)
    with monkeypatch.context() as patch:  # the last worker was killed before it sealed
        patch.setattr("teacher_dump.dump.seal", lambda ledger: None)
        told = invoke("run", config, "--worker", "1/2")
    assert f"next: teacher-dump seal {tmp_path}/out" in told.output
    sealed = json.loads(invoke("seal", tmp_path / "out", "--json").stdout)
    assert sealed["sealed"]
    assert sealed["rows"] == 23
    assert json.loads(invoke("seal", config, "--json").stdout) == sealed, "a sealed one stays as it is"


def test_sealing_and_status_need_no_torch(config: Path, invoke: Invoke, tmp_path: Path):
    """They run wherever the output can be reached."""
    invoke("run", config, "--worker", "0/2")
    code = (
        "import sys; from click.testing import CliRunner; from teacher_dump.cli import cli; "
        f"r = CliRunner().invoke(cli, ['status', {str(tmp_path / 'out')!r}]); print(r.output); "
        f"CliRunner().invoke(cli, ['seal', {str(tmp_path / 'out')!r}]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "2 of 4 units" in ran.stdout, ran.stderr
    assert ran.stdout.endswith("False False\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--worker", "2/2"], "--worker 2/2: workers are counted from 0"),
        (["--worker", "x"], "--worker x: expected i/n"),
    ],
)
def test_a_share_that_is_none_is_refused(config: Path, invoke: Invoke, arguments: list[str], said: str):
    result = invoke("run", config, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_a_time_that_is_none_is_refused(config: Path, invoke: Invoke):
    result = invoke("run", config, "--stop-after", "soon")
    assert result.exit_code == 2
    assert "'soon' is no time; write it like 3h50m, 45m or 90s" in result.output


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("90s", 90), ("1d", 86400), ("1.5h", 5400), ("2h 30m 5s", 9005)]
)
def test_times_are_read(text: str, seconds: float):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "h", "3h50", "-3h", "3h!", "0s", "1w"])
def test_times_that_are_none_are_refused(text: str):
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)


def test_times_and_sizes_are_told_in_a_few_digits():
    assert [duration(s) for s in (0.04, 2.44, 95, 700, 12600)] == ["0.04 s", "2.4 s", "95 s", "12 min", "3.5 h"]
    assert [size(b) for b in (12, 2048, 3 << 20, 5 << 40)] == ["12 bytes", "2.0 KiB", "3.0 MiB", "5.0 TiB"]


def start(*arguments: object, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "teacher_dump", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.cluster
def test_out_of_time_is_an_interruption_and_the_next_run_goes_on(teacher_folder: Path, tmp_path: Path):
    """More work than fits; at whatever it is, it ends in seconds with what was committed whole."""
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(3000))
    config = tmp_path / "dump.yaml"
    settings = dump_settings(teacher_folder, files, tmp_path / "out", unit_records=20)
    config.write_text(settings.model_dump_json())
    begin_s = time.monotonic()
    process = start("run", config, "--stop-after", "12s")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert output == ""
    assert errors.endswith("out of time\n  next: run the same command again\n")
    assert time.monotonic() - begin_s < 12 + 15
    assert not (tmp_path / "out/manifest.json").exists()
    records = list((tmp_path / "out/.logitferry/units").glob("*.json"))
    shards = list((tmp_path / "out/data").glob("*"))
    assert len(shards) - len(records) in (0, 1)
    assert not list((tmp_path / "out").glob(".writing-*"))


def test_an_error_that_an_interruption_causes_is_an_interruption(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Processes of a library get the same signal, and what they die of may be told first; it may also come twice."""

    @click.command()
    def command() -> None:
        for _ in range(2):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)  # where the signal is taken
            except KeyboardInterrupt:
                continue
        raise LogitferryError("the engine is gone")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert ended.value.code == 75
    assert capsys.readouterr().err == (
        "error: the engine is gone\nstopped by SIGTERM\n  next: run the same command again\n"
    )


def test_a_second_sigterm_does_not_break_into_what_is_put_away(monkeypatch: pytest.MonkeyPatch):
    taken: list[str] = []

    @click.command()
    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            taken.append("put away")

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit):
        run_command(command)
    assert taken == ["put away"]


@pytest.mark.cluster
@pytest.mark.parametrize("moment", ["reading", "loading"])
def test_sigterm_ends_it_in_seconds_whatever_it_is_at(teacher_folder: Path, tmp_path: Path, moment: str):
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(20_000 if moment == "reading" else 20))
    config = tmp_path / "dump.yaml"
    config.write_text(dump_settings(teacher_folder, files, tmp_path / "out").model_dump_json())
    process = start("run", config)
    line = "read as chat" if moment == "reading" else "read: "
    assert process.stderr is not None
    while line not in (said := process.stderr.readline()):
        assert said, "it ended"
    begin_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # schedulers say it twice
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.endswith("stopped by SIGTERM\n  next: run the same command again\n")
    assert time.monotonic() - begin_s < 10
