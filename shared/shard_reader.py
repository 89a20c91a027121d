"""The bytes of a shard back to rows, one row group at a time, verified.

What is hashed are the very bytes that are then parsed.  Parquet's page checksums are checked as well: neither alone
catches every flipped bit.  Before anything is decoded the footer must agree with the manifest on every count, so that
a file that was made to be huge when opened is refused while it is small.

Memory: the file as it lies on disk, and one row group decoded.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import DamagedShardError
from shared.manifest import Shard
from shared.rows import LogitRow
from shared.schema import RowFormat, leaf, row_losses, table_to_rows, values_of, whole

REPAIR = "copy what is damaged again from where the dataset came from, or logit-shards repair {}"
MAX_ROW_GROUP_VALUES = 1 << 27
"""Of one column, e.g. kept ids: half a GiB decoded."""
MAX_STRING_BYTES = 1 << 16
"""Of a sample id, on average over a row group."""
MAX_FOOTER_VALUES = 1 << 20
"""Elements of a list in the footer, e.g. row groups."""
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # ValueError: a string that is not UTF-8


def read_row_groups(folder: Path, shard: Shard, row_format: RowFormat) -> Iterator[list[LogitRow]]:
    """The rows of a shard, one row group after the other; the first comes after the whole file has been hashed.

    Raises:
        DamagedShardError: anything is not as it was written; says which shard, row group and column.
    """
    where = str(folder / shard.path)
    sums: dict[str, Any] = {}
    for table in read_tables(folder, shard, row_format):
        rows = table_to_rows(table, row_format, where)
        sums = _added(sums, shard_sums(table, rows, row_format, where))
        yield rows
    for name, value in sums.items():
        if not np.allclose(value, getattr(shard, name), rtol=1e-6):
            raise DamagedShardError(f"{where}: the manifest says {name} {getattr(shard, name)}, the file holds {value}")


def read_tables(folder: Path, shard: Shard, row_format: RowFormat) -> Iterator[pa.Table]:
    """The same as Arrow tables, whose values are not checked yet."""
    yield from tables_of(checked_bytes(folder, shard, row_format), str(folder / shard.path))


def check_shard(folder: Path, shard: Shard, row_format: RowFormat) -> list[str]:
    """The digest of a shard and the counts in its footer, without its values.  Returns its sample ids.

    Raises:
        DamagedShardError: it is not what was written.
    """
    checked_bytes(folder, shard, row_format)
    return read_names(folder, shard)["sample_id"].to_pylist()


def read_names(folder: Path, shard: Shard) -> pa.Table:
    """Sample ids and sources of a shard's rows, from these columns alone, their page checksums checked.

    Raises:
        DamagedShardError: the file is missing or the column cannot be read.
    """
    path = folder / shard.path
    try:
        with open_parquet(path, str(path)) as file:
            if file.metadata.num_rows != shard.rows:
                raise DamagedShardError(
                    f"{path}: the manifest says {shard.rows} rows, the file holds {file.metadata.num_rows}",
                    next_step=REPAIR.format(folder),
                )
            table = file.read(columns=["sample_id", "source"])
            table.validate(full=True)  # are they UTF-8?
            return table
    except DamagedShardError:
        raise
    except UNREADABLE as error:
        raise DamagedShardError(f"{path}: cannot be read: {error}", next_step=REPAIR.format(folder)) from None


def tables_of(data: pa.Buffer, where: str) -> Iterator[pa.Table]:
    """Every row group of a shard's bytes, page checksums checked."""
    with open_parquet(data, where) as file:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group)
            except UNREADABLE as error:
                raise DamagedShardError(f"{where}: row group {group}: {_first_line(error)}") from None
            yield table


def open_parquet(source: Path | pa.Buffer, where: str) -> pq.ParquetFile:
    """Raises DamagedShardError where there is no footer that can be parsed."""
    try:
        return pq.ParquetFile(
            pa.BufferReader(source) if isinstance(source, pa.Buffer) else source,
            page_checksum_verification=True,
            thrift_string_size_limit=1 << 20,
            thrift_container_size_limit=MAX_FOOTER_VALUES,
        )
    except UNREADABLE as error:
        raise DamagedShardError(f"{where}: not readable as Parquet: {_first_line(error)}") from None


def damaged_chunks(data: pa.Buffer, row_format: RowFormat) -> list[str]:
    """Which column chunks of a shard cannot be decoded, or decode to what no writer produces."""
    try:
        with open_parquet(data, "") as file:
            faults = []
            for group in range(file.num_row_groups):
                broken = [name for name in row_format.schema().names if not _decodes(file, group, name)]
                faults += [f"row group {group}, column {name}" for name in broken]
            return faults
    except DamagedShardError:
        return ["footer"]


def shard_sums(table: pa.Table, rows: Sequence[LogitRow], row_format: RowFormat, where: str) -> dict[str, Any]:
    """The manifest's sums over a shard that follow from its rows."""
    return {
        "rows": len(rows),
        "tokens": sum(row.num_tokens for row in rows),
        "longest_row": max((row.num_tokens for row in rows), default=0),
        "positions": sum(row.num_positions for row in rows),
        "kept": sum(len(row.teacher.kept_ids_E) for row in rows),
        "kept_mass": float(np.exp(values_of(whole(table["kept_logprobs"]))).sum(dtype=np.float64)),
        "loss_nats": row_losses(table, row_format, where).sum(axis=0, dtype=np.float64),
    }


def _added(sums: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if not sums:
        return more
    return {name: max(sums[name], more[name]) if name == "longest_row" else sums[name] + more[name] for name in more}


def checked_bytes(folder: Path, shard: Shard, row_format: RowFormat) -> pa.Buffer:
    """The bytes of the file, whose digest and footer are the manifest's."""
    data = _verified_bytes(folder, shard, row_format)
    with open_parquet(data, where := str(folder / shard.path)) as file:
        _check_footer(file, shard, row_format, where)
    return data


def _verified_bytes(folder: Path, shard: Shard, row_format: RowFormat) -> pa.Buffer:
    path, step = folder / shard.path, REPAIR.format(folder)
    try:
        is_inside = path.resolve().is_relative_to(folder.resolve())
        size_bytes = path.stat().st_size
        data = pa.py_buffer(path.read_bytes() if is_inside and size_bytes == shard.size_bytes else b"")
    except FileNotFoundError:
        raise DamagedShardError(f"{path}: is missing", next_step=step) from None
    except OSError as error:
        raise DamagedShardError(f"{path}: cannot be read: {error.strerror}", next_step=step) from None
    if not is_inside:
        raise DamagedShardError(f"{path}: is a link that leads outside the dataset", next_step=step)
    if size_bytes != shard.size_bytes:
        raise DamagedShardError(f"{path}: damaged: expected {shard.size_bytes} bytes, got {size_bytes}", next_step=step)
    got = hashlib.sha256(memoryview(data)).hexdigest()
    if got != shard.sha256:
        chunks = damaged_chunks(data, row_format) or ["no page: between the pages, or in the footer"]
        raise DamagedShardError(
            f"{path}: damaged: expected sha256 {shard.sha256[:16]}…, got {got[:16]}…; {'; '.join(chunks)}",
            next_step=step,
        )
    return data


def _check_footer(file: pq.ParquetFile, shard: Shard, row_format: RowFormat, where: str) -> None:
    """Raises DamagedShardError unless the counts are the manifest's and no column is larger than these allow."""
    if not file.schema_arrow.equals(expected := row_format.schema()):
        raise DamagedShardError(f"{where}: expected the columns\n{expected}\nbut got\n{file.schema_arrow}")
    metadata = file.metadata
    counted: Counter[str] = Counter(rows=metadata.num_rows)
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            bytes_per_value = MAX_STRING_BYTES if chunk.physical_type == "BYTE_ARRAY" else 16
            if chunk.num_values > MAX_ROW_GROUP_VALUES:
                raise DamagedShardError(
                    f"{where}: row group {group}, column {chunk.path_in_schema}: {chunk.num_values} values, "
                    f"at most {MAX_ROW_GROUP_VALUES} are allowed"
                )
            if chunk.total_uncompressed_size > bytes_per_value * chunk.num_values + (1 << 20):
                raise DamagedShardError(
                    f"{where}: row group {group}, column {chunk.path_in_schema}: {chunk.num_values} values "
                    f"would take {chunk.total_uncompressed_size} bytes decompressed"
                )
            counted[chunk.path_in_schema] += chunk.num_values
    of_tokens, of_kept = ("input_ids", "label_mask"), ("kept_ids", "kept_logprobs")
    wanted = dict.fromkeys(["rows", "sample_id", "source"], shard.rows) | {
        **{leaf(name): shard.tokens for name in of_tokens},
        **{leaf(name): shard.kept for name in of_kept},
        **{leaf(name): shard.positions for name in row_format.position_columns},
        leaf("storage_loss"): shard.rows * len(row_format.temperatures),
    }
    for name, count in wanted.items():
        if counted[name] != count:
            raise DamagedShardError(f"{where}: the manifest has {count} values of {name}, the file {counted[name]}")


def _decodes(file: pq.ParquetFile, group: int, name: str) -> bool:
    try:
        file.read_row_group(group, columns=[name]).validate(full=True)
    except UNREADABLE:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
