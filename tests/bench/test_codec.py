"""The codec's benchmark runs, and its rows have the keys that scripts read.  No time is asserted."""

import json
import sys

import pytest

from tests.bench import codec, codec_teachers


def test_bench_codec_reports_sizes_losses_and_rivals(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(codec_teachers, "MADE_UP_POSITIONS", 1024)
    monkeypatch.setattr(sys, "argv", ["codec", "--repeats", "1", "--json", str(tmp_path / "out.json")])
    codec.main()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {row["variant"] for row in rows} >= {"ours", "ours_threshold", "ours_exact", "raw", "rs_kd"}
    by_k = {(row["variant"], row["k"], row.get("min_prob", 0.0)): row for row in rows if "k" in row}
    for k in (10, 16, 32, 64):
        ours, raw = by_k["ours", k, 0.0], by_k["raw", k, 0.0]
        assert 0 < ours["mean_kl_nats"] <= 1.01e-4
        assert ours["bytes_per_position"] < raw["bytes_per_position"]
        assert min(ours["encode_positions_per_s"], ours["decode_positions_per_s"]) > 0
    assert by_k["ours_exact", 64, 0.0]["mean_kl_nats"] == 0
    sampled, rival = (next(row for row in rows if row["variant"] == name) for name in ("ours_threshold", "rs_kd"))
    assert sampled["noise"] < rival["noise"]
