"""A file that is cut off or damaged, at any byte of it: refused, and never read as less in silence."""

import gzip
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import DamagedDataError, LogitferryError, RecordError
from tests.shared.test_raw_records import (
    RECORDS,
    SKIPPABLE_FRAME,
    fields,
    lines,
    put,
    read,
    refusal,
    without_checksum,
    zst,
)

datasets.disable_progress_bars()


@pytest.mark.parametrize(
    "pack", [zst, without_checksum, gzip.compress], ids=["zst", "zst_without_checksum_and_size", "gz"]
)
def test_raw_records_of_a_file_cut_off_anywhere_are_never_fewer_in_silence(tmp_path, pack):
    whole = pack(lines(*({"text": f"number {n} {n * 7919}"} for n in range(8))))
    name = "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    assert "holds no records" in refusal(put(tmp_path / name, b""), RecordError)
    for size in range(1, len(whole)):
        message = refusal(put(tmp_path / name, whole[:size]), DamagedDataError)
        assert "damaged, or cut off" in message, size
        assert "next: copy it again" in message
    assert len(fields(put(tmp_path / name, whole))) == 8


def test_raw_records_of_several_zstd_frames_cut_off_within_one_are_damaged(tmp_path):
    first, last = zst(lines({"text": "a"})), zst(lines({"text": "b"}))
    tail = SKIPPABLE_FRAME + last + SKIPPABLE_FRAME
    ends = {len(SKIPPABLE_FRAME), len(SKIPPABLE_FRAME) + len(last), len(tail)}
    for size in set(range(1, len(tail))) - ends:
        refusal(put(tmp_path / "a.jsonl.zst", first + tail[:size]), DamagedDataError)


@pytest.mark.parametrize("rest", [b"\n", b"garbage", b"\0" * 9, lines({"text": "b"})])
@pytest.mark.parametrize("pack", [zst, gzip.compress])
def test_raw_records_of_a_compressed_file_with_something_behind_it_are_damaged(tmp_path, pack, rest):
    if pack is gzip.compress and not rest.strip(b"\0"):
        pytest.skip("gzip allows zeros as padding")
    path = tmp_path / ("a.jsonl.zst" if pack is zst else "a.jsonl.gz")
    refusal(put(path, pack(lines({"text": "a"})) + rest), DamagedDataError)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_raw_records_of_a_file_that_is_not_what_its_name_says_are_damaged(tmp_path, name):
    refusal(put(tmp_path / name, lines(*RECORDS)), DamagedDataError)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_raw_records_of_a_compressed_file_with_a_flipped_bit_are_damaged(tmp_path, name):
    text = lines(*({"text": f"number {n} {n * 7919}"} for n in range(8)))
    whole = zst(text, write_checksum=True) if name.endswith("zst") else gzip.compress(text)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    refusal(put(tmp_path / name, bytes(flipped)), DamagedDataError)


def parquet_of(path: Path, **settings: Any) -> bytes:
    texts = pa.table({"text": [f"number {n}" for n in range(8)]})
    pq.write_table(texts, path, write_page_checksum=True, row_group_size=2, **settings)
    return path.read_bytes()


def test_raw_records_of_parquet_cut_off_anywhere_are_damaged(tmp_path):
    whole = parquet_of(path := tmp_path / "a.parquet")
    for size in range(0, len(whole), 3):
        refusal(put(path, whole[:size]), DamagedDataError)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_raw_records_of_a_parquet_page_with_a_flipped_byte_are_damaged(tmp_path, compression):
    whole = parquet_of(path := tmp_path / "a.parquet", compression=compression, use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    flipped = bytearray(whole)
    flipped[group.data_page_offset + group.total_compressed_size - 2] ^= 1
    refusal(put(path, bytes(flipped)), DamagedDataError)


def test_raw_records_of_parquet_with_any_flipped_bit_are_never_fewer_in_silence(tmp_path):
    whole = parquet_of(path := tmp_path / "a.parquet")
    pages_end = max(group_end(path, n) for n in range(4))
    fewer = []
    for place in range(4, pages_end):
        for bit in (1, 2):
            put(path, whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                num_read = len(read(path))
            except (LogitferryError, OSError):
                continue
            if num_read < 8:
                fewer.append((place, bit, num_read))
    assert not fewer


def group_end(path: Path, group: int) -> int:
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    return column.dictionary_page_offset + column.total_compressed_size


def damaged_dataset(root: Path, damage: str) -> None:
    datasets.Dataset.from_dict({"text": [str(n) for n in range(2500)]}).save_to_disk(root)
    [arrow] = root.glob("*.arrow")
    data = arrow.read_bytes()
    if damage == "no arrow file":
        arrow.unlink()
    elif damage == "no info":
        (root / "dataset_info.json").unlink()
    elif damage == "broken state":
        (root / "state.json").write_text("{")
    elif damage == "cut in half":
        arrow.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        arrow.write_bytes(b"")
    elif damage == "cut between batches":
        with pa.BufferReader(data) as source:
            pa.ipc.read_message(source), pa.ipc.read_message(source)
            arrow.write_bytes(data[: source.tell()])


@pytest.mark.parametrize("damage", ["broken state", "cut in half"])
def test_raw_records_of_a_damaged_dataset_are_damaged(tmp_path, damage):
    damaged_dataset(tmp_path / "saved", damage)
    refusal(tmp_path / "saved", DamagedDataError)


def test_raw_records_of_a_dataset_without_its_data_are_refused(tmp_path):
    damaged_dataset(tmp_path / "saved", "no arrow file")
    assert "holds no records" in refusal(tmp_path / "saved", RecordError)


def test_raw_records_of_an_emptied_dataset_are_damaged(tmp_path):
    damaged_dataset(tmp_path / "saved", "empty")
    refusal(tmp_path / "saved", DamagedDataError)


def test_raw_records_of_a_dataset_cut_off_between_batches_are_never_fewer_in_silence(tmp_path):
    damaged_dataset(tmp_path / "saved", "cut between batches")
    refusal(tmp_path / "saved", DamagedDataError)
