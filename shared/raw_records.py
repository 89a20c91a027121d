"""Text files to raw records: JSON lines or arrays (plain, zstd, gzip), Parquet, saved `datasets` folders.

A record that cannot be read is a `BadRecord`, which the settings may skip.  A file that is damaged or empty is an
error, because nobody knows what is missing.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from shared.errors import ConfigError, DamagedDataError, RecordError
from shared.text_files import TextFile

ZSTD_BLOCK_BYTES = 1 << 16
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
    read = {"json": _json_records, "parquet": _parquet_records, "datasets": _saved_records}[file.format]
    empty = True
    try:
        for record in read(file, columns):
            empty = False
            yield record
    except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError, pa.ArrowException) as error:
        raise DamagedDataError(
            f"{file.name}: damaged, or cut off: {error}", next_step="copy it again from where it came from"
        ) from None
    if empty:
        raise RecordError(f"{file.name}: holds no records", next_step="take the file out of `files`, or fill it")


def _json_records(file: TextFile, _columns: Collection[str]) -> Iterator[RawRecord | BadRecord]:
    with file.open() as raw:
        lines = enumerate(_decompressed(raw, file.compression), start=1)
        for number, line in lines:
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith(b"["):
                yield from _array_records(file, b"".join([line, *(rest for _, rest in lines)]))
            else:
                yield _parsed(line, f"{file.name}:{number}")


def _array_records(file: TextFile, text: bytes) -> Iterator[RawRecord | BadRecord]:
    """A file that is one JSON array, as ShareGPT's are; held in memory as a whole."""
    try:
        array = json.loads(text)
    except (ValueError, RecursionError) as error:  # also broken UTF-8
        raise DamagedDataError(
            f"{file.name}: begins like a JSON array, but is none: {error}",
            next_step="give one JSON object on each line",
        ) from None
    for index, fields in enumerate(array):
        yield _checked(fields, f"{file.name}[{index}]", escapes=b"\\u" in text)


def _parsed(line: bytes, where: str) -> RawRecord | BadRecord:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(error=RecordError(f"{where}: not UTF-8: {error}"))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        return BadRecord(error=RecordError(f"{where}: not a line of JSON: {error}"))
    return _checked(fields, where, escapes=b"\\u" in line)


def _checked(fields: Any, where: str, *, escapes: bool) -> RawRecord | BadRecord:
    if not isinstance(fields, dict):
        return BadRecord(error=RecordError(f"{where}: expected a JSON object, got {type(fields).__name__}"))
    for name, value in fields.items() if escapes else ():
        # JSON can spell half a surrogate pair, which is no character: no digest, tokenizer or Parquet file takes it.
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            reason = f"{where}: field {name!r}: holds half a surrogate pair, which is no character"
            return BadRecord(error=RecordError(reason))
    return RawRecord(where=where, fields=fields)


def _decompressed(raw: BinaryIO, compression: str | None) -> Iterable[bytes]:
    if compression == ".zst":
        return io.BufferedReader(ZstdReader(raw))
    return gzip.GzipFile(fileobj=raw) if compression == ".gz" else raw


class ZstdReader(io.RawIOBase):
    """All frames of a zstd file, one after the other.

    By hand, because zstandard's own stream reader ends in silence where a file is cut off.

    Raises:
        EOFError: the file ends within a frame.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
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
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        block = rest or self._file.read(ZSTD_BLOCK_BYTES)
        if not block and self._in_frame:
            raise EOFError("the last zstd frame has no end")
        return block


def _parquet_records(file: TextFile, columns: Collection[str]) -> Iterator[RawRecord | BadRecord]:
    with file.open() as raw:
        table = pq.ParquetFile(raw, page_checksum_verification=True)
        known = _known(table.schema_arrow.names, columns, file)
        yield from _columnar_records(table.iter_batches(batch_size=COLUMNAR_BATCH_ROWS, columns=known), file)


def _saved_records(file: TextFile, columns: Collection[str]) -> Iterator[RawRecord | BadRecord]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{file.name} is a saved dataset, which the datasets library reads",
            next_step="pip install 'logitferry[datasets]'",
        ) from None
    rows: Any = datasets.load_from_disk(file.fs.unstrip_protocol(file.path))
    known = _known(rows.column_names, columns, file)
    tables = rows.select_columns(known).with_format("arrow").iter(batch_size=COLUMNAR_BATCH_ROWS)
    yield from _columnar_records(tables, file)


def _known(names: list[str], columns: Collection[str], file: TextFile) -> list[str]:
    known = [name for name in names if name in columns]
    if not known:
        raise ConfigError(
            f"{file.name} has no column that is a record's; it has {', '.join(map(repr, names))}",
            next_step="name the columns as data.prompt_field and data.response_field, messages_field or text_field",
        )
    return known


def _columnar_records(batches: Iterable[pa.RecordBatch | pa.Table], file: TextFile) -> Iterator[RawRecord | BadRecord]:
    begin = 0
    for batch in batches:
        try:
            rows: list[Any] = batch.to_pylist(maps_as_pydicts="strict")
        except (UnicodeDecodeError, KeyError):  # a string column may hold any bytes, a map one key twice
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
    except (UnicodeDecodeError, KeyError) as error:
        return error


def _without_nulls(value: Any) -> Any:
    """In columns every object has the keys of all others; those that are null were not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
