"""On a device that is neither CPU nor CUDA: the loss, an optimizer step, and whole training runs, as on the CPU.

Torch knows such a device as PrivateUse1, and Ascend's is one.  It is registered in processes of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl

ROOT = Path(__file__).parent.parent.parent

LOSSES = """
import torch
from shared.models import OutputHead
from student_train.loss import Targets
from student_train.objective import Objective
from tests import fake_npu
from tests.student_train.references import fused, lesson
from tests.student_train.test_fused_linear import N, OBJECTIVES, UNEVEN, V, student, teacher

fake_npu.register()
for name, settings in OBJECTIVES.items():
    for temperature in (1.0, 2.0):
        for dtype in (torch.float32, torch.bfloat16):
            said = lesson(teacher(1), UNEVEN, temperature=temperature)
            objective = Objective(kd_weight=0.7, temperature=temperature, z_loss=1e-3, **settings)
            weights = []
            for device in ("cpu", "npu"):
                hidden, head = student(dtype=dtype, bias=True, softcap=5.0, scale=0.7)
                leaves = [x.detach().to(device).requires_grad_() for x in (hidden, head.weight_VD, head.bias_V)]
                head = OutputHead(weight_VD=leaves[1], bias_V=leaves[2], softcap=5.0, scale=0.7)
                there = type(said)(**{**vars(said), "targets": said.targets.to(torch.device(device))})
                optimizer = torch.optim.AdamW(leaves, lr=0.1)
                before = fake_npu.calls.total()
                fused(leaves[0], head, there, objective).total.backward()
                optimizer.step()
                assert (fake_npu.calls.total() > before) == (device == "npu")
                weights.append([x.detach().cpu() for x in leaves])
            assert all(map(torch.equal, *weights)), (name, temperature, dtype)
print("same")
"""

TRAIN = """
import sys
from tests import fake_npu

fake_npu.register()
from student_train.cli import main
from student_train.student import Student

save = Student.save

def save_from_cpu(student, *rest):
    # transformers tells tensors apart by their addresses, and here these are all 0.
    student.model.to("cpu")
    save(student, *rest)

Student.save = save_from_cpu
sys.argv = ["student-train", "run", *sys.argv[1:]]
main()
"""

GUARDS = """
import pytest
import torch
from tests import fake_npu

fake_npu.register()
one = torch.ones(3).to("npu")
with pytest.raises(RuntimeError, match="(?i)expected all tensors"):
    one + torch.ones(3)
with pytest.raises(RuntimeError, match="no float64"):
    one.double()
with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
    one.cuda()
print("guarded")
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be written" not in done.stderr  # a checkpoint
    return done.stdout


def test_the_device_refuses_what_a_real_one_would():
    assert python(GUARDS) == "guarded\n"


def test_every_loss_and_an_optimizer_step_give_the_bits_of_the_cpu():
    assert python(LOSSES) == "same\n"


@pytest.mark.cluster
@pytest.mark.parametrize(
    "loss", [{"temperature": 2}, pytest.param({"divergence": "jsd", "z_loss": 1e-3}, marks=pytest.mark.full)]
)
def test_a_training_run_gives_the_weights_that_it_gives_on_the_cpu(
    loss: dict[str, Any], student_folder: Path, teacher_folder: Path, tmp_path: Path
):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(12))
    sealed_dump(dump_settings(teacher_folder, chats, tmp_path / "dump"))
    models = []
    for device in ("cpu", "npu"):
        config = {
            "student": {"model": str(student_folder)},
            "data": {"dataset": str(tmp_path / "dump")},
            "held_out": {"fraction": 0.2},
            "loss": loss,
            "output": str(tmp_path / device),
            "optimizer": {"learning_rate": 1e-3},
            "steps": 2,
            "rows_per_step": 4,
            "device": device,
        }
        (tmp_path / f"{device}.yaml").write_text(json.dumps(config))
        python(TRAIN, str(tmp_path / f"{device}.yaml"))
        models.append(load_file(tmp_path / device / "model/model.safetensors"))
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
