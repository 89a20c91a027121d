"""Shards made to harm: small files that would be huge, and headers that Parquet's own reader believes.

Each has the digest that the manifest names, as if its writer meant it.  They are read in a process of their own with
little memory: what is not refused in time fails there, not on the machine of whoever runs the tests.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared import parquet_headers, thrift
from shared.dataset import LogitDataset
from shared.errors import DamagedShardError
from shared.schema import leaf
from shared.thrift import BINARY, I32, I64, LIST, STRUCT, Struct
from shared.verification import verify
from tests.shared.forged_parquet import (
    assembled,
    column,
    encode,
    levels,
    page,
    parts,
    put,
    runs,
    struct,
    varint,
    with_footer,
    with_pages,
)
from tests.shared.made_datasets import edit_manifest, made_rows, reseal, rewrite_shard, write_dataset
from tests.shared.small_process import FINE, outcome, outcomes

HUGE = (1 << 31) - 1
MANY = 1 << 29


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("whole") / "set", [made_rows(1, 3)])


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def both_ways(folder: Path) -> list[str]:
    """All of a shard, and its names."""
    dataset = LogitDataset.open(folder)
    return outcomes(lambda: dataset.read_shard(0), dataset.sample_ids)


def refused(folder: Path, *words: str) -> None:
    told = both_ways(folder)[0]
    assert told.startswith("DamagedShardError: "), told
    for word in ("part-00000.parquet", "next: ", *words):
        assert word in told


def test_the_untouched_dataset_is_read(copy: Path):
    assert both_ways(copy) == [FINE] * 2
    rewrite_shard(copy, with_footer(lambda footer: None))
    assert both_ways(copy) == [FINE] * 2


def one_row(num_values: int) -> bytes:
    """The levels of one row that has so many values, and a dictionary index of 0 for each of them."""
    return levels((1, 0), (num_values - 1, 1)) + levels((num_values, 1)) + b"\x01" + runs((num_values, 0))


def bomb(name: str, num_values: int, *, footer_says: int | None = None) -> Callable[[bytes], bytes]:
    """Two pages of a few dozen bytes: a dictionary of one number, which stands there half a billion times."""
    pages = [page(b"\0" * 4, 1, 0, dictionary=True), page(one_row(num_values), num_values, 8)]
    return with_pages(name, pages, num_values if footer_says is None else footer_says, 100)


def test_a_page_that_calls_itself_huge_is_refused(copy: Path):
    """Parquet would read the page, whatever the footer says: eight gigabytes out of 60 bytes."""
    tokens = LogitDataset.open(copy).manifest.total("tokens")
    rewrite_shard(copy, bomb("input_ids", MANY, footer_says=tokens))
    refused(copy, "row group 0, column input_ids.list.element", f"pages hold {MANY} values, the footer has {tokens}")


def test_a_bomb_under_an_untrue_digest_is_not_looked_into(copy: Path):
    """To say which column is damaged, what is damaged has to be decoded."""
    rewrite_shard(copy, bomb("input_ids", MANY, footer_says=LogitDataset.open(copy).manifest.total("tokens")))
    edit_manifest(copy, lambda m: m["shards"][0].update(sha256="0" * 64))
    refused(copy, "damaged: expected sha256 0000000000000000", f"pages hold {MANY} values")


def test_names_of_other_rows_than_the_manifest_counts_are_refused(copy: Path):
    edit_manifest(copy, lambda m: m["shards"][0].update(rows=4))
    told = outcome(LogitDataset.open(copy).sample_ids)
    assert told.startswith("DamagedShardError: ")
    assert "the manifest says 4 rows, the file holds 3" in told


def test_an_honest_bomb_is_refused(copy: Path):
    """Page, footer and manifest agree that there are half a billion tokens."""
    rewrite_shard(copy, bomb("input_ids", MANY), tokens=MANY)
    refused(copy, "row group 0: 3 rows", f", {1 << 28} and ")


def test_a_row_group_that_would_decompress_to_gigabytes_is_refused(copy: Path):
    pages = [page(b"\0" * 4, 1, 0, dictionary=True), page(one_row(1 << 27), 1 << 27, 8)]
    rewrite_shard(copy, with_pages("input_ids", pages, 1 << 27, (1 << 31) + 9), tokens=1 << 27)
    refused(copy, "row group 0: 3 rows", f" and {1 << 31} are allowed")


def test_a_row_group_of_millions_of_rows_is_refused(copy: Path):
    """Each would be objects of a kilobyte."""
    num_rows = (1 << 20) + 1

    def change(data: bytes) -> bytes:
        data = long_strings("sample_id", 3, num_rows)(long_strings("source", 3, num_rows)(data))
        return of_so_many_rows(data, num_rows)

    rewrite_shard(copy, change, rows=num_rows)
    refused(copy, f"row group 0: {num_rows} rows", f"at most {1 << 20}, ")
    assert f"row group 0: {num_rows} rows" in outcome(LogitDataset.open(copy).sample_ids)


def test_a_file_of_countless_pages_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet_headers, "MAX_PAGES", 100)
    assert both_ways(copy) == [FINE, FINE]
    rewrite_shard(copy, with_pages("input_ids", [page(b"", 0, 0)] * 100, 0, 100))
    refused(copy, "more than 100 pages in one file")


@pytest.mark.parametrize("kind", [1, 3, 9])
def test_other_kinds_of_pages_are_refused(kind: int, copy: Path):
    """An index, a data page of version 2, and one that Parquet would pass over."""
    about = struct(i1=(I32, 3), i2=(I32, 0), i3=(I32, 3), i4=(I32, 0), i5=(I32, 0), i6=(I32, 0))
    pages = [page(b"", 3, 0, i1=(I32, kind), i8=(STRUCT, about))]
    rewrite_shard(copy, with_pages("sample_id", pages, 3, 100))
    assert all(f"page 1 is of kind {kind}" in told for told in both_ways(copy))


def test_more_names_than_rows_are_refused(copy: Path):
    rewrite_shard(copy, strings(b"a", b"b", b"c", b"d"))
    assert all("column sample_id: 4 values in 3 rows" in told for told in both_ways(copy))


def test_a_footer_of_countless_values_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thrift, "MAX_VALUES", 2000)
    assert both_ways(copy) == [FINE, FINE]
    rewrite_shard(copy, lambda data: assembled(b"PAR1", b"\x19\xfc" + varint(5000) + bytes(5000)))
    refused(copy, "more than 2000 values")


def test_a_dictionary_that_calls_itself_huge_is_refused(copy: Path):
    pages = [page(b"\0" * 4, HUGE, 0, dictionary=True), page(one_row(9), 9, 8)]
    rewrite_shard(copy, with_pages("input_ids", pages, 9, 100))
    refused(copy, f"a dictionary of {HUGE} entries in 4 bytes")


def test_zeros_that_decompress_to_gigabytes_are_refused(copy: Path):
    zeros = page(bytes(1 << 28), 60, 0)
    assert len(zeros) < 1 << 15
    rewrite_shard(copy, with_pages("input_ids", [zeros] * 7, 420, 7 << 28), tokens=420)
    refused(copy, "420 values would take 1879048192 bytes decompressed")


def test_pages_that_decompress_to_more_than_the_footer_says_are_refused(copy: Path):
    rewrite_shard(copy, with_pages("input_ids", [page(bytes(1 << 28), 60, 0)], 60, 100), tokens=60)
    refused(copy, "for 268435456 overflow the column")


def test_a_page_that_lies_about_its_decompressed_size_is_refused(copy: Path):
    pages = [page(bytes(1 << 28), 60, 0, i2=(I32, 99))]
    rewrite_shard(copy, with_pages("input_ids", pages, 60, 100), tokens=60)
    refused(copy, "")


def long_strings(name: str, length: int, num_rows: int) -> Callable[[bytes], bytes]:
    """One string of a dictionary in every row."""
    text = b"a" * length
    pages = [
        page(length.to_bytes(4, "little") + text, 1, 0, dictionary=True),
        page(b"\x01" + runs((num_rows, 0)), num_rows, 8),
    ]
    return with_pages(name, pages, num_rows, length + 200)


def of_so_many_rows(data: bytes, num_rows: int) -> bytes:
    body, footer = parts(data)
    put(footer, 3, I64, num_rows)
    put(footer.structs(4)[0], 3, I64, num_rows)
    return assembled(body, footer)


@pytest.mark.parametrize("name", ["sample_id", "source"])
def test_a_dictionary_of_one_long_string_for_many_rows_is_refused(name: str, copy: Path):
    """60 kB on disk that decode to 30 GB."""
    num_rows = 1 << 19

    def change(data: bytes) -> bytes:
        other = "sample_id" if name == "source" else "source"
        return of_so_many_rows(long_strings(other, 3, num_rows)(long_strings(name, 60_000, num_rows)(data)), num_rows)

    rewrite_shard(copy, change, rows=num_rows)
    told = outcome(LogitDataset.open(copy).sample_ids)
    assert told.startswith("DamagedShardError: ")
    assert f"column {name}: strings of {60_000 * num_rows} bytes" in told


def test_many_rows_of_few_names_are_read(tmp_path: Path):
    """The check of the one before lets true datasets through: a thousand long sources in a dictionary."""
    names = [f"{n:05d}" + "x" * 9000 for n in range(60)]
    rows = made_rows(1, 60)
    for row, name in zip(rows * 2, names * 2, strict=False):
        object.__setattr__(row, "source", name)
    folder = write_dataset(tmp_path / "set", [rows])
    assert both_ways(folder) == [FINE] * 2


def strings(*values: bytes) -> Callable[[bytes], bytes]:
    payload = b"".join(len(value).to_bytes(4, "little") + value for value in values)
    return with_pages("sample_id", [page(payload, len(values), 0)], len(values), len(payload) + 200)


@pytest.mark.parametrize("name", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"a" * 1_000_000])
def test_sample_ids_that_are_no_text_or_a_book_are_refused(name: bytes, copy: Path):
    rewrite_shard(copy, strings(b"a", name, b"c"))
    rows, names = both_ways(copy)
    assert rows.startswith("DamagedShardError: ")
    assert "column sample_id holds" in rows
    assert names.startswith("DamagedShardError: ") == (len(name) < 9)


@pytest.mark.parametrize("name", [b"", b"a\nb", b"\x1b[31m", b"\0", "\u202e".encode()])
def test_other_sample_ids_are_what_they_are(name: bytes, copy: Path):
    rewrite_shard(copy, strings(b"a", name, b"c"))
    assert both_ways(copy) == [FINE, FINE]
    assert [row.sample_id for row in LogitDataset.open(copy).read_shard(0)] == ["a", name.decode(), "c"]


def test_strings_of_other_lengths_than_their_page_are_refused(copy: Path):
    payload = (1 << 30).to_bytes(4, "little") + b"abc"
    rewrite_shard(copy, with_pages("sample_id", [page(payload * 3, 3, 0)], 3, 200))
    assert all(told.startswith("DamagedShardError: ") for told in both_ways(copy))


def test_a_count_that_is_off_by_one_in_a_million_is_refused(tmp_path: Path):
    (row,) = made_rows(3, 1)
    ids = np.concatenate([row.input_ids_L, np.zeros(1_200_000, np.int32)])
    long = replace(row, input_ids_L=ids, label_mask_L=np.concatenate([row.label_mask_L, np.zeros(1_200_000, bool)]))
    folder = write_dataset(tmp_path / "set", [[long]])
    assert outcome(lambda: LogitDataset.open(folder).read_shard(0)) == FINE
    edit_manifest(folder, lambda m: m["shards"][0].update(longest_row=len(ids) + 1))
    refused(folder, f"the manifest says longest_row {len(ids) + 1}, the file holds {len(ids)}")


def test_a_string_of_delta_byte_arrays_is_refused(copy: Path):
    """There each string may repeat the whole of the one before, at no cost on disk."""
    rewrite_shard(copy, with_pages("source", [page(b"", 3, 7)], 3, 100))
    refused(copy, "column source", "encoding 7")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: put(f, 3, I64, 1 << 40), "1099511627776 rows in row groups of [3]"),
        (lambda f: put(f.structs(4)[0], 3, I64, -3), "rows in row groups of [-3]"),
        (lambda f: put(column(f, "entropy"), 5, I64, -1), "column entropy"),
        (lambda f: put(column(f, "entropy"), 7, I64, 1 << 40), "but pages end at"),
        (lambda f: put(column(f, "entropy"), 9, I64, 1 << 62), "but pages end at"),
        (lambda f: put(column(f, "entropy"), 9, I64, -5), "but pages end at"),
        (lambda f: put(column(f, "entropy"), 4, I32, 99), "row group 0"),
        (lambda f: put(column(f, "entropy"), 1, I32, 2), "is of type 2"),
        (lambda f: put(column(f, "entropy"), 9, I32, 4), "field 9 is of type 5, expected 6"),
        (lambda f: put(column(f, "entropy"), 3, LIST, (BINARY, [b"kept_ids"])), "named kept_ids"),
        (lambda f: put(column(f, "entropy"), 3, LIST, (BINARY, [b"\xff"])), "is not UTF-8"),
        (lambda f: put(f.structs(4)[0].structs(1)[0], 1, BINARY, b"/etc/passwd"), "lies in another file"),
        (lambda f: put(f.structs(4)[0].structs(1)[0], 8, STRUCT, struct()), "is encrypted"),
        (lambda f: put(f, 8, STRUCT, struct()), "encrypted or signed"),
        (lambda f: f.structs(4)[0].structs(1).pop(), "columns expected, got"),
        (lambda f: f.structs(4).append(f.structs(4)[0]), "rows in row groups of [3, 3]"),
        (lambda f: f.structs(4).clear(), "rows in row groups of []"),
        (lambda f: (f.structs(4).clear(), put(f, 3, I64, 0)), "the manifest has 3 values of rows, the file 0"),
        (lambda f: f.fields.pop(4), "field 4 is missing"),
    ],
)
def test_a_footer_of_other_numbers_is_refused(change: Callable[[Struct], Any], words: str, copy: Path):
    rewrite_shard(copy, with_footer(change))
    refused(copy, words)


def test_column_chunks_that_share_their_pages_are_refused(copy: Path):
    def change(footer: Struct) -> None:
        footer.structs(4).append(footer.structs(4)[0])
        put(footer, 3, I64, 6)

    manifest = LogitDataset.open(copy).manifest
    doubled = {name: 2 * manifest.total(name) for name in ("rows", "tokens", "positions", "kept")}
    rewrite_shard(copy, with_footer(change), **doubled)
    refused(copy, "column chunks overlap")


def test_histograms_of_another_length_do_not_end_the_process(copy: Path):
    """Parquet's C++ raises where nothing can catch it, and the process aborts."""

    def change(footer: Struct) -> None:
        put(column(footer, "kept_ids"), 16, STRUCT, struct(i2=(LIST, (I64, [1] * 9))))

    rewrite_shard(copy, with_footer(change))
    refused(copy, "histogram")


def deep_schema(footer: Struct) -> None:
    group = struct(i3=(I32, 0), i4=(BINARY, b"a"), i5=(I32, 1))
    footer.structs(2)[1:] = [group] * 10_000


def test_a_schema_of_ten_thousand_levels_is_refused(copy: Path):
    rewrite_shard(copy, with_footer(deep_schema))
    assert all(told.startswith("DamagedShardError: ") for told in both_ways(copy))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: b"", "does not begin with PAR1"),
        (lambda d: b"PAR1" * 3, "not readable as Parquet"),
        (lambda d: b"\0" * 100, "does not begin with PAR1"),
        (lambda d: d[:-4] + b"PARE", "the footer is encrypted"),
        (lambda d: d[:-4] + b"\0\0\0\0", "does not end with PAR1"),
        (lambda d: d[:-8] + b"\xff\xff\xff\xff" + b"PAR1", "a footer of 4294967295 in a file of"),
        (lambda d: d[:-8] + b"\0\0\0\0" + b"PAR1", "it ends too early"),
        (lambda d: assembled(b"PAR1", bytes((1 << 24) + 1)), "a footer of 16777217 in a file of"),
        (lambda d: assembled(parts(d)[0], encode(parts(d)[1]) + b"\0"), "1 bytes too many"),
        (lambda d: assembled(b"PAR1", b"\x1c" * 1000), "nested deeper"),
        (lambda d: assembled(b"PAR1", b"\x19\xfc\xff\xff\xff\x7f"), "a list of"),
        (lambda d: assembled(b"PAR1", b"\x18\xff\xff\xff\xff\x7f"), "it ends too early"),
        (lambda d: assembled(b"PAR1", b"\x16" + b"\xff" * 12), "more than 64 bits"),
        (lambda d: assembled(b"PAR1", b"\x15\xff\xff\xff\xff\xff\x01\0"), "more than 32 bits"),
        (lambda d: assembled(b"PAR1", b"\x15\x02\x05\x02\x02\0"), "field 1 comes twice"),
        (lambda d: assembled(b"PAR1", b"\x1b\0\0"), "unknown type 11"),
        (lambda d: b"PAR1" + b"\x19\xf9" * 20_000 + (40_000).to_bytes(4, "little") + b"PAR1", "nested deeper"),
    ],
)
def test_a_footer_that_is_none_is_refused(change: Callable[[bytes], bytes], words: str, copy: Path):
    rewrite_shard(copy, change)
    refused(copy, words)


def table_of(copy: Path) -> pa.Table:
    return pq.read_table(copy / "data/part-00000.parquet")


def retyped(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.column_names.index(name), pa.field(name, kind, nullable=False), t[name].cast(kind))


def list_of(kind: pa.DataType, nullable: bool = False) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=nullable))


@pytest.mark.parametrize(
    "change",
    [
        retyped("input_ids", list_of(pa.int64())),
        retyped("input_ids", list_of(pa.int32(), nullable=True)),
        retyped("input_ids", list_of(pa.uint32())),
        retyped("input_ids", list_of(pa.date32())),
        retyped("entropy", list_of(pa.float64())),
        retyped("entropy", list_of(pa.float16())),
        retyped("label_mask", list_of(pa.int8())),
        retyped("kept_ids", list_of(list_of(pa.decimal128(20)))),
        retyped("sample_id", pa.binary()),
        lambda t: t.append_column("extra", t["entropy"]),
        lambda t: t.append_column("sample_id", t["entropy"]),
        lambda t: t.append_column("sample_id.x", t["entropy"]),
        lambda t: t.drop_columns(["storage_loss"]),
        lambda t: t.rename_columns(["x" if name == "entropy" else name for name in t.column_names]),
        lambda t: t.select(t.column_names[::-1]),
        lambda t: t.set_column(0, pa.field("sample_id", pa.string(), nullable=True), t["sample_id"]),
    ],
)
def test_other_columns_are_refused(change: Callable[[pa.Table], pa.Table], copy: Path):
    path = copy / "data/part-00000.parquet"
    pq.write_table(change(table_of(copy)), path, compression="zstd", write_page_checksum=True, store_schema=False)
    reseal(copy)
    refused(copy, "expected the columns")
    (fault,) = verify(LogitDataset.open(copy), deep=False).faults
    assert "expected the columns" in fault


@pytest.mark.parametrize("name", ["sample_id", "sample_id.x", "source"])
def test_names_of_columns_that_come_again_are_refused(name: str, copy: Path):
    """Parquet would read both where one is asked for."""
    table = table_of(copy)
    path = copy / "data/part-00000.parquet"
    pq.write_table(table.append_column(name, table["entropy"]), path, write_page_checksum=True, store_schema=False)
    reseal(copy)
    assert all("expected the columns" in told for told in both_ways(copy))


def test_pages_without_checksums_are_refused(copy: Path):
    pq.write_table(table_of(copy), copy / "data/part-00000.parquet", store_schema=False)
    reseal(copy)
    refused(copy, "row group 0, column sample_id: field 4 is missing")


def test_other_writers_are_welcome(copy: Path):
    """Snappy, small pages, statistics, an index: what is written by the format may be written in other ways."""
    table = table_of(copy)
    for options in (
        {"compression": "snappy", "data_page_size": 64, "write_page_index": True, "write_statistics": True},
        {"compression": "none", "use_dictionary": False, "column_encoding": {leaf("input_ids"): "DELTA_BINARY_PACKED"}},
        {"compression": "gzip", "row_group_size": 1, "use_dictionary": True},
    ):
        options = {"store_schema": False, "write_page_checksum": True} | options
        pq.write_table(table, copy / "data/part-00000.parquet", **options)
        reseal(copy)
        assert both_ways(copy) == [FINE] * 2


def test_numbers_of_ten_rows_come_in_the_message(copy: Path):
    def change(data: bytes) -> bytes:
        table = pq.read_table(pa.BufferReader(data))
        values = table["kept_ids"].to_pylist()
        values[1][0][0] = 5000
        index = table.column_names.index("kept_ids")
        table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=1, write_page_checksum=True, store_schema=False)
        return sink.getvalue().to_pybytes()

    rewrite_shard(copy, change)
    refused(copy, "row group 1: does not hold: kept_ids lie in [0, ", "got 5000 (value 0)")
    with pytest.raises(DamagedShardError):
        list(LogitDataset.open(copy).row_groups(0))
    assert np.all(np.asarray(LogitDataset.open(copy).sample_ids()[0]) != "")
