"""The real vLLM on the CPU, beside the transformers engine on the same weights.  `make test-vllm` runs this file.

Agreement is stated as 1e-4 nats in fp32: the two order their sums differently.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.dataset import LogitDataset
from shared.errors import ConfigError, LogitferryError, MismatchError
from shared.rows import LogitRow, Positions, Row
from teacher_dump.config import TeacherSettings
from teacher_dump.engines import open_engine, teacher_identity
from teacher_dump.keep import Threshold, TopK
from teacher_dump.vllm_worker import _Capture
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
TOPK = TopK(k=8, min_prob=0.0, always_ids=(2,))
SAMPLED = Threshold(tau=0.05, seed=3, always_ids=(2,))
# vLLM's CPU attention wants heads of 32 numbers at least; a vocabulary of 307 is padded to 320 inside.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def make_teacher(folder: Path, family: str = "qwen2", **changes: Any) -> Path:
    make_tokenizer(make_model(folder, family=family, seed=1, **{**SHAPE, **changes}))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def some_rows() -> list[Row]:
    """Of very unlike lengths; some supervised throughout, one at its last token alone, one at its second."""
    random = np.random.default_rng(0)
    rows = []
    for n, length in enumerate([2, 3, 17, 64, 65, 130, 240, 9, 33, 100]):
        mask = random.random(length) < (1.0 if n % 3 == 0 else 0.4)
        if n in (4, 7):
            mask[:] = False
        mask[0], mask[1 if n == 7 else -1] = False, True
        ids = random.integers(3, 300, length).astype(np.int32)
        rows.append(Row(sample_id=f"row-{n}", input_ids_L=ids, label_mask_L=mask))
    return rows


def settings_of(teacher: Path, engine: str, **changes: Any) -> TeacherSettings:
    tree: dict[str, Any] = {"model": str(teacher), "engine": engine, "batch_tokens": 256, "chunk_positions": 37}
    if engine == "vllm":
        tree["vllm"] = {"enforce_eager": True, **changes.pop("vllm", {})}
    return TeacherSettings.model_validate(tree | changes)


def scored(settings: TeacherSettings, rule: TopK | Threshold = TOPK) -> list[Positions]:
    """The rows in three units, one of them empty."""
    rows = some_rows()
    with open_engine(settings, teacher_identity(settings), rule, [1.0, 2.0], longest_row=240) as engine:
        return [positions for unit in engine.score([rows[:4], [], rows[4:]]) for positions in unit]


def assert_agree(some: list[Positions], others: list[Positions]) -> None:
    assert len(some) == len(others) == len(some_rows())
    for row, one, other in zip(some_rows(), some, others, strict=True):
        assert one.num_positions == row.num_positions
        np.testing.assert_array_equal(one.kept_counts_P, other.kept_counts_P)
        np.testing.assert_array_equal(one.kept_ids_E, other.kept_ids_E)
        for name in ("kept_logp_E", "realised_logp_P", "entropy_P", "tail_logsum_PT"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module")
def expected(teacher: Path) -> list[Positions]:
    return scored(settings_of(teacher, "transformers"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_tokens": 16, "vllm": {"max_rows": 3}},  # every long row is prefilled in many parts
        {"chunk_positions": 1000},
    ],
)
def test_every_position_is_what_transformers_says(teacher: Path, expected: list[Positions], changes: dict[str, Any]):
    assert_agree(scored(settings_of(teacher, "vllm", **changes)), expected)


def test_a_row_that_is_preempted_begins_again(
    teacher: Path, expected: list[Positions], monkeypatch: pytest.MonkeyPatch
):
    """A cache too small for what is under way: vLLM drops a row in the middle and prefills it once more."""
    request_of, num_restarts = _Capture._request, 0

    def counted(self: _Capture, state: Any) -> Any:
        nonlocal num_restarts
        request = request_of(self, state)
        num_restarts += request is not None and request.done > 0 and state.num_computed_tokens == 0
        return request

    monkeypatch.setattr(_Capture, "_request", counted)
    small = {"num_gpu_blocks_override": 5, "scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 40}
    assert_agree(scored(settings_of(teacher, "vllm", batch_tokens=100, vllm={"engine_args": small})), expected)
    assert num_restarts


def test_sampled_ids_are_the_same(teacher: Path):
    """Their draws depend on sample id and position alone, not on the engine."""
    assert_agree(scored(settings_of(teacher, "vllm"), SAMPLED), scored(settings_of(teacher, "transformers"), SAMPLED))


@pytest.mark.parametrize("family", ["llama_tied", "gemma2_softcap", "cohere_scale", "granite_scale"])
def test_heads_of_other_families(family: str, tmp_path: Path):
    teacher = make_teacher(tmp_path, family)
    assert_agree(scored(settings_of(teacher, "vllm")), scored(settings_of(teacher, "transformers")))


def test_a_chunk_without_memory_is_halved_and_stays_so(
    teacher: Path, expected: list[Positions], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import teacher_dump.scoring as scoring

    keep_chunk = scoring.keep_chunk

    def small_memory(logits_NV: torch.Tensor, *rest: Any) -> Any:
        if len(logits_NV) > 9:
            raise torch.OutOfMemoryError("out of memory")
        return keep_chunk(logits_NV, *rest)

    monkeypatch.setattr(scoring, "keep_chunk", small_memory)
    assert_agree(scored(settings_of(teacher, "vllm")), expected)
    assert "out of memory: teacher.chunk_positions is 6 from now on" in caplog.text
    monkeypatch.setattr(scoring, "keep_chunk", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(LogitferryError, match="out of memory"):
        scored(settings_of(teacher, "vllm"))


def test_hidden_states_in_another_order_are_found_at_start(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """As a release might have them: the state of the token before."""
    score = _Capture._score
    monkeypatch.setattr(_Capture, "_score", lambda self, hidden_ND, pieces: score(self, hidden_ND.roll(1, 0), pieces))
    with pytest.raises(MismatchError, match=r"vLLM .*: log p of a few tokens is .* but .* by vLLM's prompt_logprobs"):
        scored(settings_of(teacher, "vllm"))


def test_a_release_without_what_is_needed_is_named(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("teacher_dump.vllm_worker.HOOK", "_get_something_else")
    with pytest.raises(MismatchError, match=r"vLLM 0\.32\.0: .*has no _get_something_else.*; tested with 0\.32\.x"):
        scored(settings_of(teacher, "vllm"))


def test_the_other_model_runner_is_refused(teacher: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ConfigError, match="VLLM_USE_V2_MODEL_RUNNER is set"):
        scored(settings_of(teacher, "vllm"))


def test_a_chunk_larger_than_the_device_is_refused(teacher: Path):
    with pytest.raises(ConfigError, match=r"the logits of teacher\.chunk_positions, 100000000, take \d+%"):
        scored(settings_of(teacher, "vllm", chunk_positions=100_000_000, batch_tokens=100_000_000))


def test_what_vllm_refuses_is_said_in_its_words(teacher: Path):
    with pytest.raises(LogitferryError, match=r"vLLM cannot start with .*no_such_method"):
        scored(settings_of(teacher, "vllm", vllm={"quantization": "no_such_method"}))


def all_rows(dataset: LogitDataset) -> Iterator[LogitRow]:
    for index in range(len(dataset.manifest.shards)):
        yield from dataset.read_shard(index)


def assert_same_dataset(one: LogitDataset, other: LogitDataset) -> None:
    assert one.manifest.total("positions") == other.manifest.total("positions") > 500
    for row, same in zip(all_rows(one), all_rows(other), strict=True):
        assert row.sample_id == same.sample_id
        np.testing.assert_array_equal(row.input_ids_L, same.input_ids_L)
        np.testing.assert_array_equal(row.teacher.kept_ids_E, same.teacher.kept_ids_E)
        np.testing.assert_allclose(row.teacher.kept_logp_E, same.teacher.kept_logp_E, atol=TOLERANCE)
        np.testing.assert_allclose(row.teacher.tail_logsum_PT, same.teacher.tail_logsum_PT, atol=TOLERANCE)


def test_a_dump_by_either_engine_is_the_same_dataset(teacher: Path, tmp_path: Path):
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(23))
    with_vllm = {"teacher__engine": "vllm", "teacher__device": "auto", "teacher__vllm": {"enforce_eager": True}}
    one = sealed_dump(dump_settings(teacher, chats, tmp_path / "vllm", **with_vllm))
    other = sealed_dump(dump_settings(teacher, chats, tmp_path / "transformers"))
    assert_same_dataset(one, other)
    assert one.manifest.teacher.engine.startswith("vllm 0.32")
    assert one.manifest.teacher.weights_sha256 == other.manifest.teacher.weights_sha256


# On a CPU vLLM prepares the later stages of a pipeline only where it compiles the model.
@pytest.mark.parametrize("parallel", ["tensor_parallel: 2, enforce_eager: true", "pipeline_parallel: 2"])
def test_a_replica_of_two_processes_dumps_the_same(parallel: str, tmp_path: Path):
    """As the command does it: workers of their own, which share every layer, or have half of the layers each."""
    teacher = make_teacher(tmp_path / "teacher", num_key_value_heads=2)
    chats = write_jsonl(tmp_path / "chats.jsonl", chat_records(23))
    config = tmp_path / "dump.yaml"
    config.write_text(
        f"teacher: {{model: {teacher}, engine: vllm, batch_tokens: 300, chunk_positions: 37,\n"
        f"  vllm: {{{parallel}}}}}\n"
        f"data: {{files: [{chats}]}}\noutput: {tmp_path}/two\nkeep: {{k: 8, max_kl: 0}}\ntemperatures: [1, 2]\n"
        "unit_records: 7\n"
    )
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "teacher_dump", "run", str(config), "--json"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout)["rows"] == 23, "nothing but the answer is on standard output"
    one = sealed_dump(dump_settings(teacher, chats, tmp_path / "one"))
    assert_same_dataset(LogitDataset.open(tmp_path / "two"), one)
