"""Thrift's compact protocol, as much of it as Parquet's headers need: bytes to structs, refusing what is malformed.

Stricter than other readers on purpose.  A field that comes twice, has another type than it should or does not fit its
type is refused, where others skip it, cut it or let the last one win: so nothing is read here in one way and elsewhere
in another.  What can be allocated is bounded by the length of the bytes and by `MAX_VALUES`.
"""

from dataclasses import dataclass
from typing import Any

TRUE, FALSE, I8, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
BITS = {I16: 16, I32: 32, I64: 64}
MAX_VALUES = 1 << 21
MAX_DEPTH = 16


class MalformedThriftError(ValueError):
    """What is wrong with it."""


@dataclass(frozen=True)
class Struct:
    """Fields by their id: type and value.  The accessors raise MalformedThriftError where they are not of that type."""

    fields: dict[int, tuple[int, Any]]

    def has(self, key: int) -> bool:
        return key in self.fields

    def optional(self, key: int, kind: int) -> Any:
        """The value, or None where the field is absent."""
        if key not in self.fields:
            return None
        got, value = self.fields[key]
        if got != kind:
            raise MalformedThriftError(f"field {key} is of type {got}, expected {kind}")
        return value

    def _required(self, key: int, kind: int) -> Any:
        if key not in self.fields:
            raise MalformedThriftError(f"field {key} is missing")
        return self.optional(key, kind)

    def number(self, key: int, kind: int) -> int:
        return self._required(key, kind)

    def struct(self, key: int) -> "Struct":
        return self._required(key, STRUCT)

    def text(self, key: int) -> str:
        return _text(self._required(key, BINARY))

    def structs(self, key: int) -> "list[Struct]":
        return self._elements(key, STRUCT)

    def texts(self, key: int) -> list[str]:
        return [_text(value) for value in self._elements(key, BINARY)]

    def _elements(self, key: int, kind: int) -> list[Any]:
        got, values = self._required(key, LIST)
        if got != kind and values:
            raise MalformedThriftError(f"field {key} is a list of type {got}, expected {kind}")
        return values


def read_struct(data: bytes) -> tuple[Struct, int]:
    """The struct that `data` begins with, and how many bytes it took; raises MalformedThriftError."""
    reader = _Reader(data)
    try:
        return reader.struct(0), reader.at
    except IndexError:
        raise MalformedThriftError("it ends too early") from None


class _Reader:
    """A place in some bytes; reading past their end raises IndexError."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.values_left = data, 0, MAX_VALUES

    def struct(self, depth: int) -> Struct:
        if depth > MAX_DEPTH:
            raise MalformedThriftError(f"nested deeper than {MAX_DEPTH}")
        fields: dict[int, tuple[int, Any]] = {}
        key = 0
        while head := self._byte():
            key = key + (head >> 4) if head >> 4 else self._number(16)
            if key in fields:
                raise MalformedThriftError(f"field {key} comes twice")
            fields[key] = head & 15, self._value(head & 15, depth)
        return Struct(fields)

    def _value(self, kind: int, depth: int) -> Any:
        self.values_left -= 1
        if self.values_left < 0:
            raise MalformedThriftError(f"more than {MAX_VALUES} values")
        if kind in BITS:
            return self._number(BITS[kind])
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in (I8, DOUBLE):
            return self._bytes(1 if kind == I8 else 8)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind == LIST:
            return self._list(depth)
        if kind == STRUCT:
            return self.struct(depth + 1)
        raise MalformedThriftError(f"unknown type {kind}")

    def _list(self, depth: int) -> tuple[int, list[Any]]:
        head = self._byte()
        kind, count = head & 15, head >> 4
        if count == 15:
            count = self._varint()
        if count > len(self.data) - self.at:  # each takes a byte at least
            raise MalformedThriftError(f"a list of {count} in {len(self.data)} bytes")
        if depth > MAX_DEPTH:
            raise MalformedThriftError(f"nested deeper than {MAX_DEPTH}")
        if kind in (TRUE, FALSE):
            return kind, list(self._bytes(count))
        return kind, [self._value(kind, depth + 1) for _ in range(count)]

    def _byte(self) -> int:
        byte = self.data[self.at]
        self.at += 1
        return byte

    def _bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        begin, self.at = self.at, end
        return self.data[begin:end]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise MalformedThriftError("a number of more than 64 bits")

    def _number(self, bits: int) -> int:
        value = self._varint()
        if value >> bits:
            raise MalformedThriftError(f"a number of more than {bits} bits")
        return (value >> 1) ^ -(value & 1)


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise MalformedThriftError(f"{value[:40]!r} is not UTF-8") from None
