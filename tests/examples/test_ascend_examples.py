"""The student on Ascend: the config is checked, the scripts run with stand-ins for torchrun, uv and pip."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from shared.config import load_settings
from shared.doctor.ascend_releases import fit, torch_of
from student_train.config import TrainSettings
from tests.examples.test_cluster_examples import put_on_path, run

ASCEND = Path(__file__).parents[2] / "examples" / "ascend"
PACKAGE = "2.10.0.post4"

TORCHRUN = """#!/bin/bash
# Starts ranks as torchrun does, and like it says 1 whatever their exit codes are.
echo "$ASCEND_RT_VISIBLE_DEVICES $*" > "$CALLS/torchrun"
while [ "$1" != --no-python ]; do [ "$1" = --nproc-per-node ] && ranks=$2; shift; done
shift
for (( rank = 0; rank < ranks; rank++ )); do RANK=$rank "$@" & children+=("$!"); done
worst=0
for child in "${children[@]}"; do wait "$child" || worst=1; done
exit $worst
"""
STUDENT_TRAIN = """#!/bin/bash
echo "$*" > "$CALLS/rank-$RANK"
set -- $CODES
code="${@:RANK + 1:1}"
[ "$code" = wait ] || exit "$code"
trap 'exit 75' TERM
touch "$CALLS/up-$RANK"
while :; do sleep 0.05; done
"""


@pytest.fixture
def ranks(tmp_path: Path) -> dict[str, str]:
    """An environment with these programs."""
    programs = {"torchrun": TORCHRUN, "student-train": STUDENT_TRAIN}
    return put_on_path(tmp_path, programs) | {"TMPDIR": str(tmp_path)}


def test_the_config_checks_once_the_brackets_are_filled():
    settings = load_settings(TrainSettings, ASCEND / "train.yaml")
    named = (settings.student.model, settings.data.dataset, settings.output)
    assert all(str(name).startswith("<") for name in named)
    assert (settings.student.dtype, settings.student.compute_dtype) == ("float32", "bfloat16")
    assert settings.static_shapes is None, "on Ascend that makes them static"


@pytest.mark.parametrize(
    ("codes", "ended"),
    [("0 0", 0), ("75 75", 75), ("3 1", 3), ("4 75", 4), ("143 75", 75), ("137 75", 137), ("0 1", 1)],
)
def test_train_starts_a_rank_on_each_device_and_ends_with_what_one_says(ranks, tmp_path, codes, ended):
    command = ["bash", ASCEND / "train.sh", "train.yaml", "--set", "seed=1"]
    done = run(command, ranks | {"CODES": codes, "DEVICES": "4 6"}, tmp_path)
    assert done.returncode == ended, done.stderr
    told = (tmp_path / "calls/torchrun").read_text()
    assert told.startswith("4,6 --standalone --nproc-per-node 2 --no-python bash -c ")
    assert [(tmp_path / f"calls/rank-{n}").read_text() for n in (0, 1)] == ["run train.yaml --set seed=1\n"] * 2
    assert not list(tmp_path.glob("tmp.*")), "what ranks leave is gone"


def test_train_passes_signals_on_and_ends_with_75(ranks, tmp_path):
    environment = ranks | {"CODES": "wait wait", "DEVICES": "0 1"}
    process = subprocess.Popen(["bash", ASCEND / "train.sh", "train.yaml"], env=environment, cwd=tmp_path)
    while not all((tmp_path / f"calls/up-{n}").exists() for n in (0, 1)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75


def test_train_meets_other_machines(ranks, tmp_path):
    environment = ranks | {"CODES": "0", "DEVICES": "0", "NODES": "2", "NODE": "1"}
    refused = run(["bash", ASCEND / "train.sh", "train.yaml"], environment, tmp_path)
    assert (refused.returncode, "MASTER" in refused.stderr) == (1, True)
    done = run(["bash", ASCEND / "train.sh", "train.yaml"], environment | {"MASTER": "box-0"}, tmp_path)
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "calls/torchrun").read_text()
    assert "--nnodes 2 --node-rank 1 --master-addr box-0 --master-port 29500 --nproc-per-node 1" in told


def test_the_scripts_install_a_pair_that_is_published_with_a_cann():
    assert fit(PACKAGE, "9.1.0")
    for name in ("wheelhouse.sh", "setup.sh"):
        pins = re.findall(r"torch-npu==([\d.post]+)|TORCH_NPU:-([\d.post]+)", (ASCEND / name).read_text())
        assert {first or second for first, second in pins} - {"2.9.0.post2"} == {PACKAGE}
    readme = (ASCEND / "README.md").read_text()
    assert f"torch {torch_of(PACKAGE)}, torch-npu {PACKAGE}, CANN 9.1" in readme


UV = """#!/bin/bash
echo "uv $*" >> "$CALLS/all"
[ "$1 $2" = "pip compile" ] && { cat > "$CALLS/asked"; out="${@: -1}"; echo "torch==2.9.0" > "$out"; }
exit 0
"""
PIP = """#!/bin/bash
echo "$*" >> "$CALLS/all"
touch "${FOLDER:?}/any.whl"
"""


def test_wheelhouse_resolves_for_the_box_and_not_for_this_machine(tmp_path):
    environment = put_on_path(tmp_path, {"uv": UV, "python3": PIP}) | {"FOLDER": str(tmp_path / "wheels")}
    command = ["bash", ASCEND / "wheelhouse.sh", tmp_path / "wheels", "torch-npu==2.9.0.post2", "numpy<2"]
    done = run(command, environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("complete")
    assert (tmp_path / "calls/asked").read_text().split() == ["torch-npu==2.9.0.post2", "numpy<2", "torch==2.9.0"]
    constrained = set(re.findall(r"^([\w-]+)==", (tmp_path / "wheels/constraints.txt").read_text(), re.MULTILINE))
    assert {"transformers", "pyarrow"} < constrained
    assert not constrained & {"torch", "protobuf", "numpy"}
    resolved, downloaded, built, checked = (tmp_path / "calls/all").read_text().splitlines()
    for told in (resolved, checked):
        assert "--python-version 3.11 --python-platform aarch64-manylinux_2_28" in told
    assert "pip download --no-deps --only-binary=:all:" in downloaded
    assert "--platform manylinux_2_28_aarch64 " in downloaded
    assert f"-r {tmp_path}/wheels/requirements.txt" in downloaded
    assert built.endswith(str(ASCEND.parents[1]))
    assert "--no-index --find-links" in checked


def test_wheelhouse_takes_the_published_pair_where_none_is_named_and_asks_for_uv(tmp_path):
    environment = put_on_path(tmp_path, {"uv": UV, "python3": PIP}) | {"FOLDER": str(tmp_path / "wheels")}
    assert run(["bash", ASCEND / "wheelhouse.sh", tmp_path / "wheels"], environment, tmp_path).returncode == 0
    assert (tmp_path / "calls/asked").read_text().split() == [f"torch-npu=={PACKAGE}", f"torch=={torch_of(PACKAGE)}"]
    (tmp_path / "bin/uv").unlink()
    environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    done = run(["bash", ASCEND / "wheelhouse.sh"], environment, tmp_path)
    assert (done.returncode, "next: pip install uv" in done.stderr) == (2, True)
    assert not (tmp_path / "wheelhouse").exists()
