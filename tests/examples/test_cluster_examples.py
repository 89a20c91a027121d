"""The examples for clusters: their configs are checked, their scripts run with stand-ins for what is not here."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.config import load_settings
from shared.dataset import LogitDataset
from shared.verification import verify
from teacher_dump.config import DumpSettings
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])

SBATCH = """#!/bin/bash
# Runs a job at once; a task that asks to be queued again is run again.
while [[ "$1" == --* ]]; do shift; done
script="$1"; shift
export SLURM_JOB_ID=77
tasks=1
grep -q -- --array "$script" && tasks=2
for (( task = 0; task < tasks; task++ )); do
    [ "$tasks" -gt 1 ] && export SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$tasks
    until rm -f "$CALLS/again"; bash "$script" "$@" >> "$CALLS/log" 2>&1; code=$?; [ ! -e "$CALLS/again" ]; do :; done
    echo "$(basename "$script") $task ended with $code" >> "$CALLS/ended"
done
echo 77
"""
SRUN = """#!/bin/bash
# The first time that workers run, they have a second.
if [ -e "$CALLS/hurry" ]; then
    for argument in "$@"; do arguments+=("${argument/3h50m/1s}"); done
    set -- "${arguments[@]}"
    rm "$CALLS/hurry"
fi
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS/ended"
touch "$CALLS/again"
"""


def put_on_path(folder: Path, programs: dict[str, str]) -> dict[str, str]:
    """An environment in which these programs are found first."""
    (folder / "bin").mkdir()
    (folder / "calls").mkdir()
    for name, text in programs.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}


def run(command: list[Any], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


TEACHER_DUMP = f'#!/bin/bash\nexec {sys.executable} -m teacher_dump "$@"\n'


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_are_bash(script: Path):
    assert len(SCRIPTS) >= 5
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", ["slurm", "ray", "ascend"])
def test_configs_check_once_the_brackets_are_filled(name: str):
    settings = load_settings(DumpSettings, EXAMPLES / name / "dump.yaml")
    assert settings.teacher.model.startswith("<")
    assert settings.output.startswith("<")


@pytest.fixture(scope="module")
def small(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, LogitDataset]:
    """A config, its settings, and its dataset by one process."""
    folder = tmp_path_factory.mktemp("small")
    files = write_jsonl(folder / "chats.jsonl", chat_records(23))
    settings = dump_settings(teacher_folder, files, folder / "whole")
    config = folder / "dump.yaml"
    config.write_text(settings.model_dump_json())
    return config, settings, sealed_dump(settings)


@pytest.mark.cluster
def test_slurm_plans_shares_out_queues_again_and_seals(small: tuple[Path, Any, LogitDataset], tmp_path: Path):
    config, _, whole = small
    programs = {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "teacher-dump": TEACHER_DUMP}
    environment = put_on_path(tmp_path, programs)
    plan_first = tmp_path / "bin/srun"
    plan_first.write_text(plan_first.read_text().replace("if [ -e", 'if [[ "$*" != *--plan-only* ]] && [ -e'))
    (tmp_path / "calls/hurry").touch()
    command = ["bash", EXAMPLES / "slurm/submit.sh", config, "--set", f"output={tmp_path / 'out'}"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    log = (tmp_path / "calls/log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert (tmp_path / "calls/ended").read_text().splitlines() == [
        "plan.sbatch 0 ended with 0",
        "scontrol requeue 77",
        "dump.sbatch 0 ended with 0",
        "dump.sbatch 1 ended with 0",
    ]
    assert "out of time" in log
    dataset = LogitDataset.open(tmp_path / "out")
    assert dataset.manifest == whole.manifest
    assert verify(dataset, deep=True).faults == []


@pytest.mark.cluster
def test_ascend_starts_a_worker_for_each_device_and_passes_signals_on(
    small: tuple[Path, Any, LogitDataset], tmp_path: Path
):
    config, _, whole = small
    environment = put_on_path(tmp_path, {"teacher-dump": TEACHER_DUMP}) | {"DEVICES": "0 1"}
    command = ["bash", str(EXAMPLES / "ascend/dump.sh"), str(config), "--set", f"output={tmp_path / 'out'}"]
    begun = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    time.sleep(2)
    begun.send_signal(signal.SIGTERM)
    told, _ = begun.communicate(timeout=60)
    assert begun.returncode == 75, told
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert LogitDataset.open(tmp_path / "out").manifest == whole.manifest


@pytest.mark.parametrize(
    ("codes", "ended", "runs"), [("0", 0, 1), ("1 1 0", 0, 3), ("1 1 1 1 1", 1, 3), ("3 0", 3, 1), ("75 0", 75, 1)]
)
def test_ray_is_tried_again_after_failures_that_may_pass(codes: str, ended: int, runs: int, tmp_path: Path):
    stand_in = '#!/bin/bash\necho "$*" >> "$CALLS/runs"\nset -- $CODES\nn=$(wc -l < "$CALLS/runs")\nexit "${!n}"\n'
    environment = put_on_path(tmp_path, {"teacher-dump": stand_in}) | {"CODES": codes, "RESTARTS": "2", "PAUSE_S": "0"}
    command = ["bash", EXAMPLES / "ray/run.sh", "dump.yaml", "--stop-after", "1h"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ended
    lines = (tmp_path / "calls/runs").read_text().splitlines()
    assert lines == ["run dump.yaml --launcher ray --stop-after 1h"] * runs


def test_ray_is_not_tried_again_when_told_to_stop_between_two_attempts(tmp_path: Path):
    environment = put_on_path(tmp_path, {"teacher-dump": '#!/bin/bash\necho run >> "$CALLS/runs"\nexit 1\n'})
    process = subprocess.Popen(["bash", EXAMPLES / "ray/run.sh", "dump.yaml"], env=environment | {"PAUSE_S": "60"})
    while not (tmp_path / "calls/runs").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "calls/runs").read_text() == "run\n"


def test_ray_is_not_tried_again_once_it_was_told_to_stop(tmp_path: Path):
    stand_in = "#!/bin/bash\ntrap 'exit 75' TERM\ntouch \"$CALLS/up\"\nwhile :; do sleep 0.05; done\n"
    environment = put_on_path(tmp_path, {"teacher-dump": stand_in})
    process = subprocess.Popen(["bash", EXAMPLES / "ray/run.sh", "dump.yaml"], env=environment)
    while not (tmp_path / "calls/up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
