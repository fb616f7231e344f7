"""Reads the bytes of a GGUF file, one checked step after the other; gguf.py is built on it."""

from __future__ import annotations

import mmap
import os
import stat
import struct
import sys
from typing import Any, NamedTuple

from edge.errors import ModelFileError, UnsupportedError

__all__ = ["MAX_KEYS", "STRING", "Array", "Reader", "shown"]

MAX_BYTES = 64 << 20  # of one string, or of one array
MAX_ITEMS = 1 << 22  # of one array; the largest vocabularies have about 600,000 merges
MAX_KEYS = 65_536  # of a file; also the most arrays, those inside arrays included
MAX_DEPTH = 4  # of arrays in arrays

#: The value types by their numbers in the file.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = range(10)
UINT64, INT64, FLOAT64 = 10, 11, 12
#: Value types of fixed size -> their codes for `struct`.
_FIXED = (UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, UINT64, INT64, FLOAT64)
_SCALARS = dict(zip(_FIXED, "BbHhIifBQqd", strict=True))
_U64 = struct.Struct("<Q").unpack_from


class Array(NamedTuple):
    """An array whose extent is checked, and whose items are not decoded yet."""

    kind: int  # value type of the items
    n: int
    offset: int  # of the first item, bytes from the start of the file
    inner: tuple[Array, ...] = ()  # the items, where these are arrays


class Reader:
    """A position in a mapped file; every step is checked before it is made. Its methods raise
    ModelFileError.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.map = _map_file(path)
        self.size = len(self.map)
        self.pos = 0
        self.n_arrays = 0

    def error(self, message: str, field: str, offset: int | None = None) -> ModelFileError:
        """The error to raise. offset: bytes from the start, None: the current position."""
        at = self.pos if offset is None else offset
        return ModelFileError(message, path=self.path, offset=at, field=field)

    def need(self, n_bytes: int, field: str) -> None:
        """Raise ModelFileError unless so many bytes follow."""
        if n_bytes > self.size - self.pos:
            raise self.error(
                f"needs {n_bytes} bytes, {self.size - self.pos} are left: is the file truncated?",
                field,
            )

    def scalar(self, code: str, field: str) -> Any:
        """One number. code: its type, as in `struct`."""
        n_bytes = struct.calcsize("<" + code)
        self.need(n_bytes, field)
        (value,) = struct.unpack_from("<" + code, self.map, self.pos)
        self.pos += n_bytes
        return value

    def count(self, limit: int, field: str, code: str = "Q") -> int:
        """A count of at most `limit`."""
        at = self.pos
        n: int = self.scalar(code, field)
        if n > limit:
            raise self.error(f"{n} is more than the limit of {limit}", field, at)
        return n

    def string(self, field: str, limit: int = MAX_BYTES) -> str:
        """A string of at most `limit` bytes."""
        n = self.count(limit, field)
        self.need(n, field)
        start, self.pos = self.pos, self.pos + n
        try:
            return self.map[start : self.pos].decode()
        except UnicodeDecodeError as e:
            raise self.error("the string is not UTF-8", field, start + e.start) from None

    def value(self, field: str) -> Any:
        """A metadata value: str, bool, int, float, or an Array."""
        at = self.pos
        kind = self.scalar("I", field)
        if kind == STRING:
            return self.string(field)
        if kind == ARRAY:
            return self.array(field, self.pos + MAX_BYTES)
        if kind not in _SCALARS:
            raise self.error(f"there is no value type {kind}", field, at)
        value = self.scalar(_SCALARS[kind], field)
        if kind == BOOL:
            if value > 1:
                raise self.error(f"{value} is neither true (1) nor false (0)", field, self.pos - 1)
            return bool(value)
        return value

    def array(self, field: str, end: int, depth: int = 1) -> Array:
        """Step over an array, which must end at byte `end` or before, and check its extent."""
        self.n_arrays += 1
        if self.n_arrays > MAX_KEYS or depth > MAX_DEPTH:
            raise self.error("too many arrays within arrays", field)
        at = self.pos
        kind = self.scalar("I", field)
        n = self.count(MAX_ITEMS, field)
        start, inner = self.pos, list[Array]()
        if kind == STRING:
            self._skip_strings(n, min(end, self.size), field)
        elif kind == ARRAY:
            for _ in range(n):
                inner.append(self.array(field, end, depth + 1))
        elif kind in _SCALARS:
            n_bytes = n * struct.calcsize("<" + _SCALARS[kind])
            self.need(n_bytes, field)
            self.pos += n_bytes
            if kind == BOOL and self.map[start : self.pos].strip(b"\0\1"):
                raise self.error("a bool is neither true (1) nor false (0)", field, start)
        else:
            raise self.error(f"there is no value type {kind}", field, at)
        if self.pos > end:
            raise self.error(f"the array has more than {MAX_BYTES} bytes", field, at)
        return Array(kind, n, start, tuple(inner))

    def _skip_strings(self, n: int, end: int, field: str) -> None:
        """Step over n strings, which must end at byte `end` or before.

        The loop only adds lengths; unpack_from raises where it leaves the file. Vocabularies have
        200,000 strings, and opening a file spends most of its time here.
        """
        pos, data = self.pos, self.map
        try:
            for _ in range(n):
                pos += 8 + _U64(data, pos)[0]
        except (struct.error, OverflowError):
            pos = end + 1
        if pos <= end:
            self.pos = pos
            return
        for i in range(n):  # once more, slowly, to find the string that is wrong
            item, at = f"{field}[{i}]", self.pos
            length = self.count(MAX_BYTES, item)
            self.need(length, item)
            self.pos += length
            if self.pos > end:
                raise self.error(f"the array has more than {MAX_BYTES} bytes", item, at)

    def decode(self, array: Array, field: str) -> list[Any]:
        """The items of an array that `array` has stepped over."""
        if self.map.closed:
            raise ModelFileError("the file was closed", path=self.path, field=field)
        if array.kind == STRING:
            return self._decode_strings(array.n, array.offset, field)
        if array.kind == ARRAY:
            return [self.decode(item, field) for item in array.inner]
        items = struct.unpack_from(f"<{array.n}{_SCALARS[array.kind]}", self.map, array.offset)
        return [item == 1 for item in items] if array.kind == BOOL else list(items)

    def _decode_strings(self, n: int, pos: int, field: str) -> list[str]:
        data, out = self.map, list[str]()
        add = out.append
        try:
            for _ in range(n):
                start = pos + 8
                pos = start + _U64(data, pos)[0]
                add(data[start:pos].decode())
        except UnicodeDecodeError as e:
            field, start = f"{field}[{len(out)}]", start + e.start
            raise self.error("the string is not UTF-8", field, start) from None
        except (struct.error, OverflowError):  # the lengths were right when `array` checked them
            raise self.error("the file was changed while it was open", field, pos) from None
        return out


def shown(name: str) -> str:
    """A name from the file for a message: one line, short, without control characters."""
    return name if name.isprintable() and len(name) <= 100 else ascii(name[:100])


def _map_file(path: str) -> mmap.mmap:
    """Map a regular file that is not empty, read-only."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ModelFileError(
                "is a folder: name the .gguf file in it (this command takes no ONNX graphs)",
                path=path,
            )
        if not stat.S_ISREG(mode):
            raise ModelFileError("this is not a regular file, it cannot be mapped", path=path)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise ModelFileError("the file is empty", path=path)
            if size > sys.maxsize:
                raise UnsupportedError(
                    f"{path}: {size / 2**30:.2f} GiB are more than a 32-bit process can map: take "
                    "a smaller file, the same file split, or a 64-bit system",
                    what="a file of 2 GiB or more",
                )
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError("there is no such file", path=path) from None
    except OSError as e:
        raise ModelFileError(f"cannot be opened: {e.strerror or e}", path=path) from None
    except ValueError as e:  # a NUL in the path
        raise ModelFileError(f"cannot be opened: {e}", path=path) from None
