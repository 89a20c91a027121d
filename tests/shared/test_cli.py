"""The three commands as a shell sees them: exit codes, one JSON object, and an interruption that costs nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
import yaml

import student_train.cli
import teacher_dump.cli
from shared import __version__, logit_shards
from shared.cli import SuggestingGroup, run_command
from shared.dataset import LogitDataset
from shared.errors import (
    ConfigError,
    DamagedDataError,
    MismatchError,
    NonFiniteError,
    RecordError,
    UnknownVersionError,
    UnsealedDatasetError,
)
from shared.verification import verify

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "teacher-dump": (teacher_dump.cli.main, "run"),
    "student-train": (student_train.cli.main, "run"),
    "logit-shards": (logit_shards.main, "verify"),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command's entry point in this process: exit code, standard output, standard error."""

    def run_main(main, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run_main


def start(module: str, *arguments, **options) -> subprocess.Popen[str]:
    """`python -m module`, as a shell would start it in the foreground."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A test run in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def shell(module: str, *arguments) -> tuple[int, str, str]:
    process = start(module, *arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def one_object(output: str) -> dict:
    assert output.count("\n") == 1, "one line"
    assert output.endswith("}\n")
    return json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def write_dump(folder: Path, teacher: Path, num_records: int, **changes) -> Path:
    """Text and a config that dumps it; the path of the config."""
    folder.mkdir(exist_ok=True)
    turns = [("user", "What is {} plus three?"), ("assistant", "It is {}.")]
    messages = [[{"role": role, "content": text.format(n)} for role, text in turns] for n in range(num_records)]
    (folder / "chat.jsonl").write_text(
        "".join(json.dumps({"id": n, "messages": m}) + "\n" for n, m in enumerate(messages))
    )
    tree = {
        "teacher": {"model": str(teacher), "device": "cpu"},
        "data": {"files": [str(folder / "chat.jsonl")]},
        "output": str(folder / "dump"),
        "keep": {"k": 5},
        **changes,
    }
    (folder / "dump.yaml").write_text(yaml.safe_dump(tree))
    return folder / "dump.yaml"


@pytest.fixture
def dumped(tmp_path, teacher_folder, run) -> Path:
    """A small sealed dataset."""
    code, output, _ = run(teacher_dump.cli.main, "run", write_dump(tmp_path, teacher_folder, 5, unit_records=2))
    assert code == 0
    assert f"{tmp_path}/dump: sealed; 5 rows" in output
    assert f"next: logit-shards info {tmp_path}/dump" in output
    return tmp_path / "dump"


@pytest.mark.parametrize("name", COMMANDS)
def test_cli_answers_help_and_version(run, name):
    main, verb = COMMANDS[name]
    code, output, errors = run(main, "--version")
    assert (code, output, errors) == (0, f"{name}, version {__version__}\n", "")
    code, output, errors = run(main, "--help")
    assert (code, errors) == (0, "")
    assert f"\n  {verb} " in output
    code, output, errors = run(main, verb, "--help")
    assert (code, errors) == (0, "")
    assert "--json" in output


@pytest.mark.parametrize("command", [logit_shards.cli, teacher_dump.cli.cli, student_train.cli.cli])
def test_cli_answers_programs_at_every_verb(command):
    for name, verb in command.commands.items():
        assert "--json" in [option for each in verb.params for option in each.opts], name


@pytest.mark.parametrize("name", COMMANDS)
def test_cli_shows_its_help_where_no_verb_is_given(run, name):
    main, verb = COMMANDS[name]
    code, output, errors = run(main)
    assert code == 2
    assert f"\n  {verb} " in output + errors


@pytest.mark.parametrize(
    ("name", "mistyped", "hint"),
    [
        ("teacher-dump", "rnu", "no verb 'rnu'; did you mean run?"),
        ("student-train", "runs", "no verb 'runs'; did you mean run?"),
        ("logit-shards", "verfy", "no verb 'verfy'; did you mean verify?"),
        ("logit-shards", "zzz", "there are: card, export, filter, import, info, inspect, merge, pull, push, repair"),
    ],
)
def test_cli_suggests_the_verb_that_was_meant(run, name, mistyped, hint):
    code, output, errors = run(COMMANDS[name][0], mistyped, "x")
    assert (code, output) == (2, "")
    assert hint in errors


@pytest.mark.parametrize("name", ["teacher-dump", "student-train"])
def test_cli_prints_the_effective_config_and_stops(run, tmp_path, name):
    config = tmp_path / "c.yaml"
    config.write_text("data: {dataset: d}\nstudent: {model: m}\nsteps: 1\noutput: o\n")
    if name == "teacher-dump":
        config.write_text("data: {files: [none.jsonl]}\nteacher: {model: no/such/model}\noutput: o\n")
    main, verb = COMMANDS[name]
    code, output, errors = run(main, verb, config, "--print-config", "--set", "output=elsewhere")
    assert (code, errors) == (0, "")
    printed = yaml.safe_load(output)
    assert printed["output"] == "elsewhere"
    assert len(printed) > 4, "defaults are printed too"
    config.write_text(output)
    assert run(main, verb, config, "--print-config")[1] == output
    assert os.listdir(tmp_path) == ["c.yaml"], "nothing was run"


def test_cli_exit_codes_reach_the_shell(tmp_path, dumped):
    """Usage and config 2, damaged data 3, what does not belong together 4, else 0."""
    assert shell("shared", "info", dumped)[0] == 0
    assert shell("shared", "info", dumped, "--jsn")[0] == 2
    code, output, errors = shell("teacher_dump", "run", tmp_path / "dupm.yaml", "--json")
    assert (code, output) == (2, "")
    assert errors.endswith(f"next: did you mean {tmp_path}/dump.yaml?\n")
    code, _, errors = shell("student_train", "run", tmp_path / "dump.yaml", "--set", "keep")
    assert code == 2
    assert errors.startswith("error: --set keep: expected a.b=value\n")
    manifest = json.loads((dumped / "manifest.json").read_text())
    (dumped / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    code, _, errors = shell("shared", "verify", dumped)
    assert code == 4
    assert errors.endswith("next: pip install --upgrade logitferry\n")
    (dumped / "manifest.json").unlink()
    code, _, errors = shell("shared", "verify", dumped)
    assert code == 3
    assert errors.startswith(f"error: {dumped} is no sealed dataset: it has no manifest.json\n")


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("bad key", next_step="mend it"), 2, "error: bad key\n  next: mend it\n"),
        (click.UsageError("no such option"), 2, "Error: no such option\n"),
        (RecordError("a.jsonl:3: no"), 3, "error: a.jsonl:3: no\n"),
        (DamagedDataError("flipped bit", next_step="copy it again"), 3, "error: flipped bit\n  next: copy it again\n"),
        (UnsealedDatasetError("no manifest", next_step="finish"), 3, "error: no manifest\n  next: finish\n"),
        (UnknownVersionError("version 9"), 4, "error: version 9\n"),
        (MismatchError("two tokenizers"), 4, "error: two tokenizers\n"),
        (NonFiniteError("NaN at step 3"), 1, "error: NaN at step 3\n"),
        (OSError(28, "No space left on device"), 1, "error: OSError: [Errno 28] No space left on device\n"),
        (MemoryError("19 GiB"), 1, "error: MemoryError: 19 GiB\n"),
        (ModuleNotFoundError("No module named 'torch'"), 2, "next: pip install 'logitferry[torch]'\n"),
        (ZeroDivisionError("ours"), 1, "next: run again with LOGITFERRY_TRACEBACK=1 and report what it prints\n"),
        (KeyboardInterrupt(), 75, "interrupted\n  next: run the same command again\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_cli_exit_code_says_what_happened(run, error, code, says):
    @click.group(cls=SuggestingGroup)
    def group() -> None:
        pass

    @group.command("fail")
    def fail() -> None:
        raise error

    got, output, errors = run(lambda: run_command(group), "fail")
    assert got == code
    assert output == ""
    assert errors.lstrip().endswith(says)


def test_cli_says_interrupted_also_where_the_signal_came_within_an_exec(tmp_path):
    (tmp_path / "caught.py").write_text(
        "import click\nfrom shared.cli import run_command\n\ndef stop():\n    raise KeyboardInterrupt\n\n"
        "@click.command()\ndef dump():\n    exec('stop()')\n\nrun_command(dump)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{Path.cwd()}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-m", "caught"], env=environment, timeout=60, check=False)
    assert done.returncode == 75


def test_cli_gives_the_process_its_sigterm_handler_back(run):
    before = signal.getsignal(signal.SIGTERM)
    run(logit_shards.main, "--version")
    assert signal.getsignal(signal.SIGTERM) is before


def test_cli_ends_quietly_where_the_reader_of_its_output_went_away():
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = start("shared", "--help", stdout=write_end)
    os.close(write_end)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "")


def test_cli_prints_exactly_one_json_object(run, dumped):
    code, output, _ = run(logit_shards.main, "info", dumped, "--json")
    assert code == 0
    info = one_object(output)
    assert (info["rows"], info["shards"]) == (5, 3)
    code, output, _ = run(logit_shards.main, "verify", dumped, "--json")
    assert code == 0
    assert one_object(output) == {
        "ok": True,
        "shards": 3,
        "rows": 5,
        "positions": info["positions"],
        "faults": [],
        "card_is_new": False,
    }
    code, output, _ = run(teacher_dump.cli.main, "run", dumped.parent / "dump.yaml", "--json")
    assert code == 0
    assert one_object(output) == {"sealed": True, **info}, "a sealed dump run again says what it holds"


def test_cli_prints_its_json_object_also_where_verify_finds_faults(run, dumped):
    part = dumped / "data" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, output, errors = run(logit_shards.main, "verify", dumped, "--json")
    assert code == 3
    found = one_object(output)
    assert not found["ok"]
    assert len(found["faults"]) == 1
    assert str(part) in found["faults"][0]
    assert "1 fault\n  next: copy what is damaged again" in errors


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def check_interrupted(code: int, output: str, errors: str, dump: Path, said: str) -> None:
    assert (code, output) == (75, ""), errors
    assert errors.endswith(f"{said}\n  next: run the same command again\n")
    assert not (dump / "manifest.json").exists()
    assert not list((dump / "data").glob(".*")), "no temporary file stays behind"


@pytest.mark.cluster
def test_cli_dump_interrupted_by_sigterm_and_ctrl_c_is_finished_by_running_it_again(tmp_path, teacher_folder, run):
    config = write_dump(tmp_path, teacher_folder, 150, unit_records=1)
    data = tmp_path / "dump" / "data"

    process = start("teacher_dump", "run", config, "--json")
    wait_for(lambda: process.poll() is not None or any(data.glob("*.parquet")))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    check_interrupted(process.returncode, output, errors, tmp_path / "dump", "stopped by SIGTERM")
    after_sigterm = len(list(data.glob("*.parquet")))
    assert 0 < after_sigterm < 150

    def press_ctrl_c() -> None:
        wait_for(lambda: len(list(data.glob("*.parquet"))) > after_sigterm)
        os.kill(os.getpid(), signal.SIGINT)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    try:
        check_interrupted(*run(teacher_dump.cli.main, "run", config, "--json"), tmp_path / "dump", "interrupted")
    finally:
        thread.join()
        signal.signal(signal.SIGINT, previous)
    committed = len(list(data.glob("*.parquet")))
    assert after_sigterm < committed < 150, "it went on where it had been"

    untouched = {path: path.stat().st_mtime_ns for path in sorted(data.glob("*.parquet"))[: committed - 1]}
    code, output, _ = run(teacher_dump.cli.main, "run", config, "--json")
    assert code == 0
    assert one_object(output)["rows"] == 150
    dataset = LogitDataset.open(tmp_path / "dump")
    assert [name for shard in dataset.sample_ids() for name in shard] == [str(n) for n in range(150)]
    assert not verify(dataset, deep=True).faults
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched, "what was done is not done again"
