"""Do the weights fit?  Told from files whose headers claim much and whose bytes take no disk."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.doctor import devices
from shared.doctor.devices import host_memory
from shared.doctor.model import open_model
from teacher_dump.config import DumpSettings
from teacher_dump.doctor import weights as weights_module
from teacher_dump.doctor.examination import Finding, examine, exit_code
from teacher_dump.doctor.weights import weights
from tests.data import chat_records, dump_settings, write_jsonl
from tests.examined import mended, of, write_weights
from tests.tiny import make_model, make_tokenizer

GIB = 1 << 30


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = make_model(tmp_path / "model")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def settings(model_folder, tmp_path):
    """Settings for that model with some changed."""
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(3))

    def changed(**changes) -> DumpSettings:
        return dump_settings(model_folder, chats, tmp_path / "out", **changes)

    return changed


def test_doctor_mends_weights_larger_than_memory_without_reading_them(settings, model_folder):
    total = host_memory()[1]
    file = write_weights(model_folder / "model.safetensors", a=("F32", total * 3 // 8), b=("F32", 3))
    begin = time.monotonic()
    found = mended("weights", examine(settings()))
    assert time.monotonic() - begin < 30
    assert "they do not fit" in found.next_step
    in_bfloat16 = settings(teacher__dtype="bfloat16")
    assert exit_code(examine(in_bfloat16)) == 0, "three quarters of the memory"
    write_weights(file, a=("F32", 3), b=("I8", total * 3 // 2))
    assert mended("weights", examine(in_bfloat16)), "only floats are cast"
    write_weights(file, a=("F32", total * 3 // 8))
    config = json.loads((model_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model_folder / "config.json").write_text(json.dumps(config))
    assert mended("weights", examine(in_bfloat16)), "a quantized checkpoint is loaded as it is"


def test_doctor_warns_of_weights_that_fit_only_when_others_leave(settings, monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: (1 << 20, 1 << 40))
    (found,) = of("weights", examine(settings()))
    assert found.verdict == "warning"
    assert found.found.endswith("1.0 MiB free of 1.0 TiB: too little is free now")


def test_doctor_counts_the_weights_that_are_loaded_and_no_second_copy(settings, model_folder):
    before = of("weights", examine(settings()))[0].found.split(".")[0]
    assert before == "97", "KiB"
    write_weights(model_folder / "consolidated.safetensors", a=("F32", host_memory()[1]))
    assert of("weights", examine(settings()))[0].found.split(".")[0] == before
    (model_folder / "model.safetensors").rename(model_folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = mended("weights", examine(settings()))
    assert found.found == f"{model_folder} lacks 1 of 2 files of weights, first model-2.safetensors"
    second = write_weights(model_folder / "model-2.safetensors", b=("F32", 5))
    assert of("weights", examine(settings()))[0].found.split(".")[0] == before
    os.truncate(second, second.stat().st_size - 4)
    assert f"{second} is cut off" in mended("weights", examine(settings())).found


def test_doctor_mends_a_folder_without_weights(settings, model_folder):
    (model_folder / "model.safetensors").unlink()
    assert mended("weights", examine(settings())).found == f"{model_folder} lacks *.safetensors"
    of_vllm = settings(teacher__engine="vllm", teacher__device="auto")
    (found,) = of("weights", examine(of_vllm))
    assert found.verdict == "warning", "it reads other files as well"


@pytest.mark.parametrize(
    ("num_gib", "there", "teacher", "verdict", "says"),
    [
        (1.5, 1, {}, "ok", "1 device: 2.0 GiB free of 2.0 GiB"),
        (3, 4, {"device_map": "auto"}, "ok", "4 devices: 8.0 GiB free of 8.0 GiB"),
        (9, 4, {"device_map": "auto"}, "warning", "a part would stay in the host's memory"),
        (3, 1, {}, "mend", "1 device: 2.0 GiB free of 2.0 GiB"),
        (3, 2, {"vllm": {"tensor_parallel": 2}}, "ok", "2 devices: 4.0 GiB free of 4.0 GiB"),
        (3, 2, {"vllm": {"pipeline_parallel": 2}}, "ok", "2 devices: 4.0 GiB free of 4.0 GiB"),
        (3, 2, {"vllm": {"tensor_parallel": 2, "memory_fraction": 0.8}}, "mend", "free of 4.0 GiB"),
        (3, 1, {"vllm": {"quantization": "fp8"}}, "warning", "whether fp8 makes them fit is not known"),
        (3, 1, {"vllm": {"tensor_parallel": 4, "backend": "ray"}}, "ok", "free of 8.0 GiB"),
    ],
)
def test_doctor_compares_with_all_devices_that_share_the_weights(
    settings, model_folder, monkeypatch, num_gib, there, teacher: dict[str, Any], verdict, says
):
    """Each has 2 GiB, and logits take a quarter of one."""
    write_weights(model_folder / "model.safetensors", a=("F32", int(num_gib * GIB / 4)))
    monkeypatch.setattr(weights_module, "devices_of", lambda _: [torch.device("meta", n) for n in range(there)])
    monkeypatch.setattr(weights_module, "memory_of", lambda _: (2 * GIB, 2 * GIB))
    monkeypatch.setattr(weights_module, "host_memory", lambda: (64 * GIB, 64 * GIB))
    engine = {"teacher__engine": "vllm"} if "vllm" in teacher else {}
    changes = {f"teacher__{name}": value for name, value in teacher.items()}
    of_teacher = settings(teacher__device="auto", **engine, **changes).teacher
    found: list[Finding] = list(weights(of_teacher, open_model(of_teacher, "teacher")))
    assert [each.verdict for each in found] == [verdict]
    assert says in found[0].found


def test_doctor_warns_of_weights_that_the_host_cannot_hold_on_their_way(settings, model_folder, monkeypatch):
    write_weights(model_folder / "model.safetensors", a=("F32", GIB // 4))
    monkeypatch.setattr(weights_module, "devices_of", lambda _: [torch.device("meta", 0)])
    monkeypatch.setattr(weights_module, "memory_of", lambda _: (2 * GIB, 2 * GIB))
    monkeypatch.setattr(weights_module, "host_memory", lambda: (GIB // 2, GIB // 2))
    teacher = settings(teacher__device="auto").teacher
    assert [each.verdict for each in weights(teacher, open_model(teacher, "teacher"))] == ["ok", "warning"]
    spread = settings(teacher__device="auto", teacher__device_map="auto").teacher
    assert [each.verdict for each in weights(spread, open_model(spread, "teacher"))] == ["ok"]
