"""One content in every form of file gives the same records, and a bad one among them costs no other."""

import gzip
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from shared.errors import ConfigError, DamagedDataError, LogitferryError, RecordError
from shared.raw_records import COLUMNAR_BATCH_ROWS, ZSTD_BLOCK_BYTES, BadRecord, RawRecord, raw_records
from shared.text_files import find_text_files

COLUMNS = ("id", "messages", "text", "tools")
RECORDS = [
    {"id": "one", "messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]},
    {"id": "two", "messages": [{"role": "user", "content": "hé\n 🦊"}]},
    {"id": "three", "messages": [{"role": "system", "content": ""}, {"role": "user", "content": '"\\u0041'}]},
]
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"

datasets.disable_progress_bars()


def lines(*records: Any) -> bytes:
    """Bytes stand for themselves."""
    return b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in records)


def read(path: object, columns: Collection[str] = COLUMNS) -> list[RawRecord | BadRecord]:
    [file] = find_text_files([str(path)])
    return list(raw_records(file, columns))


def fields(path: object, columns: Collection[str] = COLUMNS) -> list[dict[str, Any]]:
    """All records; the first bad one is raised."""
    records = read(path, columns)
    for record in records:
        if isinstance(record, BadRecord):
            raise record.error
    return [record.fields for record in records]


def refusal(path: object, kind: type[LogitferryError], columns: Collection[str] = COLUMNS) -> str:
    with pytest.raises(kind) as caught:
        read(path, columns)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def told(record: RawRecord | BadRecord) -> str:
    """What a record's line is about: its text, or what is wrong with it."""
    return record.fields["text"] if isinstance(record, RawRecord) else str(record.error)


def zst(data: bytes, **settings: Any) -> bytes:
    return zstandard.ZstdCompressor(**settings).compress(data)


def frames(data: bytes) -> bytes:
    """Several frames, cut in the middle of lines."""
    return b"".join(zst(data[begin : begin + 50]) for begin in range(0, len(data), 50))


def without_checksum(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(write_checksum=False, write_content_size=False).compressobj()
    return compressor.compress(data) + compressor.flush()


def save_dataset(path: Path, records: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(records).save_to_disk(path)


def save_selection(path: Path, records: list[dict[str, Any]]) -> None:
    """A dataset of which other rows were left out, and whose order is another than that of its file."""
    stored = [records[-1], {"id": "left out", "messages": []}, *records[:-1]]
    order = [*range(2, len(stored)), 0]
    datasets.Dataset.from_list(stored).select(order).save_to_disk(path)


WRITERS = {
    "a.jsonl": lambda path, records: path.write_bytes(lines(*records)),
    "a.ndjson": lambda path, records: path.write_bytes(lines(*records)[:-1]),
    "array.json": lambda path, records: path.write_text(json.dumps(records)),
    "pretty.json": lambda path, records: path.write_text(json.dumps(records, indent=2, ensure_ascii=False), "utf-8"),
    "lines.json": lambda path, records: path.write_bytes(lines(*records)),
    "crlf.jsonl": lambda path, records: path.write_bytes(lines(*records).replace(b"\n", b"\r\n")),
    "bom.jsonl": lambda path, records: path.write_bytes(b"\xef\xbb\xbf" + lines(*records)),
    "bom.json": lambda path, records: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records).encode()),
    "one.jsonl.zst": lambda path, records: path.write_bytes(zst(lines(*records))),
    "many.jsonl.zst": lambda path, records: path.write_bytes(frames(lines(*records))),
    "skip.jsonl.zst": lambda path, records: path.write_bytes(
        SKIPPABLE_FRAME + zst(lines(*records)) + SKIPPABLE_FRAME + zst(b"") + SKIPPABLE_FRAME
    ),
    "plain.jsonl.zst": lambda path, records: path.write_bytes(without_checksum(lines(*records))),
    "array.json.zst": lambda path, records: path.write_bytes(zst(json.dumps(records).encode())),
    "one.jsonl.gz": lambda path, records: path.write_bytes(gzip.compress(lines(*records))),
    "members.jsonl.gz": lambda path, records: path.write_bytes(b"".join(gzip.compress(lines(x)) for x in records)),
    "array.json.gz": lambda path, records: path.write_bytes(gzip.compress(json.dumps(records).encode())),
    "a.parquet": lambda path, records: pq.write_table(pa.Table.from_pylist(records), path),
    "groups.parquet": lambda path, records: pq.write_table(pa.Table.from_pylist(records), path, row_group_size=1),
    "saved": save_dataset,
    "selected": save_selection,
}


@pytest.mark.parametrize("name", WRITERS)
def test_raw_records_are_the_same_in_every_form_of_file(tmp_path, name):
    WRITERS[name](tmp_path / name, RECORDS)
    assert fields(tmp_path / name) == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "many.jsonl.zst", "one.jsonl.gz", "array.json", "a.parquet", "saved"])
def test_raw_records_of_a_long_file_come_in_order(tmp_path, name):
    records = [{"id": str(n), "text": "x" * (n % 7)} for n in range(2 * COLUMNAR_BATCH_ROWS + 1)]
    WRITERS[name](tmp_path / name, records)
    read_back = read(tmp_path / name)
    assert [record.fields for record in read_back] == records
    assert len({record.where for record in read_back}) == len(records)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_raw_records_of_a_shuffled_dataset_come_in_its_order(tmp_path, num_shards):
    shuffled = datasets.Dataset.from_dict({"text": [str(n) for n in range(500)]}).shuffle(seed=1)
    shuffled.save_to_disk(tmp_path / "saved", num_shards=num_shards)
    assert [record["text"] for record in fields(tmp_path / "saved")] == list(shuffled["text"])


def test_raw_records_of_a_dataset_ignore_the_format_that_it_was_saved_with(tmp_path):
    saved = datasets.Dataset.from_dict({"text": ["a", "b"], "other": [1, 2]}).with_format("numpy", columns=["other"])
    saved.save_to_disk(tmp_path / "saved")
    assert fields(tmp_path / "saved") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", [":1", ":2", ":3"]),
        ("many.jsonl.zst", [":1", ":2", ":3"]),
        ("one.jsonl.gz", [":1", ":2", ":3"]),
        ("pretty.json", ["[0]", "[1]", "[2]"]),
        ("groups.parquet", ["[0]", "[1]", "[2]"]),
        ("selected", ["[0]", "[1]", "[2]"]),
    ],
)
def test_raw_records_know_their_place(tmp_path, name, places):
    WRITERS[name](tmp_path / name, RECORDS)
    assert [record.where for record in read(tmp_path / name)] == [f"{tmp_path / name}{place}" for place in places]


def test_raw_records_of_zstd_frames_of_many_megabytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 1 << 62, 400).tolist()
    records = [{"text": " ".join(map(str, noise[n:])) * 40, "id": str(n)} for n in range(20)]
    data = lines(*records, {"text": "x" * 5_000_000})
    assert len(data) > 8_000_000
    random = np.random.default_rng(0).bytes(3 * ZSTD_BLOCK_BYTES).hex()
    path = put(tmp_path / "a.jsonl.zst", zst(data) + zst(lines({"text": random})) + zst(lines({"text": "last"})))
    assert path.stat().st_size > 3 * ZSTD_BLOCK_BYTES
    assert fields(path) == [*records, {"text": "x" * 5_000_000}, {"text": random}, {"text": "last"}]


@pytest.mark.parametrize("exponent", [27, 31])
def test_raw_records_of_zstd_frames_of_long_windows(tmp_path, exponent):
    """`zstd --long=31` needs no more memory to be read where there is little in the file."""
    text = lines({"text": "a"})
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (exponent - 10) << 3])
    path = put(tmp_path / "a.jsonl.zst", header + (1 | len(text) << 3).to_bytes(3, "little") + text)
    assert fields(path) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("byte", "name"), [(b"\xff", "a.jsonl"), (b"\xff", "a.jsonl.zst"), (b"\xed\xa0\xbe", "a.jsonl")]
)
def test_raw_records_around_a_line_of_broken_utf8_are_read(tmp_path, byte, name):
    data = lines({"text": "a"}, b'{"text": "' + byte + b'"}', {"text": "c"})
    path = put(tmp_path / name, zst(data) if name.endswith("zst") else data)
    first, bad, last = read(path)
    assert (told(first), told(last)) == ("a", "c")
    assert isinstance(bad, BadRecord)
    assert told(bad).startswith(f"{path}:2: not UTF-8: ")


def test_raw_records_around_a_parquet_string_of_broken_utf8_are_read(tmp_path):
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], dtype=np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfec")])
    before = pa.array(["x"] * COLUMNAR_BATCH_ROWS)
    pq.write_table(pa.table({"text": pa.chunked_array([before, texts])}), path := tmp_path / "a.parquet")
    records = read(path)
    assert [told(record) for record in records[-3::2]] == ["a", "c"]
    assert len(records) == COLUMNAR_BATCH_ROWS + 3
    assert isinstance(records[-2], BadRecord)
    assert told(records[-2]).startswith(f"{path}[{COLUMNAR_BATCH_ROWS + 1}]: cannot be read: ")


def test_raw_records_around_a_parquet_map_with_one_key_twice_are_read(tmp_path):
    maps = pa.array([[("a", 1)], [("a", 1), ("a", 2)], [("b", None)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["x", "y", "z"], "tools": maps}), path := tmp_path / "a.parquet")
    first, bad, last = read(path)
    assert first.fields == {"text": "x", "tools": {"a": 1}}
    assert isinstance(bad, BadRecord)
    assert last.fields == {"text": "z", "tools": {}}


def test_raw_records_around_a_parquet_date_out_of_range_are_read(tmp_path):
    dates = pa.array([0, 1 << 62, 0], pa.timestamp("us"))
    pq.write_table(pa.table({"text": ["x", "y", "z"], "id": dates}), path := tmp_path / "a.parquet")
    first, bad, last = read(path)
    assert (told(first), told(last)) == ("x", "z")
    assert isinstance(bad, BadRecord)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"[]", b" [ ]\n"])
def test_raw_records_refuse_a_file_without_any(tmp_path, name, data):
    packed = {"gz": gzip.compress, "zst": zst}.get(name.split(".")[-1], bytes)(data)
    message = refusal(put(tmp_path / name, packed), RecordError)
    assert "holds no records\n  next: take the file out of `files`, or fill it" in message


def test_raw_records_refuse_a_file_without_rows(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path := tmp_path / "a.parquet")
    assert "holds no records" in refusal(path, RecordError)


def test_raw_records_refuse_a_saved_dataset_without_rows(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).select([]).save_to_disk(tmp_path / "saved")
    assert "holds no records" in refusal(tmp_path / "saved", RecordError)


def test_raw_records_read_wanted_columns_alone(tmp_path):
    strange = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], dtype=np.int32).tobytes()), pa.py_buffer(b"\xff\xfe")]
    )
    dates = pa.array([1 << 62, 0], pa.timestamp("us"))
    table = pa.table({"image": strange, "text": ["a", "b"], "date": dates, "text.b": ["c", "d"], "id": [1, 2]})
    pq.write_table(table, path := tmp_path / "a.parquet")
    assert fields(path) == [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    assert fields(path, {"text.b"}) == [{"text.b": "c"}, {"text.b": "d"}]
    datasets.Dataset(table.select(["text", "date", "id"])).save_to_disk(tmp_path / "saved")
    assert fields(tmp_path / "saved") == [{"text": "a", "id": 1}, {"text": "b", "id": 2}]


def test_raw_records_of_unwanted_columns_are_not_even_read(tmp_path):
    table = pa.table({"text": ["a", "b"], "image": [b"x" * 1000, b"y" * 1000]})
    pq.write_table(table, path := tmp_path / "a.parquet", use_dictionary=False, compression="none")
    image = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data = bytearray(path.read_bytes())
    begin = image.data_page_offset
    data[begin : begin + image.total_compressed_size] = bytes(image.total_compressed_size)
    assert fields(put(path, bytes(data))) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_raw_records_name_the_columns_where_none_is_known(tmp_path, name):
    WRITERS[name](tmp_path / name, [{"chat": "a", "meta": 1}])
    message = refusal(tmp_path / name, ConfigError)
    assert "has no column that is a record's; it has 'chat', 'meta'" in message
    assert "next: name the columns as data.prompt_field" in message


def test_raw_records_in_columns_lose_the_keys_that_others_have(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    records = [{"messages": turns, "id": None}, {"messages": [{"role": "user", "content": "b"}], "text": "c"}]
    pq.write_table(pa.Table.from_pylist(records, schema=None), path := tmp_path / "a.parquet")
    first, second = fields(path)
    del turns[1]["content"]
    assert first == {"messages": turns}
    assert second == {"messages": [{"role": "user", "content": "b"}]}, "the columns are those of the first record"


def test_raw_records_in_lines_keep_their_nulls(tmp_path):
    record = {"text": None, "messages": [{"content": None}]}
    assert fields(put(tmp_path / "a.jsonl", lines(record))) == [record]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_raw_records_take_every_kind_of_string_column(tmp_path, kind):
    texts = pa.array(["a", "b", "a"]).cast(kind)
    pq.write_table(pa.table({"text": texts}), path := tmp_path / "a.parquet")
    assert [record["text"] for record in fields(path)] == ["a", "b", "a"]


def test_raw_records_skip_blank_lines_but_count_them(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(b"", {"text": "a"}, b"  \t", b"\r", {"text": "b"}, b""))
    assert [(record.where, told(record)) for record in read(path)] == [(f"{path}:2", "a"), (f"{path}:5", "b")]


def test_raw_records_end_at_newlines_alone(tmp_path):
    texts = ["a\u2028b\u0085c", "d\x0be\x0cf"]
    data = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    assert [record["text"] for record in fields(put(tmp_path / "a.jsonl", data.encode()))] == texts


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"}{"text": "b"}', "not JSON"),
        (b"\0\0\0", "not JSON"),
        (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'"text"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"NaN", "not JSON: NaN is no JSON"),
        (b'{"text": "a", "text": "b"}', "key 'text' stands twice in one object"),
        (b'{"text": "\\ud83e"}', "holds half a surrogate pair"),
        (b'{"text": "a", "other": [{"x": "\\udd8a\\ud83e"}]}', "holds half a surrogate pair"),
        (b'{"\\ud83e": 1}', "holds half a surrogate pair"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_raw_records_around_a_bad_line_are_read(tmp_path, line, complaint):
    path = put(tmp_path / "a.jsonl", lines({"text": "a"}, line, {"text": "\U0001f98a"}))
    first, bad, last = read(path)
    assert (told(first), told(last)) == ("a", "🦊")
    assert isinstance(bad, BadRecord)
    assert told(bad).startswith(f"{path}:2: ")
    assert complaint in told(bad)


def test_raw_records_around_a_bad_first_line_are_read(tmp_path):
    bad, good = read(put(tmp_path / "a.jsonl", lines(b"{", {"text": "a"})))
    assert isinstance(bad, BadRecord)
    assert told(good) == "a"


def test_raw_records_of_any_nesting_are_read_or_bad(tmp_path):
    for depth in range(850, 1000):
        nested = b"[" * depth + b"]" * depth
        read(put(tmp_path / "a.jsonl", lines(b'{"text": "\\u0061", "other": ' + nested + b"}")))


def test_raw_records_around_a_bad_one_in_an_array_are_read(tmp_path):
    path = put(tmp_path / "a.json", b'[{"text": "a"},\n 5,\n {"text": "\\ud83e"}, null, {"text": "b"}]')
    first, number, half, null, last = read(path)
    assert (told(first), told(last)) == ("a", "b")
    assert told(number) == f"{path}[1]: expected a JSON object, got int"
    assert told(half).startswith(f"{path}[2]: holds half a surrogate pair")
    assert told(null) == f"{path}[3]: expected a JSON object, got NoneType"


@pytest.mark.parametrize(
    "data",
    [
        b"[",
        b'[{"text": "a"},',
        b'[{"text": "a"}',
        b'[{"text": "a"}]\n{"text": "b"}',
        b'[{"text": "\xff"}]',
        b"[" * 100_000,
        b'[{"id": ' + b"9" * 5000 + b"}]",
    ],
)
def test_raw_records_of_a_broken_array_are_damaged(tmp_path, data):
    assert "begins like a JSON array, but is none" in refusal(put(tmp_path / "a.json", data), DamagedDataError)


@pytest.mark.parametrize("data", [b'[{"text": "\xed\xa0\xbe"}]', '[{"text": "\\ud83e"}]'.encode("utf-16-le")])
def test_raw_records_of_an_array_hold_no_half_surrogates(tmp_path, data):
    try:
        records = read(put(tmp_path / "a.json", data))
    except DamagedDataError:
        return
    assert all(isinstance(record, BadRecord) for record in records)


@pytest.mark.parametrize("before", [b"\n", b" \r\n\n", b"\xef\xbb\xbf\n"])
def test_raw_records_of_an_array_behind_blank_lines_are_read(tmp_path, before):
    path = put(tmp_path / "a.json", before + b'[{"text": "a"},\n{"text": "b"}]\n')
    assert fields(path) == [{"text": "a"}, {"text": "b"}]
