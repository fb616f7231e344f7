"""A reader of protobuf's wire format for files of strangers.

Every length is checked against the message that encloses it, and the number of fields in a file
has a limit.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import ModelFileError

__all__ = ["MOST_TEXT", "ByteSpan", "Field", "Wire", "signed"]

MOST_TEXT = 1 << 16  # bytes of a name

_MOST_FIELDS = 4_000_000  # of the whole file: the largest decoders have some 100,000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ByteSpan(NamedTuple):
    """The bytes start..end - 1 of a file: a message, a text, or repeated integers."""

    start: int
    end: int


class Field(NamedTuple):
    """A field. value: an int, or the ByteSpan of its bytes. at: the field's offset in the file."""

    number: int
    value: Any
    at: int


class Wire:
    """A file of one message. All methods raise ModelFileError.

    The argument `at` is an offset in the file, for errors.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self._path = data, path
        self._left = _MOST_FIELDS

    def fields(self, message: ByteSpan) -> Iterator[Field]:
        """The fields of a message."""
        at, end = message
        while at < end:
            start = at
            self._count(at)
            tag, at = self.varint(at, end)
            number, wire = tag >> 3, tag & 7
            if not number:
                raise self.error(start, "a field without a number: it is no ONNX model")
            if wire == _VARINT:
                value, at = self.varint(at, end)
                yield Field(number, value, start)
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            if wire == _BYTES:
                length, at = self.varint(at, end)
            elif not length:
                raise self.error(start, f"a field of wire type {wire}: it is no ONNX model")
            if length > end - at:
                raise self.error(start, f"a field of {length} bytes where {end - at} are left")
            if wire == _BYTES:
                yield Field(number, ByteSpan(at, at + length), start)
            else:
                fixed = int.from_bytes(self.data[at : at + length], "little")
                yield Field(number, fixed, start)
            at += length

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number of up to 64 bits at an offset, and the offset behind it."""
        value = shift = 0
        start = at
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & (1 << 64) - 1, at
        raise self.error(start, "a number that does not end")

    def integers(self, value: int | ByteSpan) -> list[int]:
        """The integers of one field of a repeated integer: one, or several."""
        if isinstance(value, int):
            return [signed(value)]
        at, end = value
        numbers = []
        while at < end:
            self._count(at)
            number, at = self.varint(at, end)
            numbers.append(signed(number))
        return numbers

    def message(self, value: Any, at: int) -> ByteSpan:
        """A field's value that must be bytes."""
        if isinstance(value, int):
            raise self.error(at, "a number where a message belongs: it is no ONNX model")
        span: ByteSpan = value
        return span

    def number(self, value: Any, at: int) -> int:
        """A field's value that must be a number."""
        if not isinstance(value, int):
            raise self.error(at, "bytes where a number belongs: it is no ONNX model")
        return value

    def text(self, value: Any, at: int) -> str:
        """A field's value that must be a text, of at most MOST_TEXT bytes."""
        first, end = self.message(value, at)
        if end - first > MOST_TEXT:
            raise self.error(at, f"a name of {end - first} bytes")
        try:
            return self.data[first:end].decode()
        except UnicodeDecodeError:
            raise self.error(at, "a name that is not UTF-8") from None

    def once(self, before: Any, value: Any, at: int, what: str) -> ByteSpan:
        """A message that may occur once. before: the earlier occurrence, or None."""
        if before is not None:
            raise self.error(at, f"a second {what} where one belongs")
        return self.message(value, at)

    def error(self, at: int, message: str) -> ModelFileError:
        """An error at an offset."""
        return ModelFileError(message, path=self._path, offset=at)

    def _count(self, at: int) -> None:
        self._left -= 1
        if self._left < 0:
            raise self.error(at, f"more than {_MOST_FIELDS} fields")


def signed(value: int) -> int:
    """The int64 that has these 64 bits."""
    return value - (1 << 64) if value >> 63 else value
