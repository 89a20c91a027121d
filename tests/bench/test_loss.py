"""The benchmarks of loss, step and sampling run; their rows have the keys that scripts read.  No time is asserted."""

import json
import sys
from typing import Any

import pytest

from tests.bench import loss, sampling, train


def rows_of(module: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--json", str(tmp_path / "out.json")])
    module.main()
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.cluster
def test_bench_loss_compares_with_cross_entropy_and_the_floor(tmp_path, monkeypatch: pytest.MonkeyPatch):
    shape = "2048,64,4099,float32"
    rows = rows_of(loss, tmp_path, monkeypatch, "--shape", shape, "--repeats", "1", "--kept", "9", "--only", "dense_kl")
    by_name = {row["variant"]: row for row in rows}
    assert by_name.keys() == {"ours", "cross_entropy", "matmuls", "dense_kl"}
    for row in rows:
        assert (row["positions"], row["vocab"], row["dtype"], row["k"]) == (2048, 4099, "float32", 9)
        assert row["seconds"] > 0
    # 32 MiB of logits, of which the others hold several copies: what peak memory is measured at all.
    assert by_name["dense_kl"]["peak_bytes"] > by_name["cross_entropy"]["peak_bytes"] > 2 * 2048 * 4099 * 4


def test_bench_loss_refuses_to_time_a_wrong_answer(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A tail twice too heavy."""
    right = loss.fused_linear_loss

    def wrong(hidden: Any, head: Any, targets: Any, objective: Any, **settings: Any) -> Any:
        changed = type(targets)(**{**vars(targets), "tail_logsum_N": targets.tail_logsum_N + 0.7})
        return right(hidden, head, changed, objective, **settings)

    monkeypatch.setattr(loss, "fused_linear_loss", wrong)
    with pytest.raises(SystemExit, match="ours and log_softmax_gather differ in"):
        rows_of(loss, tmp_path, monkeypatch, "--shape", "64,16,403,float32", "--repeats", "1", "--kept", "9")


def test_bench_train_reports_the_ratio_to_a_step_without_a_teacher(tmp_path, monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(train.SHAPES, "100m", small)
    monkeypatch.setattr(train, "ROW_TOKENS", 33)
    rows = rows_of(train, tmp_path, monkeypatch, "--vocab", "1009", "--rows", "2", "--repeats", "1")
    assert [row["variant"] for row in rows] == ["sft", "kd", "kd_t2", "kd_jsd", "sft_plain"]
    assert rows[0]["ratio"] == 1
    assert all(row["ratio"] > 0 and row["positions"] == 64 and row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.cluster
def test_bench_sampling_has_less_noise_than_rs_kd_at_equal_bytes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "DRAWS", (5, 50))
    monkeypatch.setattr(sampling, "TAUS", (0.05,))
    rows = rows_of(sampling, tmp_path, monkeypatch, "--positions", "512")
    ours = [row for row in rows if row["variant"] == "threshold"]
    assert len(ours) == 2
    for row in ours:
        assert row["noise_ratio"] > 1
        assert row["bytes_per_position"] > 0
