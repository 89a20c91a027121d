"""Rows to the bytes of a shard.

A shard is encoded to memory, decoded again and compared with what went in before it touches the disk, so what the
manifest says was lost is what a reader gets.

Ids are sorted within a position and byte-stream split: zstd finds the same run of ids in many positions, which it
would not in the order of their probabilities.  Pages are as large as row groups, so that it looks far back.
Log-probabilities and the other rounded numbers are few distinct values and go through dictionaries.

Time: 7 to 9 µs for a position of 64 entries on one core, most of it zstd and Parquet.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import ConfigError
from shared.manifest import MAX_SHARD_BYTES, Shard
from shared.parquet_headers import read_headers
from shared.rounding import round_positions
from shared.rows import LogitRow, Positions
from shared.schema import TEXT_COLUMNS, RowFormat, leaf, rows_to_table, table_to_rows
from shared.shard_reader import shard_sums, tables_of

ROW_GROUP_ENTRIES = 1 << 21
"""Kept entries of a row group, unless a single row has more: 16 MiB decoded."""
ROW_GROUP_TOKENS = 1 << 20
PAGE_BYTES = 1 << 26
ZSTD_LEVEL = 5
"""At 9 a dataset is 4 % smaller and takes half as long again to write."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How values are stored."""

    max_kl: float
    """Mean loss that rounding may cause, in nats at T = 1; 0 rounds nothing."""
    zstd_level: int = ZSTD_LEVEL
    untouched_logp: float | None = None
    """A value that is not rounded."""


def encode_shard(
    rows: Sequence[LogitRow], row_format: RowFormat, storage: Storage, path: str
) -> tuple[pa.Buffer, Shard]:
    """The bytes of a shard and its entry in the manifest.  `path` is relative to the dataset.

    Raises:
        DamagedShardError: numbers that no reader would take.
    """
    exact = Positions.concatenate([row.teacher for row in rows])
    stored, loss_PT = round_positions(
        exact, row_format.temperatures, max_kl=storage.max_kl, untouched_logp=storage.untouched_logp
    )
    counts = np.asarray([row.num_positions for row in rows])
    loss_RT = np.add.reduceat(loss_PT, np.cumsum(counts) - counts)
    return write_table(rows_to_table(rows, stored, loss_RT, row_format), row_format, storage, path)


def write_table(table: pa.Table, row_format: RowFormat, storage: Storage, path: str) -> tuple[pa.Buffer, Shard]:
    """The bytes of a table of rows as they are, checked by reading them back, and the shard's entry in the manifest."""
    sink = pa.BufferOutputStream()
    values = [leaf(name) for name in ("kept_logprobs", *row_format.position_columns)]
    dictionary = [leaf("source"), leaf("input_ids")] + (values if storage.max_kl else [])
    split = [leaf("kept_ids")] + ([] if storage.max_kl else values)
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=dict.fromkeys(map(leaf, table.column_names), storage.zstd_level)
        | dict.fromkeys(values, max(1, storage.zstd_level - 2)),  # which are little more than entropy coded
        use_dictionary=dictionary,  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        data_page_size=PAGE_BYTES,
        write_batch_size=1 << 14,
        write_page_checksum=True,
        write_statistics=False,
        store_schema=False,
    ) as writer:
        for begin, end in _row_groups(table):
            writer.write_table(table.slice(begin, end - begin), row_group_size=end - begin)
    data = sink.getvalue()
    metadata = pq.read_metadata(pa.BufferReader(data))
    if data.size > MAX_SHARD_BYTES:
        raise ConfigError(
            f"{path}: {data.size} bytes, a shard has at most {MAX_SHARD_BYTES}", next_step="lower unit_records"
        )
    read_headers(pa.BufferReader(data), row_format.schema(), path)  # does it keep within what readers allow?
    decoded = pa.concat_tables(tables_of(data, path))
    assert decoded.equals(table), f"{path}: Parquet did not give back what was written"
    rows = table_to_rows(decoded, row_format, path)
    shard = Shard(
        path=path,
        sha256=hashlib.sha256(memoryview(data)).hexdigest(),
        size_bytes=data.size,
        teacher_bytes=_teacher_bytes(metadata),
        **shard_sums(decoded, rows, row_format, path),
    )
    return data, shard


def _row_groups(table: pa.Table) -> Iterator[tuple[int, int]]:
    """Runs of rows that stay within the limits of a row group; a larger row is alone in one."""
    columns: Any = {name: table[name].combine_chunks() for name in ("input_ids", "kept_ids")}
    tokens_R = np.diff(columns["input_ids"].offsets.to_numpy())
    entry_ends = columns["kept_ids"].flatten().offsets.to_numpy()
    entries_R = np.diff(entry_ends[columns["kept_ids"].offsets.to_numpy()])
    begin = tokens = entries = 0
    for row in range(table.num_rows):
        tokens, entries = tokens + int(tokens_R[row]), entries + int(entries_R[row])
        if row > begin and (tokens > ROW_GROUP_TOKENS or entries > ROW_GROUP_ENTRIES):
            yield begin, row
            begin, tokens, entries = row, int(tokens_R[row]), int(entries_R[row])
    yield begin, table.num_rows


def _teacher_bytes(metadata: pq.FileMetaData) -> int:
    """Compressed column chunks of what the teacher said, levels and page headers included."""
    chunks = (
        metadata.row_group(g).column(c) for g in range(metadata.num_row_groups) for c in range(metadata.num_columns)
    )
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] not in TEXT_COLUMNS)
