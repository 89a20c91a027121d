"""The transformers engine in tight memory, with static shapes and over several devices: always the same values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.batching import PaddedBatch
from shared.errors import ConfigError, LogitferryError
from shared.rows import Positions, Row
from teacher_dump.config import DumpSettings, TeacherSettings
from teacher_dump.engines import open_engine, teacher_identity
from teacher_dump.keep import Threshold, TopK
from tests.data import sealed_dump

RULES = [TopK(k=5, min_prob=0.0, always_ids=(2,)), Threshold(tau=0.1, seed=1, always_ids=())]


def some_rows() -> list[Row]:
    random = np.random.default_rng(0)
    rows = []
    for n, length in enumerate([20, 3, 150, 64, 65, 2, 129, 40]):
        mask = random.random(length) < 0.5
        mask[0], mask[-1] = False, True
        ids = random.integers(0, 300, length).astype(np.int32)
        rows.append(Row(sample_id=str(n), input_ids_L=ids, label_mask_L=mask))
    return rows


def scored(teacher: Path, rule: TopK | Threshold = RULES[0], **changes: Any) -> list[Positions]:
    tree = {"model": str(teacher), "device": "cpu", "batch_tokens": 300, "chunk_positions": 37}
    settings = TeacherSettings.model_validate(tree | changes)
    rows = some_rows()
    with open_engine(settings, teacher_identity(settings), rule, [1.0], longest_row=150) as engine:
        return [positions for unit in engine.score([rows[:3], [], rows[3:]]) for positions in unit]


def assert_same(some: list[Positions], others: list[Positions]) -> None:
    assert [each.num_positions for each in some] == [row.num_positions for row in some_rows()]
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one.kept_ids_E, other.kept_ids_E)
        for name in ("kept_logp_E", "realised_logp_P", "entropy_P", "tail_logsum_PT"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=2e-5)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the token ids of every forward pass."""
    seen: list[tuple[int, ...]] = []
    hidden_at_positions = PaddedBatch.hidden_at_positions

    def noted(self: PaddedBatch, body: torch.nn.Module) -> torch.Tensor:
        seen.append(tuple(self.input_ids_BL.shape))
        return hidden_at_positions(self, body)

    monkeypatch.setattr(PaddedBatch, "hidden_at_positions", noted)
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_static_shapes_are_few_and_change_no_value(
    rule: TopK | Threshold, teacher_folder: Path, shapes: list[tuple[int, ...]]
):
    expected = scored(teacher_folder, rule)
    assert len(set(shapes)) == len(shapes) > 3, "every batch has another shape"
    shapes.clear()
    assert_same(scored(teacher_folder, rule, static_shapes=True), expected)
    assert set(shapes) == {(1, 256), (2, 128)}


def test_padding_is_told(teacher_folder: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    scored(teacher_folder, batch_tokens=1)  # every row alone
    scored(teacher_folder, batch_tokens=1000)
    told = [float(record.getMessage().split()[1]) for record in caplog.records if "padding" in record.getMessage()]
    computed = 3 * 150 + 5 * 129
    assert told == [0.0, round(100 * (1 - sum(row.num_tokens for row in some_rows()) / computed), 1)]


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_memory_is_halved_and_gives_the_same(
    rule: TopK | Threshold, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    expected = scored(teacher_folder, rule)
    hidden_at_positions = PaddedBatch.hidden_at_positions

    def small(self: PaddedBatch, body: torch.nn.Module) -> torch.Tensor:
        if self.input_ids_BL.numel() > 160:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_at_positions(self, body)

    monkeypatch.setattr(PaddedBatch, "hidden_at_positions", small)
    assert_same(scored(teacher_folder, rule), expected)
    assert "out of memory on cpu: teacher.batch_tokens is 150 from now on" in caplog.text


def test_several_batches_without_memory_do_not_make_later_ones_ever_smaller(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]]
):
    """The batches of a unit are cut before the first of them fails."""
    noted = PaddedBatch.hidden_at_positions

    def small(self: PaddedBatch, body: torch.nn.Module) -> torch.Tensor:
        if self.input_ids_BL.numel() > 160:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return noted(self, body)

    monkeypatch.setattr(PaddedBatch, "hidden_at_positions", small)
    settings = TeacherSettings.model_validate({"model": str(teacher_folder), "device": "cpu", "batch_tokens": 300})
    mask = np.arange(30) > 0
    rows = [Row(sample_id="x", input_ids_L=np.arange(30, dtype=np.int32), label_mask_L=mask)] * 60
    with open_engine(settings, teacher_identity(settings), RULES[0], [1.0], longest_row=30) as engine:
        list(engine.score([rows, rows[:5]]))
    assert shapes[-1] == (5, 30)
    assert shapes[:-1] == [(5, 30)] * 12


def test_one_row_without_memory_is_an_error_with_advice(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def none(_self: PaddedBatch, _body: torch.nn.Module) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PaddedBatch, "hidden_at_positions", none)
    with pytest.raises(LogitferryError, match="out of memory on cpu with one row of 150 tokens"):
        scored(teacher_folder)


def test_a_device_map_changes_no_value(teacher_folder: Path):
    expected = scored(teacher_folder)
    assert_same(scored(teacher_folder, device="auto", device_map="auto"), expected)
    assert_same(scored(teacher_folder, device="auto", device_map={"": "cpu"}), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "vllm", "device": "cpu"}, "device is not for engine: vllm"),
        ({"engine": "vllm", "static_shapes": True}, "static_shapes is not for engine: vllm"),
        ({"vllm": {"tensor_parallel": 2}}, "vllm is not for engine: transformers"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map exclude each other"),
        (
            {"engine": "vllm", "vllm": {"engine_args": {"enable_prefix_caching": True}}},
            "enable_prefix_caching is set by",
        ),
    ],
)
def test_settings_of_another_engine_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TeacherSettings.model_validate({"model": "m"} | changes)


def test_what_values_may_depend_on_is_part_of_the_teacher(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A dump that began with a quantized teacher must not go on without; another machine's memory is no matter."""
    monkeypatch.setattr("shared.vllm_start.vllm_version", lambda: "0.32.0")

    def engine_settings(**vllm: Any) -> dict[str, Any]:
        settings = TeacherSettings.model_validate({"model": str(teacher_folder), "engine": "vllm", "vllm": vllm})
        return teacher_identity(settings).engine_settings

    assert engine_settings() == engine_settings(tensor_parallel=8, memory_fraction=0.5, max_rows=3) == {}
    arguments = {"kv_cache_memory_bytes": 1 << 30, "hf_overrides": {"head_dtype": "float32"}}
    assert engine_settings(quantization="fp8", engine_args=arguments) == {
        "hf_overrides": {"head_dtype": "float32"},
        "quantization": "fp8",
    }


def test_vllm_that_is_not_installed_is_said_before_anything_is_read(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shared.vllm_start.vllm_version", lambda: None)
    teacher = {"model": str(teacher_folder), "engine": "vllm"}
    settings = DumpSettings.model_validate(
        {"teacher": teacher, "data": {"files": [str(tmp_path / "none")]}, "output": str(tmp_path / "out")}
    )
    with pytest.raises(ConfigError, match="vLLM is not installed\n  next: pip install 'logitferry\\[vllm\\]'"):
        sealed_dump(settings)
