"""Shards read back: no flipped bit, no foreign column and no impossible number comes out as data."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.errors import DamagedShardError, LogitferryError, MisalignedRowError
from shared.rows import LogitRow, Positions
from shared.schema import outlines_of, rows_to_table, table_to_rows
from shared.shard_reader import OUTLINE, read_outlines, read_row_groups, tables_of
from shared.shard_writer import Storage, encode_shard
from tests.shared.made_rows import PATH, V, assert_same_rows, random_rows, row_format

FORM = row_format()


def read(folder: Path, shard: Any) -> list[LogitRow]:
    return [row for rows in read_row_groups(folder, shard, FORM) for row in rows]


def decode(data: bytes) -> list[LogitRow]:
    """Without the digest."""
    return [row for table in tables_of(pa.py_buffer(data), "here") for row in table_to_rows(table, FORM, "here")]


def table_of(rows: list[LogitRow], num_tails: int = 1) -> pa.Table:
    teacher = Positions.concatenate([row.teacher for row in rows])
    form = row_format(*[1.0, 2.0][:num_tails])
    return rows_to_table(rows, teacher, np.zeros((len(rows), num_tails)), form)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dataset")
    data, shard = encode_shard(random_rows(7, 2), FORM, Storage(max_kl=1e-4), PATH)
    (folder / "data").mkdir()
    (folder / PATH).write_bytes(data)
    return folder, shard


def test_outlines_are_the_rows_without_kept_ids_and_tails(stored: Any):
    folder, shard = stored
    for outline, row in zip(read_outlines(folder, shard, FORM), read(folder, shard), strict=True):
        assert (outline.sample_id, outline.source) == (row.sample_id, row.source)
        for name in ("input_ids_L", "label_mask_L"):
            np.testing.assert_array_equal(getattr(outline, name), getattr(row, name))
        for name in ("realised_logp_P", "entropy_P"):
            np.testing.assert_array_equal(getattr(outline.teacher, name), getattr(row.teacher, name))
        assert (len(outline.teacher.kept_ids_E), outline.teacher.tail_logsum_PT.size) == (0, 0)
        outline.cut(outline.num_tokens - 1)


def test_outlines_are_refused_where_a_byte_of_any_column_is_another(stored: Any):
    folder, shard = stored
    whole = (folder / PATH).read_bytes()
    try:
        for at in range(0, len(whole), 97):
            (folder / PATH).write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            with pytest.raises(DamagedShardError, match=r"part-00000\.parquet: damaged"):
                read_outlines(folder, shard, FORM)
    finally:
        (folder / PATH).write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("input_ids", V, "input_ids lie in"),
        ("input_ids", -1, "input_ids lie in"),
        ("realised_logprob", np.inf, "realised_logprob is finite"),
        ("entropy", np.nan, "entropy is finite"),
    ],
)
def test_outlines_are_refused_where_a_number_is_none_that_a_writer_writes(name: str, wrong: float, message: str):
    table = table_of(random_rows(7, 2)).select(list(OUTLINE))
    column, place = table[name].combine_chunks(), table.schema.get_field_index(name)
    values = column.values.to_numpy(zero_copy_only=False).copy()
    values[3] = wrong
    broken = pa.ListArray.from_arrays(column.offsets, pa.array(values), type=column.type)
    with pytest.raises(DamagedShardError, match=message):
        outlines_of(table.set_column(place, table.schema.field(place), broken), FORM, "here")


def test_outlines_are_refused_where_columns_do_not_run_beside_each_other():
    rows = random_rows(7, 2)
    table = table_of(rows).select(list(OUTLINE))
    for name in ("label_mask", "entropy"):
        place = table.schema.get_field_index(name)
        turned = table.set_column(
            place, table.schema.field(place), table[name].take(pa.array(range(len(rows) - 1, -1, -1)))
        )
        with pytest.raises(MisalignedRowError, match=f"column {name} does not run beside"):
            outlines_of(turned, FORM, "here")


def test_every_single_byte_flip_is_refused(stored: Any):
    folder, shard = stored
    whole = (folder / PATH).read_bytes()
    generator = random.Random(0)
    try:
        for at in range(len(whole)):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << generator.randrange(8)
            (folder / PATH).write_bytes(flipped)
            with pytest.raises(DamagedShardError, match=r"part-00000\.parquet: damaged"):
                read(folder, shard)
    finally:
        (folder / PATH).write_bytes(whole)


@pytest.mark.full
def test_ten_thousand_random_flips_of_a_larger_shard_are_refused(tmp_path: Path):
    data, shard = encode_shard(random_rows(11, 400), FORM, Storage(max_kl=1e-4), PATH)
    whole = bytearray(data)
    (tmp_path / "data").mkdir()
    generator = random.Random(1)
    for _ in range(10_000):
        at, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        whole[at] ^= bit
        (tmp_path / PATH).write_bytes(whole)
        with pytest.raises(DamagedShardError):
            read(tmp_path, shard)
        whole[at] ^= bit
    (tmp_path / PATH).write_bytes(whole)
    assert len(read(tmp_path, shard)) == 400


def test_page_checksums_stand_behind_the_digest(stored: Any):
    """Without the digest almost every flip is still refused; what passes is the footer's, which no page covers."""
    folder, _ = stored
    whole = (folder / PATH).read_bytes()
    rows = decode(whole)
    footer_bytes = int.from_bytes(whole[-8:-4], "little") + 8
    changed = 0
    for at in range(4, len(whole) - footer_bytes):
        flipped = bytearray(whole)
        flipped[at] ^= 16
        try:
            got = decode(bytes(flipped))
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
    with pytest.raises(DamagedShardError, match="damaged: expected"):
        read(tmp_path, shard)


def test_a_missing_file_is_damage_with_a_next_step(stored: Any, tmp_path: Path):
    with pytest.raises(DamagedShardError, match=r"(?s)is missing.*next: .*logit-shards repair"):
        read(tmp_path, stored[1])


def edited(**columns: Any) -> pa.Table:
    """A table whose bytes are whole but whose values no writer of the format produces."""
    table = table_of(random_rows(1, 3))
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
    with pytest.raises(DamagedShardError, match=message):
        table_to_rows(edited(**columns), FORM, "here")


@pytest.mark.parametrize("name", ["realised_logprob", "entropy", "tail_logsum_t1", "kept_ids", "label_mask"])
def test_columns_that_do_not_run_side_by_side_are_refused(name: str):
    with pytest.raises(MisalignedRowError):
        table_to_rows(edited(**{name: lambda v: [*v[:-1], v[-1][:-1]]}), FORM, "here")


def test_a_shifted_label_mask_is_refused():
    """Counts still agree, but the first token would be a label."""
    shift = {"label_mask": lambda v: [row[1:] + row[:1] for row in v]}
    with pytest.raises(MisalignedRowError, match="nothing precedes it"):
        table_to_rows(edited(**shift), FORM, "here")


def test_a_row_without_a_supervised_token_is_refused():
    columns = table_of(random_rows(1, 3))
    tree = {name: columns[name].to_pylist() for name in columns.column_names}
    tree["label_mask"][1] = [False] * len(tree["label_mask"][1])
    for name in ("kept_ids", "kept_logprobs", "realised_logprob", "entropy", "tail_logsum_t1"):
        tree[name][1] = []
    with pytest.raises(DamagedShardError, match=r"here:1: row 'row-1-é' has no supervised token"):
        table_to_rows(pa.table(tree, schema=columns.schema), FORM, "here")


def test_other_columns_than_the_manifest_declares_are_refused():
    with pytest.raises(DamagedShardError, match="expected the columns"):
        table_to_rows(table_of(random_rows(1, 3, 2), 2), FORM, "here")
