"""Shards: what goes in comes out, rounded as far as the setting allows and not a bit further."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import ConfigError, DamagedShardError
from shared.rounding import round_positions
from shared.rows import LogitRow, Positions
from shared.schema import RowFormat
from shared.shard_reader import read_row_groups
from shared.shard_writer import Storage, encode_shard
from tests.shared.made_rows import PATH, assert_same_positions, assert_same_rows, random_rows, row_format

EXACT, ROUNDED = Storage(max_kl=0), Storage(max_kl=1e-4)


def decoded(data: pa.Buffer, shard: object, form: RowFormat, folder: Path) -> list[LogitRow]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / PATH).write_bytes(data)
    return [row for rows in read_row_groups(folder, shard, form) for row in rows]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 30), num_tails=st.sampled_from([0, 1, 3]))
def test_rows_survive_the_shard_to_the_bit(tmp_path_factory, seed: int, num_rows: int, num_tails: int):
    rows = random_rows(seed, num_rows, num_tails)
    form = row_format(*[1.0, 2.0, 0.5][: max(1, num_tails)], has_tails=num_tails > 0)
    data, shard = encode_shard(rows, form, EXACT, PATH)
    assert_same_rows(rows, decoded(data, shard, form, tmp_path_factory.mktemp("shard")))
    assert shard.rows == num_rows
    assert shard.kept == sum(len(row.teacher.kept_ids_E) for row in rows)
    assert shard.loss_nats == [0.0] * len(form.temperatures)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 30))
def test_rounded_rows_differ_by_their_rounding_alone(tmp_path_factory, seed: int, num_rows: int):
    rows, form = random_rows(seed, num_rows, 2), row_format(1.0, 2.0)
    data, shard = encode_shard(rows, form, ROUNDED, PATH)
    stored, loss_PT = round_positions(
        Positions.concatenate([row.teacher for row in rows]), [1.0, 2.0], max_kl=ROUNDED.max_kl
    )
    got = decoded(data, shard, form, tmp_path_factory.mktemp("shard"))
    assert_same_positions(Positions.concatenate([row.teacher for row in got]), stored)
    assert shard.loss_nats == pytest.approx(loss_PT.sum(axis=0), rel=1e-5)
    assert shard.loss_nats[0] <= 1e-4 * shard.positions * (1 + 1e-5)


def test_every_row_carries_what_its_rounding_lost():
    """So that rows can be taken out of a dataset and the sums still hold."""
    rows = random_rows(5, 12, 1)
    data, shard = encode_shard(rows, row_format(1.0), ROUNDED, PATH)
    losses = pq.read_table(pa.BufferReader(data))["storage_loss"].to_pylist()
    assert [len(of_row) for of_row in losses] == [1] * 12
    assert sum(of_row[0] for of_row in losses) == pytest.approx(shard.loss_nats[0])
    assert len({of_row[0] for of_row in losses}) > 6


def test_a_shard_streams_in_row_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("shared.shard_writer.ROW_GROUP_ENTRIES", 200)
    rows, form = random_rows(0, 50), row_format()
    data, shard = encode_shard(rows, form, EXACT, PATH)
    assert pq.read_metadata(pa.BufferReader(data)).num_row_groups > 5
    assert_same_rows(rows, decoded(data, shard, form, tmp_path))
    groups = list(read_row_groups(tmp_path, shard, form))
    entries = [sum(len(row.teacher.kept_ids_E) for row in group) for group in groups]
    assert all(count <= 200 or len(group) == 1 for count, group in zip(entries, groups, strict=True))


def test_long_prompts_make_row_groups_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.shard_writer.ROW_GROUP_TOKENS", 60)
    data, _ = encode_shard(random_rows(0, 50), row_format(), EXACT, PATH)
    assert pq.read_metadata(pa.BufferReader(data)).num_row_groups > 10


def test_teacher_bytes_count_the_teachers_columns_alone():
    rows = random_rows(0, 200)
    data, shard = encode_shard(rows, row_format(), ROUNDED, PATH)
    longer = [LogitRow(**{**vars(row), "sample_id": row.sample_id * 50}) for row in rows]
    bare, bare_shard = encode_shard(longer, row_format(), ROUNDED, PATH)
    assert bare.size > data.size
    assert bare_shard.teacher_bytes == shard.teacher_bytes < data.size


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("storage", [EXACT, ROUNDED])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_writer_refuses_what_the_reader_would(bad: float, storage: Storage):
    rows = random_rows(0, 3)
    rows[1].teacher.kept_logp_E[2] = bad
    with pytest.raises((DamagedShardError, AssertionError)):
        encode_shard(rows, row_format(), storage, PATH)


def test_smaller_at_a_higher_level_and_the_same_values(tmp_path: Path):
    rows, form = random_rows(3, 400), row_format()
    (fast, fast_shard), (small, small_shard) = (
        encode_shard(rows, form, Storage(max_kl=1e-4, zstd_level=level), PATH) for level in (1, 15)
    )
    assert small.size < fast.size
    assert_same_rows(decoded(fast, fast_shard, form, tmp_path), decoded(small, small_shard, form, tmp_path))


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ("shared.parquet_headers.MAX_GROUP_VALUES", DamagedShardError),
        ("shared.shard_writer.MAX_SHARD_BYTES", ConfigError),
        ("shared.schema.MAX_VALUES", ConfigError),
    ],
)
def test_the_writer_keeps_within_what_readers_allow(
    limit: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    """Found out before the shard is written, not when somebody opens it."""
    encode_shard(random_rows(0, 5), row_format(), ROUNDED, PATH)
    monkeypatch.setattr(limit, 20)
    with pytest.raises(error, match="unit_records" if error is ConfigError else "at most"):
        encode_shard(random_rows(0, 5), row_format(), ROUNDED, PATH)
