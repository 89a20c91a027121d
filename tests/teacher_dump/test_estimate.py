"""An estimate is drawn fairly, scaled up with its error, and is what the dump then has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from shared.errors import MismatchError, RecordError
from teacher_dump.cli import cli
from teacher_dump.estimate import Estimate, _scaled, draw, estimate
from tests.data import chat_records, dump_settings, sealed_dump, write_jsonl
from tests.tiny import make_model, make_tokenizer


def estimated(teacher: Path, files: Path, output: Path, sample: int, **changes: Any) -> Estimate:
    return estimate(dump_settings(teacher, files, output, **changes), sample=sample)


def test_of_everything_it_is_what_the_dump_then_has(teacher_folder: Path, tmp_path: Path):
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(23))
    found = estimated(teacher_folder, files, tmp_path / "out", sample=1000, unit_records=1000)
    assert not (tmp_path / "out").exists(), "nothing is written"
    manifest = sealed_dump(dump_settings(teacher_folder, files, tmp_path / "out", unit_records=1000)).manifest
    assert (found.records, found.sampled) == (23, 23)
    for name in ("rows", "tokens", "positions"):
        assert getattr(found, name).total == manifest.total(name)
        assert getattr(found, name).error == 0, "nothing is uncertain"
    assert found.longest_row == max(shard.longest_row for shard in manifest.shards)
    assert found.size_bytes == manifest.total("size_bytes")
    assert found.bytes_per_position == pytest.approx(manifest.total("teacher_bytes") / manifest.total("positions"))
    assert found.seconds["total"] >= found.seconds["teacher"] > 0
    assert found.logits_bytes > 37 * 307 * 8


def test_a_sample_of_a_sorted_file_is_scaled_up_within_its_error(teacher_folder: Path, tmp_path: Path):
    """The first records alone, all short, would say half as much."""
    records = sorted(chat_records(400), key=lambda record: len(json.dumps(record)))
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    found = estimated(teacher_folder, files, tmp_path / "out", sample=80, teacher__batch_tokens=4000)
    every = estimated(teacher_folder, files, tmp_path / "out", sample=400, teacher__batch_tokens=4000)
    assert found.sampled == 80
    for name in ("tokens", "positions"):
        sampled, exact = getattr(found, name), getattr(every, name)
        assert 0 < sampled.error < exact.total / 5
        assert abs(sampled.total - exact.total) < 4 * sampled.error


def test_every_record_is_drawn_equally_often():
    counts = np.zeros(30)
    for seed in range(3000):
        number, drawn = draw(range(30), 6, seed)  # pyright: ignore[reportArgumentType]
        assert number == 30
        assert list(drawn) == sorted(set(drawn)), "in their order, none twice"
        counts[drawn] += 1
    expected = 3000 * 6 / 30
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_the_error_is_that_of_a_sample_without_replacement():
    random = np.random.default_rng(0)
    population = random.integers(0, 100, size=200)
    totals, errors = [], []
    for _ in range(3000):
        sample = random.choice(population, size=40, replace=False)
        amount = _scaled(sample.tolist(), 40, 200)
        totals.append(amount.total)
        errors.append(amount.error)
    assert np.mean(totals) == pytest.approx(population.sum(), rel=0.005)
    assert np.mean(errors) == pytest.approx(np.std(totals), rel=0.05)


def test_records_that_give_no_row_count_nothing(teacher_folder: Path, tmp_path: Path):
    records = chat_records(20)
    for record in records[::2]:
        record["messages"][1]["content"] = "long " * 600
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    found = estimated(teacher_folder, files, tmp_path / "out", sample=20, data__on_too_long="drop")
    assert found.rows.total == sealed_dump(
        dump_settings(teacher_folder, files, tmp_path / "out", data__on_too_long="drop")
    ).manifest.total("rows")
    assert found.rows.total < 20


def test_bad_records_stop_it_as_they_would_the_dump(teacher_folder: Path, tmp_path: Path):
    records = chat_records(5)
    records[3]["messages"][0]["content"] = 17
    files = write_jsonl(tmp_path / "chats.jsonl", records)
    with pytest.raises(RecordError, match=r"chats\.jsonl:4"):
        estimated(teacher_folder, files, tmp_path / "out", sample=5)


def test_a_tokenizer_that_exceeds_the_teachers_vocabulary_is_refused(tmp_path: Path):
    teacher = make_model(tmp_path / "teacher", vocab_size=60)
    make_tokenizer(teacher)
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(5))
    with pytest.raises(MismatchError, match="but the teacher's vocabulary ends at 60"):
        estimated(teacher, files, tmp_path / "out", sample=5)


def test_the_command_tells_people_and_programs(teacher_folder: Path, tmp_path: Path):
    files = write_jsonl(tmp_path / "chats.jsonl", chat_records(9))
    config = tmp_path / "dump.yaml"
    config.write_text(
        f"teacher: {{model: {teacher_folder}, device: cpu}}\ndata: {{files: [{files}]}}\noutput: {tmp_path}/out\n"
    )
    plain = CliRunner().invoke(cli, ["estimate", str(config), "--records", "5"], catch_exceptions=False)
    assert plain.exit_code == 0
    lines = dict(line.split(" ", 1) for line in plain.stdout.splitlines() if line[0] != " ")
    assert lines["records"].strip() == "9, of which 5 were tokenized and scored"
    assert "bytes per position" in lines["disk"]
    assert plain.stdout.splitlines()[-1] == f"  next: teacher-dump run {config}"
    answer = CliRunner().invoke(cli, ["estimate", str(config), "--json"], catch_exceptions=False)
    assert json.loads(answer.stdout)["rows"] == {"total": 9, "error": 0}
