"""The bytes of a shard back to rows, one row group at a time, verified.

What is hashed are the very bytes that are then parsed.  Parquet's page checksums are checked as well: neither alone
catches every flipped bit.  Before anything is decoded all headers must agree with each other and with the manifest on
every count, so that a file that was made to be huge when opened is refused while it is small; see
`shared.parquet_headers`.

Memory: the file as it lies on disk, and one row group decoded.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.errors import DamagedShardError
from shared.files import why_no_file
from shared.manifest import Shard
from shared.parquet_headers import MAX_STRINGS_BYTES, Headers, read_headers
from shared.rows import LogitRow
from shared.schema import RowFormat, leaf, outlines_of, row_losses, table_to_rows, values_of, whole

REPAIR = "copy what is damaged again from where the dataset came from, or logit-shards repair {}"
NAMES = pa.schema([pa.field("sample_id", pa.string(), nullable=False), pa.field("source", pa.string(), nullable=False)])
"""The columns that each shard begins with."""
OUTLINE = ("sample_id", "source", "input_ids", "label_mask", "realised_logprob", "entropy")
"""All but what the teacher says of other tokens than the label."""
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
    with _next_step(folder):
        for group, table in enumerate(read_tables(folder, shard, row_format)):
            in_group = f"{where}: row group {group}"
            rows = table_to_rows(table, row_format, in_group)
            sums = _added(sums, shard_sums(table, rows, row_format, in_group))
            yield rows
        for name, value in sums.items():
            said = getattr(shard, name)
            if said != value if isinstance(value, int) else not np.allclose(value, said, rtol=1e-5):
                raise DamagedShardError(f"{where}: the manifest says {name} {said}, the file holds {value}")


def read_outlines(folder: Path, shard: Shard, row_format: RowFormat) -> list[LogitRow]:
    """The rows of a shard without kept ids and tails, which are most of what decoding costs.

    The whole file is hashed as ever.  Nothing is checked of columns that are not read.

    Raises:
        DamagedShardError: as for `read_row_groups`.
    """
    where = str(folder / shard.path)
    with _next_step(folder):
        data = checked_bytes(folder, shard, row_format)
        tables = enumerate(tables_of(data, where, OUTLINE))
        return [row for n, table in tables for row in outlines_of(table, row_format, f"{where}: row group {n}")]


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
    with _next_step(folder):
        _check_file(folder, shard)
        try:
            with pa.OSFile(str(path)) as source:
                return names_in(source, shard, str(path))
        except DamagedShardError:
            raise
        except UNREADABLE as error:
            raise DamagedShardError(f"{path}: cannot be read: {_first_line(error)}") from None


def names_in(source: pa.NativeFile, shard: Shard, where: str) -> pa.Table:
    """The same of an open file, of which only the footer, the headers and these columns are read.

    Raises:
        DamagedShardError: the columns cannot be read.
    """
    headers = read_headers(source, NAMES, where, is_whole=False)
    if headers.num_rows != shard.rows:
        raise DamagedShardError(f"{where}: the manifest says {shard.rows} rows, the file holds {headers.num_rows}")
    _check_strings(source, headers, where)
    try:
        with open_parquet(source, where) as file:
            table = file.read(columns=NAMES.names)
        table.validate(full=True)  # are they UTF-8?
    except UNREADABLE as error:
        raise DamagedShardError(f"{where}: cannot be read: {_first_line(error)}") from None
    return table


def tables_of(data: pa.Buffer, where: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Every row group of a shard's bytes, or some columns of it, page checksums checked."""
    with open_parquet(data, where) as file:
        for group in range(file.num_row_groups):
            try:
                table = file.read_row_group(group, columns=None if columns is None else list(columns))
            except UNREADABLE as error:
                raise DamagedShardError(f"{where}: row group {group}: {_first_line(error)}") from None
            yield table


def open_parquet(source: pa.NativeFile | pa.Buffer, where: str, **options: Any) -> pq.ParquetFile:
    """Raises DamagedShardError where there is no footer that can be parsed."""
    try:
        return pq.ParquetFile(
            pa.BufferReader(source) if isinstance(source, pa.Buffer) else source,
            page_checksum_verification=True,
            thrift_string_size_limit=1 << 20,
            thrift_container_size_limit=MAX_FOOTER_VALUES,
            **options,
        )
    except UNREADABLE as error:
        raise DamagedShardError(f"{where}: not readable as Parquet: {_first_line(error)}") from None


def damaged_chunks(data: pa.Buffer, row_format: RowFormat) -> list[str]:
    """Which column chunks of a shard cannot be decoded, or decode to what no writer produces."""
    try:
        headers = read_headers(pa.BufferReader(data), row_format.schema(), "headers")
        _check_strings(data, headers, "values")
        with open_parquet(data, "footer") as file:
            groups = range(file.num_row_groups)
            broken = [(n, name) for n in groups for name in row_format.schema().names if not _decodes(file, n, name)]
    except DamagedShardError as error:
        return [str(error)]
    return [f"row group {group}, column {name}" for group, name in broken]


def shard_sums(table: pa.Table, rows: Sequence[LogitRow], row_format: RowFormat, where: str) -> dict[str, Any]:
    """The manifest's sums over a shard that follow from its rows."""
    return {
        "rows": len(rows),
        "tokens": sum(row.num_tokens for row in rows),
        "longest_row": max((row.num_tokens for row in rows), default=0),
        "positions": sum(row.num_positions for row in rows),
        "kept": sum(len(row.teacher.kept_ids_E) for row in rows),
        "kept_mass": float(np.exp(values_of(whole(table["kept_logprobs"]))).sum()),
        "loss_nats": row_losses(table, row_format, where).sum(axis=0, dtype=np.float64),
    }


def _added(sums: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    if not sums:
        return more
    return {name: max(sums[name], more[name]) if name == "longest_row" else sums[name] + more[name] for name in more}


def checked_bytes(folder: Path, shard: Shard, row_format: RowFormat) -> pa.Buffer:
    """The bytes of the file, whose digest and footer are the manifest's."""
    where = str(folder / shard.path)
    with _next_step(folder):
        data = _verified_bytes(folder, shard, row_format)
        headers = read_headers(pa.BufferReader(data), expected := row_format.schema(), where)
        _check_counts(headers, shard, row_format, where)
        _check_strings(data, headers, where)
        with open_parquet(data, where) as file:
            if not file.schema_arrow.equals(expected):
                raise DamagedShardError(f"{where}: expected the columns\n{expected}\nbut got\n{file.schema_arrow}")
    return data


def _verified_bytes(folder: Path, shard: Shard, row_format: RowFormat) -> pa.Buffer:
    path = folder / shard.path
    _check_file(folder, shard)
    try:
        data = pa.py_buffer(path.read_bytes())
    except OSError as error:
        raise DamagedShardError(f"{path}: cannot be read: {error.strerror}") from None
    got = hashlib.sha256(memoryview(data)).hexdigest()
    if got != shard.sha256:
        chunks = damaged_chunks(data, row_format) or ["no page: between the pages, or in the footer"]
        raise DamagedShardError(
            f"{path}: damaged: expected sha256 {shard.sha256[:16]}…, got {got[:16]}…; {'; '.join(chunks)}"
        )
    return data


def _check_file(folder: Path, shard: Shard) -> None:
    """Raises DamagedShardError unless it is a file of that size inside the dataset; opens nothing that may block."""
    path = folder / shard.path
    if fault := why_no_file(folder, path):
        raise DamagedShardError(f"{path}: {fault}")
    if (size_bytes := path.stat().st_size) != shard.size_bytes:
        raise DamagedShardError(f"{path}: damaged: expected {shard.size_bytes} bytes, got {size_bytes}")


def _check_counts(headers: Headers, shard: Shard, row_format: RowFormat, where: str) -> None:
    """Raises DamagedShardError unless the counts are the manifest's."""
    counted: Counter[str] = Counter(rows=headers.num_rows)
    for chunk in headers.chunks:
        counted[chunk.path] += chunk.num_values
    of_tokens, of_kept = ("input_ids", "label_mask"), ("kept_ids", "kept_logprobs")
    wanted = dict.fromkeys(["rows", *NAMES.names], shard.rows) | {
        **{leaf(name): shard.tokens for name in of_tokens},
        **{leaf(name): shard.kept for name in of_kept},
        **{leaf(name): shard.positions for name in row_format.position_columns},
        leaf("storage_loss"): shard.rows * len(row_format.temperatures),
    }
    for name, count in wanted.items():
        if counted[name] != count:
            raise DamagedShardError(f"{where}: the manifest has {count} values of {name}, the file {counted[name]}")


def _check_strings(source: pa.NativeFile | pa.Buffer, headers: Headers, where: str) -> None:
    """Raises DamagedShardError where a dictionary of few strings stands for more than would fit into memory."""
    for name in headers.repetitive_columns():
        size_bytes = 0
        with open_parquet(source, where, read_dictionary=[name]) as file:
            for group in range(file.num_row_groups):
                try:
                    for part in file.read_row_group(group, columns=[name])[name].chunks:
                        lengths: Any = pc.call_function("binary_length", [part.dictionary]).to_numpy()
                        size_bytes += int(lengths[part.indices.to_numpy()].sum(dtype=np.int64))
                except UNREADABLE as error:
                    raise DamagedShardError(f"{where}: row group {group}: {_first_line(error)}") from None
        if size_bytes > MAX_STRINGS_BYTES:
            raise DamagedShardError(
                f"{where}: column {name}: strings of {size_bytes} bytes, at most {MAX_STRINGS_BYTES} are allowed"
            )


@contextmanager
def _next_step(folder: Path) -> Iterator[None]:
    """What to do about damage, whoever finds it."""
    try:
        yield
    except DamagedShardError as error:
        error.next_step = error.next_step or REPAIR.format(folder)
        raise


def _decodes(file: pq.ParquetFile, group: int, name: str) -> bool:
    try:
        file.read_row_group(group, columns=[name]).validate(full=True)
    except UNREADABLE:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
