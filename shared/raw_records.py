"""Text files to raw records: JSON lines or arrays (plain, zstd, gzip), Parquet, saved `datasets` folders.

A record that cannot be read is a `BadRecord`, which the settings may skip.  A file that is damaged or empty is an
error, because nobody knows what is missing.
"""

import codecs
import gzip
import io
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shared.errors import ConfigError, DamagedDataError, LogitferryError, RecordError
from shared.json_text import parse_json, require_whole_characters
from shared.text_files import TextFile

ZSTD_BLOCK_BYTES = 1 << 16
MAX_ZSTD_WINDOW_BYTES = 1 << 31
"""Also files that were written with `zstd --long=31`."""
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
UNREADABLE = (ValueError, KeyError, OverflowError)
"""A string column may hold any bytes, a map one key twice, a date a year that is none."""
COLUMNAR_BATCH_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class RawRecord:
    """The fields of a record as they stand in a file.

    `where` is file:line for JSON lines, counted from 1, else file[row], counted from 0.
    """

    where: str
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that cannot become a row, and why."""

    error: RecordError


def raw_records(file: TextFile, columns: Collection[str]) -> Iterator[RawRecord | BadRecord]:
    """All records of a file, in order; where fields lie in columns only those of `columns` are read.

    Raises:
        RecordError: the file holds no record.
        DamagedDataError: the file is cut off or its checksums do not hold.
        ConfigError: it cannot be opened, or has none of the columns.
    """
    records = _json_records(file) if file.format == "json" else _columnar_records(column_batches(file, columns), file)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise RecordError(f"{file.name}: holds no records", next_step="take the file out of `files`, or fill it")


def column_batches(file: TextFile, columns: Collection[str]) -> Iterator[pa.RecordBatch | pa.Table]:
    """The records of a file whose fields lie in columns, some at a time, as they lie there.

    Raises:
        DamagedDataError, ConfigError: as for `raw_records`.
    """
    return _parquet_batches(file, columns) if file.format == "parquet" else _saved_batches(file, columns)


def numbered_lines(file: TextFile) -> Generator[tuple[int, bytes]]:
    """The lines of a file, decompressed, counted from 1, without a byte order mark; raises DamagedDataError."""
    with file.open() as raw:
        for number, line in enumerate(_lines(file, raw), start=1):
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _json_records(file: TextFile) -> Iterator[RawRecord | BadRecord]:
    with closing(numbered_lines(file)) as lines:
        begun = False
        for number, line in lines:
            if not line.strip():
                continue
            if not begun and line.lstrip().startswith(b"["):
                yield from _array_records(file, b"".join([line, *(rest for _, rest in lines)]))
                return
            begun = True
            where = f"{file.name}:{number}"
            try:
                yield _record(parse_json(line, where), where, escapes=b"\\u" in line)
            except RecordError as error:
                yield BadRecord(error=error)


def _array_records(file: TextFile, text: bytes) -> Iterator[RawRecord | BadRecord]:
    """A file that is one JSON array, as ShareGPT's are; held in memory as a whole."""
    try:
        array = parse_json(text, file.name)
    except RecordError as error:
        raise DamagedDataError(
            f"{error.args[0]}; it begins like a JSON array, but is none", next_step="give one JSON object on each line"
        ) from None
    for index, fields in enumerate(array):
        try:
            yield _record(fields, f"{file.name}[{index}]", escapes=b"\\u" in text)
        except RecordError as error:
            yield BadRecord(error=error)


def _record(fields: Any, where: str, *, escapes: bool) -> RawRecord:
    if not isinstance(fields, dict):
        raise RecordError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    if escapes:
        require_whole_characters(fields, where)
    return RawRecord(where=where, fields=fields)


def _lines(file: TextFile, raw: BinaryIO) -> Iterator[bytes]:
    if file.compression is None:
        yield from raw
        return
    with _damage(file):
        yield from io.BufferedReader(ZstdReader(raw)) if file.compression == ".zst" else gzip.GzipFile(fileobj=raw)


class ZstdReader(io.RawIOBase):
    """All frames of a zstd file, one after the other.

    By hand, because zstandard's own stream reader ends in silence where a file is cut off.

    Raises:
        EOFError: the file ends within a frame.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = _zstd_frame()
        self._in_frame = False
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and (block := self._next_block()):
            self._in_frame = True
            self._output = memoryview(self._frame.decompress(block))
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _next_block(self) -> bytes:
        rest = b""
        if self._frame.eof:
            rest, self._in_frame = self._frame.unused_data, False
            self._frame = _zstd_frame()
        block = rest or self._file.read(ZSTD_BLOCK_BYTES)
        if not block and self._in_frame:
            raise EOFError("the last zstd frame has no end")
        return block


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES).decompressobj()


def _parquet_batches(file: TextFile, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    with file.open() as raw, _damage(file):
        table = pq.ParquetFile(raw, page_checksum_verification=True)
        known = _known(table.schema_arrow.names, columns, file)
        num_rows = 0
        for batch in table.iter_batches(batch_size=COLUMNAR_BATCH_ROWS, columns=known):
            num_rows += batch.num_rows
            yield batch
        if num_rows != table.metadata.num_rows:  # page headers lie outside the page checksums
            raise DamagedDataError(f"{file.name}: damaged: {num_rows} rows of {table.metadata.num_rows} can be read")


def _saved_batches(file: TextFile, columns: Collection[str]) -> Iterator[pa.Table]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{file.name} is a saved dataset, which the datasets library reads",
            next_step="pip install 'logitferry[datasets]'",
        ) from None
    with _damage(file):
        streams = file.fs.glob(f"{file.path}/*.arrow")
        if not streams:  # as where it was saved without a row; the library cannot read that
            return
        for path in streams:  # one that is cut off between two batches reads as if it were whole
            if file.fs.tail(path, len(ARROW_STREAM_END)) != ARROW_STREAM_END:
                raise EOFError(f"{path} has no end")
        rows: Any = datasets.load_from_disk(file.fs.unstrip_protocol(file.path))
        known = _known(rows.column_names, columns, file)
        tables = rows.select_columns(known).with_format("arrow")
        if len(rows):
            yield from tables.iter(batch_size=COLUMNAR_BATCH_ROWS)


@contextmanager
def _damage(file: TextFile) -> Iterator[None]:
    """The libraries raise all kinds of exceptions for bytes that they cannot make sense of; ours says where."""
    try:
        yield
    except (LogitferryError, MemoryError):
        raise
    except Exception as error:
        raise DamagedDataError(
            f"{file.name}: damaged, or cut off: {type(error).__name__}: {error}",
            next_step="copy it again from where it came from",
        ) from error


def _known(names: list[str], columns: Collection[str], file: TextFile) -> list[str]:
    known = [name for name in names if name in columns]
    if len(set(known)) < len(known):
        raise ConfigError(f"{file.name} has two columns of one name among {', '.join(map(repr, known))}")
    if not known:
        raise ConfigError(
            f"{file.name} has no column that is a record's; it has {', '.join(map(repr, names))}",
            next_step="name the columns as data.prompt_field and data.response_field, messages_field or text_field",
        )
    return known


def _columnar_records(batches: Iterable[pa.RecordBatch | pa.Table], file: TextFile) -> Iterator[RawRecord | BadRecord]:
    begin = 0
    with _damage(file):
        for batch in batches:
            try:
                rows: list[Any] = batch.to_pylist(maps_as_pydicts="strict")
            except UNREADABLE:
                rows = [_row_or_error(batch, index) for index in range(batch.num_rows)]
            for index, fields in enumerate(rows, start=begin):
                where = f"{file.name}[{index}]"
                if isinstance(fields, dict):
                    yield RawRecord(where=where, fields=_without_nulls(fields))
                else:
                    yield BadRecord(error=RecordError(f"{where}: cannot be read: {fields}"))
            begin += batch.num_rows


def _row_or_error(batch: pa.RecordBatch | pa.Table, index: int) -> dict[str, Any] | Exception:
    try:
        return batch.slice(index, 1).to_pylist(maps_as_pydicts="strict")[0]
    except UNREADABLE as error:
        return error


def _without_nulls(value: Any) -> Any:
    """In columns every object has the keys of all others; those that are null were not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
