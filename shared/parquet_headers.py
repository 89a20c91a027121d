"""What a Parquet file says about itself, checked before anything of it is decoded.

Parquet's own reader believes headers: a page of a few bytes that calls itself two billion values makes it allocate
them, and a footer whose histograms have another length ends the process.  So the footer and every page header are read
here first, as the Thrift they are, and must agree with each other, with the file's length and with the columns that
the dataset declares.  What they then promise is what decoding can cost at most.

Time: about 30 µs for each page and 60 µs for each column chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from shared.errors import DamagedShardError

MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
MAX_FOOTER_BYTES = 1 << 24
MAX_HEADER_VALUES = 1 << 21
MAX_DEPTH = 16
I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
BYTE_ARRAY = 6
PHYSICAL_TYPES = {pa.bool_(): 0, pa.int32(): 1, pa.float32(): 4, pa.string(): BYTE_ARRAY}
REQUIRED, REPEATED = 0, 2
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
ENCODINGS = {0, 2, 3, 5, 6, 8, 9}
"""All but BIT_PACKED, which is for levels of long ago, and DELTA_BYTE_ARRAY, where no byte bounds a string's length."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One column of one row group, as headers describe it."""

    group: int
    path: str
    """Where Parquet finds the values, as `shared.schema.leaf` spells it."""
    num_values: int
    uncompressed_bytes: int
    dictionary_bytes: int
    """Uncompressed; 0 without a dictionary."""


@dataclass(frozen=True, kw_only=True)
class Headers:
    """The footer and all page headers of a file."""

    num_rows: int
    rows_of_groups: list[int]
    chunks: list[Chunk] = field(repr=False)


class _Malformed(ValueError):
    """What is wrong, to be told with the place."""


def read_headers(data: pa.Buffer, schema: pa.Schema, where: str) -> Headers:
    """The headers of a file that has the columns of `schema`.

    Raises:
        DamagedShardError: they are none, contradict each other or the file's length, or are of other columns.
    """
    try:
        footer, begin = _footer(memoryview(data))
        _check_columns(footer, schema)
        groups = footer.structs(4)
        rows_of_groups = [group.number(3, I64) for group in groups]
        if min(rows_of_groups, default=0) < 0 or sum(rows_of_groups) != footer.number(3, I64):
            raise _Malformed(f"footer: {footer.number(3, I64)} rows, but row groups of {rows_of_groups[:8]}")
        paths, taken, chunks = _leaves(schema), [], []
        for index, group in enumerate(groups):
            columns = group.structs(1)
            if len(columns) != len(paths):
                raise _Malformed(f"row group {index}: {len(paths)} columns expected, got {len(columns)}")
            for path, column in zip(paths, columns, strict=True):
                try:
                    chunk, extent = _chunk(memoryview(data)[:begin], column, index, path)
                except _Malformed as error:
                    raise _Malformed(f"row group {index}, column {path}: {error}") from None
                chunks.append(chunk)
                taken.append(extent)
        taken.sort()
        if any(end > start for (_, end), (start, _) in zip(taken, taken[1:], strict=False)):
            raise _Malformed("footer: column chunks overlap")
    except _Malformed as error:
        raise DamagedShardError(f"{where}: {error}") from None
    return Headers(num_rows=sum(rows_of_groups), rows_of_groups=rows_of_groups, chunks=chunks)


def _footer(data: memoryview) -> "tuple[_Struct, int]":
    """The footer, and where it begins."""
    if bytes(data[-4:]) == ENCRYPTED_MAGIC:
        raise _Malformed("not readable as Parquet: the footer is encrypted")
    if len(data) < 12 or bytes(data[:4]) != MAGIC or bytes(data[-4:]) != MAGIC:
        raise _Malformed("not readable as Parquet: it does not begin and end with PAR1")
    size_bytes = int.from_bytes(data[-8:-4], "little")
    begin = len(data) - 8 - size_bytes
    if begin < 4 or size_bytes > MAX_FOOTER_BYTES:
        raise _Malformed(f"not readable as Parquet: a footer of {size_bytes} bytes in a file of {len(data)}")
    thrift = _Thrift(data[begin:-8])
    try:
        footer = thrift.struct()
    except _Malformed as error:
        raise _Malformed(f"not readable as Parquet: footer: {error}") from None
    if thrift.at != size_bytes:
        raise _Malformed(f"footer: {size_bytes - thrift.at} bytes after its end")
    if footer.has(8) or footer.has(9):
        raise _Malformed("footer: is encrypted or signed, which this format does not know")
    return footer, begin


def _check_columns(footer: "_Struct", schema: pa.Schema) -> None:
    expected = [("schema", None, len(schema))]
    for column in schema:
        expected += _elements(column.name, column.type, REQUIRED)
    names = iter(expected)
    for place, element in enumerate(footer.structs(2)):
        got = (element.text(4), element.get(1, I32), element.get(5, I32) or 0)
        wanted = next(names, None)
        fits = wanted is not None and got[1:] == wanted[1:] and (place == 0 or got[0] == wanted[0])
        if not fits or (place and element.get(3, I32) != _repetition(str(wanted[0]), place, expected)):
            raise _Malformed(f"expected the columns\n{schema}\nbut element {place} of the footer's schema is {got}")


def _chunk(data: memoryview, column: "_Struct", group: int, path: str) -> tuple[Chunk, tuple[int, int]]:
    raise NotImplementedError


class _Struct:
    pass
