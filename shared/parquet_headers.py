"""What a Parquet file says about itself, checked before anything of it is decoded.

Parquet's own reader believes headers: a page of a few bytes that calls itself two billion values makes it allocate
them, and a footer with histograms of a wrong length can end the process.  So the footer and every page header are read
here first, as the Thrift they are, and must agree with each other, with the length of the file and with the columns
that the dataset declares.  What they then promise is what decoding costs at most.

Time: about 30 µs for each page and 50 µs for each column chunk.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import pyarrow as pa

from shared.errors import DamagedShardError
from shared.thrift import I32, I64, MalformedThriftError, Struct, read_struct

MAGIC, ENCRYPTED_MAGIC = b"PAR1", b"PARE"
MAX_FOOTER_BYTES = 1 << 24
MAX_PAGE_HEADER_BYTES = 1 << 16
MAX_PAGES = 1 << 18
MAX_GROUP_ROWS = 1 << 20
MAX_GROUP_VALUES = 1 << 28
"""Of all columns of a row group: a GiB decoded.  The largest row of a million tokens with 128 ids each has as many."""
MAX_GROUP_BYTES = 1 << 31
"""Of all columns of a row group, decompressed but not decoded."""
MAX_BYTES_PER_VALUE = 16
"""Decompressed, of a number with its levels; a mebibyte for each column comes on top."""
MAX_STRINGS_BYTES = 1 << 28
"""Of one column of strings in a file."""

BYTE_ARRAY = 6
PHYSICAL_TYPES = {pa.bool_(): 0, pa.int32(): 1, pa.float32(): 4, pa.string(): BYTE_ARRAY}
REQUIRED, REPEATED = 0, 2
DATA_PAGE, DICTIONARY_PAGE = 0, 2
PLAIN, PLAIN_DICTIONARY = 0, 2
ENCODINGS = {PLAIN, PLAIN_DICTIONARY, 3, 5, 6, 8, 9}
"""All but BIT_PACKED, which is of long ago, and DELTA_BYTE_ARRAY, where no byte bounds the length of a string."""
DICTIONARY_ENTRY_BYTES = 4
"""The least that one takes: a number, or the length of a string."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One column of one row group, as headers describe it."""

    group: int
    path: str
    """Where Parquet finds the values, as `shared.schema.leaf` spells it."""
    kind: int
    """Physical type."""
    num_values: int
    uncompressed_bytes: int
    dictionary_bytes: int = 0
    """Uncompressed; 0 where there is no dictionary."""

    @property
    def string_bytes(self) -> int:
        """What its strings take at most when decoded, were each the longest that its dictionary has room for."""
        return max(self.uncompressed_bytes, self.num_values * self.dictionary_bytes) if self.kind == BYTE_ARRAY else 0


@dataclass(frozen=True, kw_only=True)
class Headers:
    """The footer and the page headers of a file."""

    group_rows: list[int]
    chunks: list[Chunk] = field(repr=False)

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows)

    def repetitive_columns(self) -> list[str]:
        """Columns of strings whose decoded size headers do not bound well enough: few may stand for many."""
        sizes: Counter[str] = Counter()
        for chunk in self.chunks:
            sizes[chunk.path] += chunk.string_bytes
        return [path for path, size in sizes.items() if size > MAX_STRINGS_BYTES]


def read_headers(file: pa.NativeFile, schema: pa.Schema, where: str, *, is_whole: bool = True) -> Headers:
    """The headers of a file that has the columns of `schema`, or unless `is_whole` begins with these: only theirs then.

    Raises:
        DamagedShardError: they are none, contradict each other or the length of the file, are of other columns, or
            promise more than any writer puts into a row group.
        OSError: the file cannot be read.
    """
    try:
        footer, end = _footer(file)
        _check_columns(footer.structs(2), schema, is_whole)
        groups = footer.structs(4)
        group_rows = [group.number(3, I64) for group in groups]
        if min(group_rows, default=0) < 0 or sum(group_rows) != footer.number(3, I64):
            raise MalformedThriftError(f"footer: {footer.number(3, I64)} rows in row groups of {group_rows[:9]}")
        walk = _Walk(file=file, end=end, types=_leaf_types(schema))
        for index, group in enumerate(groups):
            columns = group.structs(1)
            walk.group(index, columns if is_whole else columns[: len(walk.types)])
        walk.check_overlaps()
        _check_sizes(walk.chunks, group_rows)
    except MalformedThriftError as error:
        raise DamagedShardError(f"{where}: {error}") from None
    return Headers(group_rows=group_rows, chunks=walk.chunks)


def _footer(file: pa.NativeFile) -> tuple[Struct, int]:
    """The footer, and where it begins."""
    size_bytes = file.size()
    if size_bytes < 12 or file.read_at(4, 0) != MAGIC:
        raise MalformedThriftError("not readable as Parquet: it does not begin with PAR1")
    ending = file.read_at(8, size_bytes - 8)
    if ending[4:] != MAGIC:
        what = "the footer is encrypted" if ending[4:] == ENCRYPTED_MAGIC else "it does not end with PAR1"
        raise MalformedThriftError(f"not readable as Parquet: {what}")
    footer_bytes = int.from_bytes(ending[:4], "little")
    begin = size_bytes - 8 - footer_bytes
    if begin < 4 or footer_bytes > MAX_FOOTER_BYTES:
        raise MalformedThriftError(
            f"not readable as Parquet: a footer of {footer_bytes} in a file of {size_bytes} bytes"
        )
    try:
        footer, used = read_struct(file.read_at(footer_bytes, begin))
    except MalformedThriftError as error:
        raise MalformedThriftError(f"not readable as Parquet: footer: {error}") from None
    if used != footer_bytes:
        raise MalformedThriftError(f"footer: {footer_bytes - used} bytes too many")
    if footer.has(8) or footer.has(9):
        raise MalformedThriftError("footer: encrypted or signed, which this format is not")
    return footer, begin


def _check_columns(elements: list[Struct], schema: pa.Schema, is_whole: bool) -> None:
    """Raises unless the flattened schema is that of `schema`, or begins with it; logical types are left to Arrow."""
    expected = [element for column in schema for element in _elements(column.name, column.type, REQUIRED)]
    got = [(e.text(4), e.optional(1, I32), e.optional(3, I32), e.optional(5, I32) or 0) for e in elements[1:]]
    num_columns = elements[0].optional(5, I32) if elements else None
    if not is_whole:  # Parquet finds columns by how their names begin
        others = [element for element in got[len(expected) :] if element[0].split(".")[0] in schema.names]
        got, num_columns = [*got[: len(expected)], *others], len(schema)
    if got == expected and num_columns == len(schema):
        return
    differing = [place for place, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b]
    at = differing[0] if differing else min(len(got), len(expected))
    raise MalformedThriftError(
        f"expected the columns\n{schema}\nbut the footer has {num_columns}, and element {at} of its schema is "
        f"{got[at] if at < len(got) else 'missing'}, expected {expected[at] if at < len(expected) else 'none'} "
        "(name, type, repetition, children)"
    )


def _elements(name: str, kind: pa.DataType, repetition: int) -> list[tuple[str, int | None, int, int]]:
    if not pa.types.is_list(kind):
        return [(name, PHYSICAL_TYPES[kind], repetition, 0)]
    inner = _elements("element", kind.value_type, REQUIRED)
    return [(name, None, repetition, 1), ("list", None, REPEATED, 1), *inner]


def _leaf_types(schema: pa.Schema) -> dict[str, int]:
    """The physical type of every column, by its path."""
    types: dict[str, int] = {}
    for column in schema:
        path, kind = column.name, column.type
        while pa.types.is_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        types[path] = PHYSICAL_TYPES[kind]
    return types


@dataclass(kw_only=True)
class _Walk:
    """Over the pages of a file, which end at `end`."""

    file: pa.NativeFile
    end: int
    types: dict[str, int]
    num_pages: int = 0
    extents: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def group(self, index: int, columns: list[Struct]) -> None:
        if len(columns) != len(self.types):
            raise MalformedThriftError(f"row group {index}: {len(self.types)} columns expected, got {len(columns)}")
        for column, path in zip(columns, self.types, strict=True):
            try:
                self.chunks.append(self._chunk(column, index, path))
            except MalformedThriftError as error:
                raise MalformedThriftError(f"row group {index}, column {path}: {error}") from None

    def check_overlaps(self) -> None:
        self.extents.sort()
        if any(end > begin for (_, end), (begin, _) in zip(self.extents, self.extents[1:], strict=False)):
            raise MalformedThriftError("footer: column chunks overlap")

    def _chunk(self, column: Struct, group: int, path: str) -> Chunk:
        if column.has(1) or column.has(8) or column.has(9):
            raise MalformedThriftError("is encrypted, or lies in another file")
        about = column.struct(3)
        kind, name = about.number(1, I32), ".".join(about.texts(3))
        if (kind, name) != (self.types[path], path):
            raise MalformedThriftError(f"is of type {kind} and named {name}")
        num_values, uncompressed, compressed = (about.number(key, I64) for key in (5, 6, 7))
        begin = first = about.number(9, I64)
        dictionary = about.optional(11, I64)
        if dictionary is not None and 0 < dictionary < begin:
            begin = dictionary
        is_inside = 4 <= begin <= first <= begin + compressed <= self.end
        if min(num_values, uncompressed, compressed) < 0 or not is_inside:
            raise MalformedThriftError(f"{compressed} bytes at {begin}, but pages end at {self.end}")
        self.extents.append((begin, begin + compressed))
        chunk = Chunk(group=group, path=path, kind=kind, num_values=num_values, uncompressed_bytes=uncompressed)
        return self._pages(chunk, begin, begin + compressed)

    def _pages(self, chunk: Chunk, at: int, end: int) -> Chunk:
        """The chunk with what its page headers add; raises unless they fill it and hold its values exactly."""
        num_values = uncompressed = dictionary_bytes = num_pages = 0
        while at < end:
            header, used = read_struct(self.file.read_at(min(MAX_PAGE_HEADER_BYTES, end - at), at))
            kind, page_bytes, size_bytes = (header.number(key, I32) for key in (1, 2, 3))
            header.number(4, I32)  # its checksum: Parquet itself would read a page without one
            at, uncompressed = at + used + size_bytes, uncompressed + page_bytes
            num_pages, self.num_pages = num_pages + 1, self.num_pages + 1
            if min(page_bytes, size_bytes) < 0 or at > end or uncompressed > chunk.uncompressed_bytes:
                raise MalformedThriftError(f"page {num_pages}: {size_bytes} bytes for {page_bytes} overflow the column")
            if self.num_pages > MAX_PAGES:
                raise MalformedThriftError(f"more than {MAX_PAGES} pages in one file")
            count = _count(header, kind, num_pages, page_bytes)
            if kind == DICTIONARY_PAGE:
                dictionary_bytes = page_bytes
                continue
            num_values += count
            if num_values > chunk.num_values:
                break
        if num_values != chunk.num_values:
            raise MalformedThriftError(f"pages hold {num_values} values, the footer has {chunk.num_values}")
        return replace(chunk, dictionary_bytes=dictionary_bytes)


def _count(header: Struct, kind: int, number: int, page_bytes: int) -> int:
    """How many values a page or dictionary has; raises where it cannot have them."""
    if kind not in (DATA_PAGE, DICTIONARY_PAGE):
        raise MalformedThriftError(f"page {number} is of kind {kind}, not a data page of version 1 or a dictionary")
    about = header.struct(5 if kind == DATA_PAGE else 7)
    count, encoding = about.number(1, I32), about.number(2, I32)
    if count < 0 or encoding not in (ENCODINGS if kind == DATA_PAGE else (PLAIN, PLAIN_DICTIONARY)):
        raise MalformedThriftError(f"page {number}: {count} values in encoding {encoding}")
    if kind == DICTIONARY_PAGE and (number > 1 or count * DICTIONARY_ENTRY_BYTES > page_bytes):
        raise MalformedThriftError(f"page {number}: a dictionary of {count} entries in {page_bytes} bytes")
    return count


def _check_sizes(chunks: list[Chunk], group_rows: list[int]) -> None:
    """Raises where a row group would take more memory than any that is written."""
    values: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    for chunk in chunks:
        rows, place = group_rows[chunk.group], f"row group {chunk.group}, column {chunk.path}"
        values[chunk.group] += chunk.num_values
        sizes[chunk.group] += chunk.uncompressed_bytes
        if chunk.kind == BYTE_ARRAY and chunk.num_values != rows:
            raise MalformedThriftError(f"{place}: {chunk.num_values} values in {rows} rows")
        if chunk.kind != BYTE_ARRAY and chunk.uncompressed_bytes > MAX_BYTES_PER_VALUE * chunk.num_values + (1 << 20):
            raise MalformedThriftError(
                f"{place}: {chunk.num_values} values would take {chunk.uncompressed_bytes} bytes decompressed"
            )
    for group, rows in enumerate(group_rows):
        if rows > MAX_GROUP_ROWS or values[group] > MAX_GROUP_VALUES or sizes[group] > MAX_GROUP_BYTES:
            raise MalformedThriftError(
                f"row group {group}: {rows} rows, {values[group]} values and {sizes[group]} bytes decompressed, "
                f"at most {MAX_GROUP_ROWS}, {MAX_GROUP_VALUES} and {MAX_GROUP_BYTES} are allowed"
            )
