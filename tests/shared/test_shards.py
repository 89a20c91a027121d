"""Shards: what goes in comes out, to the bit, and no flipped bit comes out as data."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DamagedDataError, LogitferryError, MisalignedRowError
from shared.rows import LogitRow, Positions
from shared.schema import rows_to_table, table_to_rows
from shared.shards import decode_shard, encode_shard, read_shard, storage_kl

V = 1009
PATH = "data/part-00000.parquet"


def random_row(random_state: np.random.Generator, name: str, num_tokens: int, num_temperatures: int) -> LogitRow:
    mask = random_state.random(num_tokens) < 0.6
    mask[:2] = False, True
    num_positions = int(mask.sum())
    counts = random_state.integers(1, 9, num_positions).astype(np.int32)
    ids = [np.sort(random_state.choice(V, count, replace=False)) for count in counts]
    tail = -random_state.random((num_positions, num_temperatures)).astype(np.float32)
    tail[random_state.random(tail.shape) < 0.1] = -np.inf
    logp = [np.log(random_state.dirichlet(np.ones(count + 1))[:count]) for count in counts]
    return LogitRow(
        sample_id=name,
        input_ids_L=random_state.integers(0, V, num_tokens).astype(np.int32),
        label_mask_L=mask,
        teacher=Positions(
            kept_counts_P=counts,
            kept_ids_E=np.concatenate([[], *ids]).astype(np.int32),
            kept_logp_E=np.concatenate([[], *logp]).astype(np.float32),
            realised_logp_P=-random_state.random(num_positions).astype(np.float32) * 30,
            entropy_P=random_state.random(num_positions).astype(np.float32),
            tail_logsum_PT=tail,
        ),
    )


def random_rows(seed: int, num_rows: int, num_temperatures: int = 1) -> list[LogitRow]:
    state = np.random.default_rng(seed)
    return [random_row(state, f"row-{n}-é", int(state.integers(2, 40)), num_temperatures) for n in range(num_rows)]


def assert_same_rows(rows: list[LogitRow], others: list[LogitRow]) -> None:
    for row, other in zip(rows, others, strict=True):
        assert row.sample_id == other.sample_id
        np.testing.assert_array_equal(row.input_ids_L, other.input_ids_L)
        np.testing.assert_array_equal(row.label_mask_L, other.label_mask_L)
        for name, values in vars(row.teacher).items():
            np.testing.assert_array_equal(values, getattr(other.teacher, name), err_msg=name)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), num_rows=st.integers(1, 30), temperatures=st.sampled_from([[1.0], [1.0, 2.0, 0.5]]))
def test_rows_survive_the_shard_to_the_bit(seed: int, num_rows: int, temperatures: list[float]):
    rows = random_rows(seed, num_rows, len(temperatures))
    data, shard = encode_shard(rows, temperatures, V, PATH)
    assert_same_rows(rows, decode_shard(data, temperatures, V, "here"))
    assert shard.rows == num_rows
    assert shard.kept == sum(len(row.teacher.kept_ids_E) for row in rows)
    assert shard.kl_nats == pytest.approx(0, abs=1e-12)


def test_a_shard_streams_in_row_groups(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.shards.ROW_GROUP_POSITIONS", 64)
    rows = random_rows(0, 50)
    data, _ = encode_shard(rows, [1.0], V, PATH)
    assert pq.read_metadata(pa.BufferReader(data)).num_row_groups > 5
    assert_same_rows(rows, decode_shard(data, [1.0], V, "here"))


def test_teacher_bytes_count_the_teachers_columns_alone():
    rows = random_rows(0, 200)
    data, shard = encode_shard(rows, [1.0], V, PATH)
    bare, bare_shard = encode_shard(
        [LogitRow(**{**vars(row), "sample_id": row.sample_id * 50}) for row in rows], [1.0], V, PATH
    )
    assert bare.size > data.size
    assert bare_shard.teacher_bytes == shard.teacher_bytes < data.size


def test_storage_kl_is_the_kl_between_exact_and_stored():
    exact = random_rows(3, 1)[0].teacher
    moved = Positions(**{**vars(exact), "kept_logp_E": exact.kept_logp_E + np.float32(0.1)})
    kl_P = storage_kl(exact, moved)
    for position, other, kl in zip(_each(exact), _each(moved), kl_P, strict=True):
        p = np.exp(np.append(position.kept_logp_E, position.tail_logsum_PT[0, 0]).astype(float))
        q = np.exp(np.append(other.kept_logp_E, other.tail_logsum_PT[0, 0]).astype(float))
        p, q = p / p.sum(), q / q.sum()
        assert kl == pytest.approx(float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()), abs=1e-12)


def _each(positions: Positions) -> list[Positions]:
    return positions.split([1] * positions.num_positions)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dataset")
    data, shard = encode_shard(random_rows(7, 2), [1.0], V, PATH)
    (folder / "data").mkdir()
    (folder / PATH).write_bytes(data)
    return folder, shard


def test_every_single_byte_flip_is_refused(stored: Any):
    folder, shard = stored
    whole = (folder / PATH).read_bytes()
    generator = random.Random(0)
    try:
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << generator.randrange(8)
            (folder / PATH).write_bytes(flipped)
            with pytest.raises(DamagedDataError, match=r"part-00000\.parquet: damaged"):
                read_shard(folder, shard, [1.0], V)
    finally:
        (folder / PATH).write_bytes(whole)


@pytest.mark.full
def test_ten_thousand_random_flips_of_a_larger_shard_are_refused(tmp_path: Path):
    data, shard = encode_shard(random_rows(11, 400), [1.0], V, PATH)
    whole = bytearray(data)
    (tmp_path / "data").mkdir()
    generator = random.Random(1)
    for _ in range(10_000):
        at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        whole[at] ^= bit
        (tmp_path / PATH).write_bytes(whole)
        with pytest.raises(DamagedDataError):
            read_shard(tmp_path, shard, [1.0], V)
        whole[at] ^= bit
    (tmp_path / PATH).write_bytes(whole)
    assert len(read_shard(tmp_path, shard, [1.0], V)) == 400


def test_page_checksums_stand_behind_the_digest(stored: Any):
    """Without the digest almost every flip is still refused; what passes is the footer's, which no page covers."""
    folder, _ = stored
    whole = (folder / PATH).read_bytes()
    rows = decode_shard(pa.py_buffer(whole), [1.0], V, "here")
    footer_bytes = int.from_bytes(whole[-8:-4], "little") + 8
    changed = 0
    for at in range(4, len(whole) - footer_bytes):
        flipped = bytearray(whole)
        flipped[at] ^= 16
        try:
            got = decode_shard(pa.py_buffer(bytes(flipped)), [1.0], V, "here")
            assert_same_rows(rows, got)
        except LogitferryError:
            pass
        except AssertionError:
            changed += 1
    assert changed == 0


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b[: len(b) // 2]])
def test_a_file_of_another_length_is_refused(stored: Any, damage: Any, tmp_path: Path):
    folder, shard = stored
    (tmp_path / "data").mkdir()
    (tmp_path / PATH).write_bytes(damage((folder / PATH).read_bytes()))
    with pytest.raises(DamagedDataError, match="damaged: expected"):
        read_shard(tmp_path, shard, [1.0], V)


def test_a_missing_file_is_damage_with_a_next_step(stored: Any, tmp_path: Path):
    with pytest.raises(DamagedDataError, match=r"(?s)cannot be read.*next: "):
        read_shard(tmp_path, stored[1], [1.0], V)


def edited(**columns: Any) -> pa.Table:
    """A table whose bytes are whole but whose values no writer of the format produces."""
    table = rows_to_table(random_rows(1, 3), [1.0])
    tree = {name: table[name].to_pylist() for name in table.column_names}
    for name, edit in columns.items():
        tree[name] = edit(json.loads(json.dumps(tree[name])))
    return pa.table(tree, schema=table.schema)


def set_first(value: Any) -> Any:
    """Replace the first innermost value."""

    def edit(values: list[Any]) -> list[Any]:
        at = next(n for n, row in enumerate(values) if row)
        if isinstance(values[at][0], list):
            values[at][0][0] = value
        else:
            values[at][0] = value
        return values

    return edit


def empty_first(values: list[Any]) -> list[Any]:
    """A position that keeps nothing."""
    next(row for row in values if row)[0].clear()
    return values


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kept_ids": set_first(V)}, r"kept_ids lie in \[0, 1009\)"),
        ({"kept_ids": set_first(-1)}, r"kept_ids lie in \[0, 1009\)"),
        ({"input_ids": set_first(V)}, r"input_ids lie in \[0, 1009\)"),
        ({"kept_ids": lambda v: [[sorted(p, reverse=True) for p in row] for row in v]}, "ascend within a position"),
        ({"kept_ids": lambda v: [[[p[0]] * len(p) for p in row] for row in v]}, "ascend within a position"),
        ({"kept_ids": empty_first, "kept_logprobs": empty_first}, "every position keeps an id"),
        ({"kept_logprobs": set_first(0.5)}, "kept_logprobs are finite and at most 0"),
        ({"kept_logprobs": set_first(float("-inf"))}, "kept_logprobs are finite"),
        ({"realised_logprob": set_first(float("nan"))}, "realised_logprob is finite"),
        ({"entropy": set_first(-1.0)}, "entropy is finite and at least 0"),
        ({"tail_logsum_t1": set_first(float("nan"))}, "tail_logsum is a number or -inf"),
    ],
)
def test_values_that_no_writer_produces_are_refused(columns: dict[str, Any], message: str):
    with pytest.raises(DamagedDataError, match=message):
        table_to_rows(edited(**columns), [1.0], V, "here")


@pytest.mark.parametrize("name", ["realised_logprob", "entropy", "tail_logsum_t1", "kept_ids", "label_mask"])
def test_columns_that_do_not_run_side_by_side_are_refused(name: str):
    with pytest.raises(MisalignedRowError):
        table_to_rows(edited(**{name: lambda v: [*v[:-1], v[-1][:-1]]}), [1.0], V, "here")


def test_a_shifted_label_mask_is_refused():
    """Counts still agree, but the first token would be a label."""
    shift = {"label_mask": lambda v: [row[1:] + row[:1] for row in v]}
    with pytest.raises(MisalignedRowError, match="nothing precedes it"):
        table_to_rows(edited(**shift), [1.0], V, "here")


def test_a_row_without_a_supervised_token_is_refused():
    columns = rows_to_table(random_rows(1, 3), [1.0])
    tree = {name: columns[name].to_pylist() for name in columns.column_names}
    tree["label_mask"][1] = [False] * len(tree["label_mask"][1])
    for name in ("kept_ids", "kept_logprobs", "realised_logprob", "entropy", "tail_logsum_t1"):
        tree[name][1] = []
    with pytest.raises(DamagedDataError, match=r"here:1: row 'row-1-é' has no supervised token"):
        table_to_rows(pa.table(tree, schema=columns.schema), [1.0], V, "here")


def test_other_columns_than_the_manifest_declares_are_refused():
    with pytest.raises(DamagedDataError, match="expected the columns"):
        table_to_rows(rows_to_table(random_rows(1, 3, 2), [1.0, 2.0]), [1.0], V, "here")
