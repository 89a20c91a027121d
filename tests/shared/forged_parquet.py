"""Parquet files that no library writes: footers and page headers with other numbers in them than are true.

A file is taken apart into pages and footer, the footer is edited as Thrift, and all is put together again.
"""

import zlib
from collections.abc import Callable
from typing import Any

import zstandard

from shared.thrift import BINARY, BITS, FALSE, I32, I64, LIST, STRUCT, TRUE, Struct, read_struct


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def encode_value(kind: int, value: Any) -> bytes:
    if kind in BITS:
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == STRUCT:
        return encode(value)
    if kind == LIST:
        element, values = value
        head = bytes([min(len(values), 15) << 4 | element]) + (varint(len(values)) if len(values) > 14 else b"")
        return head + b"".join(
            bytes([each]) if element in (TRUE, FALSE) else encode_value(element, each) for each in values
        )
    return b"" if kind in (TRUE, FALSE) else value


def encode(struct: Struct) -> bytes:
    """Fields in the order they stand in, each with its id in full."""
    fields = (
        bytes([kind]) + encode_value(I64, key) + encode_value(kind, v) for key, (kind, v) in struct.fields.items()
    )
    return b"".join(fields) + b"\0"


def struct(**fields: Any) -> Struct:
    """`struct(i5=(I32, 1))`: a field with id 5."""
    return Struct({int(name[1:]): value for name, value in fields.items()})


def parts(data: bytes) -> tuple[bytes, Struct]:
    """Everything before the footer, and the footer."""
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data[:begin], read_struct(data[begin:-8])[0]


def assembled(body: bytes, footer: Struct | bytes, ending: bytes = b"PAR1") -> bytes:
    footer = footer if isinstance(footer, bytes) else encode(footer)
    return body + footer + len(footer).to_bytes(4, "little") + ending


def with_footer(edit: Callable[[Struct], Any]) -> Callable[[bytes], bytes]:
    """A change of a file that edits its footer."""

    def change(data: bytes) -> bytes:
        body, footer = parts(data)
        edit(footer)
        return assembled(body, footer)

    return change


def column(footer: Struct, name: str, group: int = 0) -> Struct:
    """The metadata of a column chunk."""
    chunks = [chunk.struct(3) for chunk in footer.structs(4)[group].structs(1)]
    return next(chunk for chunk in chunks if chunk.texts(3)[0] == name)


def put(struct: Struct, key: int, kind: int, value: Any) -> None:
    struct.fields[key] = kind, value


def runs(*pairs: tuple[int, int], bits: int = 1) -> bytes:
    """Run lengths of values, as levels and dictionary indices are stored."""
    return b"".join(varint(count << 1) + value.to_bytes((bits + 7) // 8, "little") for count, value in pairs)


def levels(*pairs: tuple[int, int], bits: int = 1) -> bytes:
    encoded = runs(*pairs, bits=bits)
    return len(encoded).to_bytes(4, "little") + encoded


def page(payload: bytes, num_values: int, encoding: int, *, dictionary: bool = False, **changes: Any) -> bytes:
    """A page with a true checksum; `changes` are fields of its header."""
    stored = zstandard.compress(payload)
    about = struct(i1=(I32, num_values), i2=(I32, encoding))
    if not dictionary:
        about.fields.update({3: (I32, 3), 4: (I32, 3)})
    checksum = int.from_bytes(zlib.crc32(stored).to_bytes(4, "little"), "little", signed=True)
    kind_of_page, about_key = (2, "i7") if dictionary else (0, "i5")
    fields = {
        "i1": (I32, kind_of_page), "i2": (I32, len(payload)), "i3": (I32, len(stored)), "i4": (I32, checksum),
        about_key: (STRUCT, about),
    }  # fmt: skip
    return encode(struct(**(fields | changes))) + stored


def with_pages(name: str, pages: list[bytes], num_values: int, uncompressed: int) -> Callable[[bytes], bytes]:
    """A change of a file that gives a column other pages, the first of them a dictionary if there are two."""

    def change(data: bytes) -> bytes:
        body, footer = parts(data)
        chunk = column(footer, name)
        begin = len(body)
        put(chunk, 5, I64, num_values)
        put(chunk, 6, I64, uncompressed)
        put(chunk, 7, I64, sum(map(len, pages)))
        put(chunk, 9, I64, begin + sum(map(len, pages[:-1])))
        chunk.fields.pop(11, None)
        if len(pages) > 1:
            put(chunk, 11, I64, begin)
        return assembled(body + b"".join(pages), footer)

    return change
