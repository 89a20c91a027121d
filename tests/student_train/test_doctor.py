"""What `student-train doctor` finds on real files: a fit config, and each of the ways in which one is not."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from shared.doctor import devices as shared_devices
from shared.doctor import machine as shared_machine
from shared.doctor import requirements
from shared.doctor.ascend_releases import torch_of
from student_train.cli import cli
from student_train.config import TrainSettings
from student_train.doctor import machine, step
from student_train.doctor.examination import Finding, examine, exit_code, render
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.examined import fake_package, mended, of, verdicts
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
MACHINE = ["python", "packages", "ascend", "torch", "devices", "memory"]


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    chats = write_jsonl(folder / "chats.jsonl", chat_records(23))
    sealed_dump(dump_settings(teacher_folder, chats, folder / "dump"))
    return folder / "dump"


@pytest.fixture
def settings(student_folder, dump, tmp_path):
    """Settings with some changed; the output is not there yet."""

    def changed(**changes: Any) -> TrainSettings:
        tree: dict[str, Any] = {
            "student": {"model": str(student_folder)},
            "data": {"dataset": str(dump)},
            "held_out": {"fraction": 0.2},
            "output": str(tmp_path / "deep" / "run"),
            "epochs": 2,
            "rows_per_step": 4,
            "device": "cpu",
        }
        for dotted, value in changes.items():
            *parents, leaf = dotted.split("__")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = value
        return TrainSettings.model_validate(tree)

    return changed


def test_doctor_finds_nothing_to_mend_where_all_is_well_and_leaves_nothing_behind(settings, dump, tmp_path):
    findings = examine(settings(student__compute_dtype="bfloat16"))
    assert [finding for finding in findings if finding.verdict == "mend"] == []
    assert os.listdir(tmp_path) == []
    checks = list(dict.fromkeys(finding.check for finding in findings))
    assert checks == [*MACHINE, "model", "tokenizer", "weights", "data", "steps", "disk", "output", "step"]
    shown = "\n".join(render(findings))
    for text in (
        "Qwen2ForCausalLM, a vocabulary of 307, weights in float32, products in bfloat16",
        "with gradients and AdamW's moments",
        f"{dump}: 23 rows, ",
        "of this tokenizer; tails at T 1, 2; longest row 257 of 512 tokens",
        "9 of 4 rows; an epoch has 18 rows, 5 held out",
        "2 rows cut short in bfloat16 on cpu: loss ",
        "rows are packed, with attention varlen, as on the CPU in float32",
    ):
        assert text in shown


def test_doctor_without_settings_looks_at_the_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    findings = examine(None)
    assert exit_code(findings) == 0
    assert list(dict.fromkeys(finding.check for finding in findings)) == [*MACHINE, "step"]
    assert [found.found.split(" on ")[0] for found in of("step", findings)] == [
        "a small made-up module in float32",
        "a small made-up module in bfloat16",
    ]
    assert os.listdir(tmp_path) == []


def test_doctor_steps_as_the_settings_say_and_changes_no_random_number(settings):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    lora = {"rank": 2, "dropout": 0.5}
    findings = examine(settings(student__lora=lora, packing=False, loss__kd_weight=0.0, student__dtype="bfloat16"))
    assert torch.equal(torch.rand(1), expected)
    (found,) = of("step", findings)
    assert found.verdict == "ok", found
    assert "rows are padded, as on the CPU in float32" in found.found
    assert ", peft " in of("packages", findings)[0].found


def test_doctor_makes_rows_of_the_first_records_of_text(settings, tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(70))
    text = {"data": {"text": {"files": [str(chats)]}}, "held_out": {}, "loss__kd_weight": 0.0}
    findings = examine(settings(**text))
    assert exit_code(findings) == 0
    assert of("data", findings)[0].found.startswith(f"{chats}: the first 64 records, 64 rows, ")
    assert not of("steps", findings), "nobody has counted all records"
    assert "2 rows cut short" in of("step", findings)[0].found
    write_jsonl(chats, [{"x": 1}])
    assert "not one of its records is of a known form" in mended("data", examine(settings(**text))).found


def test_doctor_mends_a_dataset_of_another_tokenizer_or_loss(settings, tmp_path):
    make_tokenizer(tmp_path / "other", sentences=["quite another text"] * 3)
    findings = examine(settings(student__tokenizer=str(tmp_path / "other")))
    assert "tokenizer" in mended("data", findings).found
    assert of("step", findings)[0].found.startswith("a small made-up module"), "the student would only say so again"
    found = mended("data", examine(settings(loss__temperature=3.0)))
    assert "loss.temperature 3 is not among the [1.0, 2.0]" in found.found
    assert "train at a declared temperature" in (found.next_step or "")
    found = mended("data", examine(settings(student__max_model_len=100)))
    assert "the student's context is 100, but" in found.found
    found = mended("data", examine(settings(data__dataset=str(tmp_path / "none"))))
    assert str(tmp_path / "none") in found.found


def test_doctor_mends_a_shard_that_is_not_what_was_written(settings, dump, tmp_path):
    shutil.copytree(dump, tmp_path / "copy")
    shard = sorted((tmp_path / "copy" / "data").glob("*.parquet"))[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    found = mended("data", examine(settings(data__dataset=str(tmp_path / "copy"))))
    assert shard.name in found.found


def test_doctor_mends_steps_that_no_run_would_begin(settings):
    assert mended("steps", examine(settings(rows_per_step=24))).next_step == "lower rows_per_step"
    assert "there are 9 steps" in mended("steps", examine(settings(optimizer__warmup_steps=9))).found
    assert mended("steps", examine(settings(held_out__fraction=1e-9))).found == "no row is held out"
    assert "no row is left to train on" in mended("steps", examine(settings(held_out__fraction=1 - 1e-9))).found


def test_doctor_opens_the_data_that_are_held_out(settings, tmp_path):
    held_out = {"data": {"dataset": str(tmp_path / "none")}}
    assert "none" in mended("held out", examine(settings(held_out=held_out))).found


def test_doctor_mends_a_model_that_is_not_there_and_looks_at_the_rest(settings, tmp_path):
    findings = examine(settings(student__model=str(tmp_path / "none")))
    assert mended("model", findings).found == f"model folder {tmp_path}/none does not exist"
    assert not of("weights", findings)
    assert (verdicts("output", findings), verdicts("step", findings)) == (["ok"], ["ok"])
    found = mended("model", examine(settings(student__model="nobody/nothing")))
    assert "bring the folder and name it as student.model" in (found.next_step or "")


@pytest.mark.parametrize(
    ("got", "verdict"),
    [((2.0, 3.0), "ok"), ((2.003, 3.0), "ok"), ((2.1, 3.0), "mend"), ((2.0, 3.2), "warning"), ((math.nan, 3.0), "mend"),
     ((2.0, math.inf), "mend")],
)  # fmt: skip
def test_doctor_compares_loss_and_gradient_with_those_of_the_cpu(settings, monkeypatch, got, verdict):
    steps = iter([(2.0, 3.0), got])
    monkeypatch.setattr(step, "_made_up", lambda *_: step.Step(**dict(zip(("loss", "norm"), next(steps), strict=True))))
    assert [each.verdict for each in step.made_up_step(settings())] == [verdict]


def test_doctor_mends_weights_that_do_not_fit_and_tries_none_that_hardly_do(settings, monkeypatch):
    monkeypatch.setattr(shared_devices, "host_memory", lambda: (200 << 10, 200 << 10))
    findings = examine(settings())
    assert "student.lora trains few of them" in (mended("weights", findings).next_step or "")
    assert of("step", findings)[0].found.startswith("a small made-up module in float32")
    monkeypatch.setattr(step, "host_memory", lambda: (100 << 10, 1 << 40))
    monkeypatch.setattr(shared_devices, "host_memory", lambda: (100 << 10, 1 << 40))
    findings = examine(settings())
    assert of("step", findings)[0].found.startswith("the student itself is not tried: it needs 155.0 KiB of the host")
    assert of("step", findings)[1].found.startswith("a small made-up module in float32")


def test_doctor_mends_an_output_that_a_run_would_refuse(settings, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("mine")
    findings = examine(settings(output=str(tmp_path / "thesis")))
    assert "is not empty and holds none of" in mended("output", findings).found
    assert "2 rows cut short" in of("step", findings)[0].found, "the student is tried all the same"
    done = tmp_path / "done"
    (done / "model").mkdir(parents=True)
    (done / "config.yaml").write_text(settings(output=str(done)).model_dump_json())
    (done / "run.json").write_text(json.dumps({"model": str(done / "model"), "steps": 9}))
    (found,) = of("output", examine(settings(output=str(done))))
    assert found == Finding("output", "ok", f"this run is finished: {done}/model, 9 steps")
    assert "was trained with other settings" in mended("output", examine(settings(output=str(done), seed=1))).found


def test_doctor_mends_packages_that_a_setting_needs(settings, monkeypatch):
    stated = ["peft>=0.15; extra == 'lora'", "tensorboard>=2; extra == 'tensorboard'", "wandb>=1; extra == 'wandb'"]
    monkeypatch.setattr(requirements, "requires", lambda name: stated)
    here, gone = shared_machine.installed, {"peft", "tensorboard", "wandb"}
    monkeypatch.setattr(shared_machine, "installed", lambda name: None if name in gone else here(name))
    asked = settings(student__lora={}, log__tensorboard=True, log__wandb={"project": "p"})
    extras = machine.extras_of(asked)
    missing = [each for each in shared_machine.packages(extras) if each.verdict == "mend"]
    assert [each.found.split(";")[0] for each in missing] == [f"{name} is not installed" for name in sorted(gone)]
    assert missing[0].next_step == "pip install 'peft>=0.15'"
    assert machine.extras_of(settings()) == []
    assert verdicts("packages", examine(settings())) == ["ok"]


def test_doctor_warns_where_torch_npu_sees_no_device(monkeypatch):
    monkeypatch.setattr(machine, "package_version", lambda: "2.13.0")
    (found,) = machine.devices(None)
    assert found.verdict == "warning"
    assert "ASCEND_RT_VISIBLE_DEVICES" in (found.next_step or "")


def test_doctor_mends_a_device_that_cannot_be_used(settings):
    findings = examine(settings(device="cuda:99"))
    assert "device 'cuda:99' cannot be used here" in mended("devices", findings).found
    assert not of("step", findings), "it would say the same"


def test_doctor_ends_with_the_next_command_or_an_exit_code(settings, tmp_path):
    (tmp_path / "train.yaml").write_text(settings().model_dump_json())
    config = str(tmp_path / "train.yaml")
    ran = CliRunner().invoke(cli, ["doctor", config])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.splitlines()[-1] == f"  next: student-train estimate {config}"
    ran = CliRunner().invoke(cli, ["doctor", config, "--set", "loss.temperature=3", "--json"])
    assert ran.exit_code == 1
    found = json.loads(ran.stdout)["findings"]
    assert [each["check"] for each in found if each["verdict"] == "mend"] == ["data"]


def test_doctor_answers_where_torch_cannot_be_imported(tmp_path):
    release = torch_of(torch.__version__)
    fake_package(
        tmp_path, "torch_npu", release, init='raise ImportError("libascend_hal.so: cannot open shared object file")\n',
        entry_points="[torch.backends]\ntorch_npu = torch_npu:_autoload\n",
    )  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-m", "student_train", "doctor"], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 1
    assert f"torch_npu {release} is installed, but CANN isn't, or isn't loaded: " in ran.stdout
    assert "set_env.sh" in ran.stdout
    assert "not looked at, because torch cannot be used" in ran.stdout
    assert "Traceback" not in ran.stdout + ran.stderr


ON_NPU = """
import sys
from tests import fake_npu

right, is_spoilt = fake_npu.run, False

def run(operation, *args, **kwargs):
    result = right(operation, *args, **kwargs)
    return result.mul_(3) if is_spoilt and "mm.out" in str(operation) else result

fake_npu.run = run
fake_npu.register()
from student_train.config import TrainSettings
from student_train.doctor.examination import examine, render
from student_train.doctor.step import made_up_step

settings = TrainSettings.model_validate_json(sys.argv[1])
print(*render(examine(settings)), "spoilt", sep="\\n")
is_spoilt = True
print(*render(list(made_up_step(settings))), sep="\\n")
"""


@pytest.mark.cluster
def test_doctor_compares_another_device_with_the_cpu(settings):
    ran = subprocess.run(
        [sys.executable, "-c", ON_NPU, settings(device="npu").model_dump_json()], cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    fair, spoilt = ran.stdout.split("spoilt\n")
    assert "npu:0: of unknown name, does not say how much memory it has" in fair
    assert "2 rows cut short in float32 on npu: loss " in fair
    assert "as on the CPU in float32" in fair
    assert "mend " not in fair
    assert spoilt.startswith("mend     step  a small made-up module in float32 on npu: loss ")
    assert "; on the CPU in float32: loss 4.1" in spoilt
    assert "next: the device, its driver or its build of torch is at fault" in spoilt
