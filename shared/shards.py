"""Shards: rows to one Parquet file in memory, and a file's bytes back to rows, verified.

A shard is encoded to memory, decoded again and compared with what went in before it touches the disk; so what
the manifest says was lost is measured, not promised.  Reading hashes the very bytes that are then parsed, and
checks Parquet's page checksums as well: neither alone catches every flipped bit.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DamagedDataError
from shared.manifest import Shard
from shared.rows import Float32, LogitRow, Positions
from shared.schema import rows_to_table, table_to_rows, tail_column

ZSTD_LEVEL = 9
ROW_GROUP_POSITIONS = 1 << 15
TEXT_COLUMNS = ("sample_id", "input_ids", "label_mask")
REPAIR = "copy the file again from where the dataset came from, then logit-shards verify {}"


def encode_shard(
    rows: Sequence[LogitRow], temperatures: Sequence[float], vocab_size: int, path: str
) -> tuple[pa.Buffer, Shard]:
    """The bytes of a shard and its entry in the manifest.  `path` is relative to the dataset."""
    table = rows_to_table(rows, temperatures)
    per_position = ["realised_logprob", "entropy", *map(tail_column, temperatures)]
    nested = [f"{name}.list.element.list.element" for name in ("kept_ids", "kept_logprobs")]
    sink = pa.BufferOutputStream()
    num_positions = sum(row.num_positions for row in rows)
    pq.write_table(
        table,
        sink,
        row_group_size=max(1, len(rows) * ROW_GROUP_POSITIONS // max(ROW_GROUP_POSITIONS, num_positions)),
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=["input_ids.list.element"],  # pyright: ignore[reportArgumentType]
        column_encoding=dict.fromkeys(
            [*nested, *(f"{name}.list.element" for name in per_position)], "BYTE_STREAM_SPLIT"
        ),
        write_page_checksum=True,
        write_statistics=False,
    )
    data = sink.getvalue()
    decoded = Positions.concatenate([row.teacher for row in decode_shard(data, temperatures, vocab_size, path)])
    exact = Positions.concatenate([row.teacher for row in rows])
    metadata = pq.read_metadata(pa.BufferReader(data))
    return data, Shard(
        path=path,
        sha256=sha256(data),
        size_bytes=data.size,
        teacher_bytes=_teacher_bytes(metadata),
        kl_nats=float(storage_kl(exact, decoded).sum()),
        **shard_sums(rows),
    )


def shard_sums(rows: Sequence[LogitRow]) -> dict[str, Any]:
    """The manifest's sums over a shard that follow from its rows."""
    return {
        "rows": len(rows),
        "tokens": sum(row.num_tokens for row in rows),
        "longest_row": max((row.num_tokens for row in rows), default=0),
        "positions": sum(row.num_positions for row in rows),
        "kept": sum(len(row.teacher.kept_ids_E) for row in rows),
        "kept_mass": float(sum(np.exp(row.teacher.kept_logp_E, dtype=np.float64).sum() for row in rows)),
    }


def read_shard(folder: Path, shard: Shard, temperatures: Sequence[float], vocab_size: int) -> list[LogitRow]:
    """All rows of a shard, after its digest, its page checksums and its values have been checked.

    Raises:
        DamagedDataError: anything is not as it was written; says which shard and what.
    """
    path = folder / shard.path
    try:
        size_bytes = path.stat().st_size
        is_ours = size_bytes == shard.size_bytes and path.resolve().is_relative_to(folder.resolve())
        data = pa.py_buffer(path.read_bytes() if is_ours else b"")
    except OSError as error:
        raise DamagedDataError(f"{path}: cannot be read: {error}", next_step=REPAIR.format(folder)) from None
    if not is_ours:
        raise DamagedDataError(
            f"{path}: damaged: expected {shard.size_bytes} bytes inside the dataset, got {size_bytes}",
            next_step=REPAIR.format(folder),
        )
    if sha256(data) != shard.sha256:
        raise DamagedDataError(
            f"{path}: damaged: expected sha256 {shard.sha256[:16]}…, got {sha256(data)[:16]}…",
            next_step=REPAIR.format(folder),
        )
    rows = decode_shard(data, temperatures, vocab_size, str(path))
    for name, value in shard_sums(rows).items():
        if not np.isclose(value, getattr(shard, name), rtol=1e-9):
            raise DamagedDataError(f"{path}: the manifest says {name} {getattr(shard, name)}, the file holds {value}")
    return rows


def read_sample_ids(folder: Path, shard: Shard) -> list[str]:
    """The sample ids of a shard, from that column alone, its page checksums checked.

    Raises:
        DamagedDataError: the file is missing or the column cannot be read.
    """
    path = folder / shard.path
    try:
        table = pq.read_table(path, columns=["sample_id"], page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DamagedDataError(f"{path}: cannot be read: {error}", next_step=REPAIR.format(folder)) from None
    if table.num_rows != shard.rows:
        raise DamagedDataError(f"{path}: the manifest says {shard.rows} rows, the file holds {table.num_rows}")
    return table["sample_id"].to_pylist()


def decode_shard(data: pa.Buffer, temperatures: Sequence[float], vocab_size: int, where: str) -> list[LogitRow]:
    """Bytes of a shard to rows, page checksums and values checked."""
    try:
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, pa.ArrowException) as error:
        raise DamagedDataError(f"{where}: not readable as Parquet: {error}") from None
    return table_to_rows(table, temperatures, vocab_size, where)


def sha256(data: pa.Buffer) -> str:
    return hashlib.sha256(memoryview(data)).hexdigest()


def storage_kl(exact: Positions, stored: Positions) -> Float32:
    """KL(exact ‖ stored) in nats per position over kept ids and tail, both normalised, T = 1."""
    log_p_E, log_p_tail_P = _normalised(exact)
    log_q_E, log_q_tail_P = _normalised(stored)
    terms_E = np.exp(log_p_E) * (log_p_E - log_q_E)
    with np.errstate(invalid="ignore"):  # an empty tail: exp(−inf) · (−inf + inf)
        tail_P = np.where(np.isneginf(log_p_tail_P), 0.0, np.exp(log_p_tail_P) * (log_p_tail_P - log_q_tail_P))
    return np.add.reduceat(terms_E, _starts(exact)) + tail_P if exact.num_positions else tail_P


def _normalised(positions: Positions) -> tuple[np.ndarray, np.ndarray]:
    """fp64 log-probabilities of kept ids and tail, which together sum to one."""
    kept_E = positions.kept_logp_E.astype(np.float64)
    tail_P = positions.tail_logsum_PT[:, 0].astype(np.float64)
    if not positions.num_positions:
        return kept_E, tail_P
    total_P = np.log(np.add.reduceat(np.exp(kept_E), _starts(positions)) + np.exp(tail_P))
    return kept_E - np.repeat(total_P, positions.kept_counts_P), tail_P - total_P


def _starts(positions: Positions) -> np.ndarray:
    return np.cumsum(positions.kept_counts_P, dtype=np.int64) - positions.kept_counts_P


def _teacher_bytes(metadata: pq.FileMetaData) -> int:
    total = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema.split(".")[0] not in TEXT_COLUMNS:
                total += chunk.total_compressed_size
    return total
