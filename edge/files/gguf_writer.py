"""The bytes of a GGUF header, version 3. `edge.files.gguf` says how it is laid out."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edge.files.gguf import Metadata
from edge.files.gguf_reader import ARRAY, STRING, UINT64

__all__ = ["TensorEntry", "add_tensors", "copied", "entry", "numbers", "start", "string", "strings"]


class TensorEntry(NamedTuple):
    """A tensor in a header. shape: rows first; type: its number in the file; offset: of its data,
    bytes from the start of all data.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def string(text: str) -> bytes:
    """A string: its length, and its UTF-8."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    """A key of this value type."""
    return string(key) + struct.pack("<I", kind) + value


def strings(key: str, values: Sequence[str]) -> bytes:
    """A key whose value is an array of strings."""
    head = struct.pack("<IQ", STRING, len(values))
    return entry(key, ARRAY, head + b"".join(map(string, values)))


def numbers(key: str, values: Sequence[int]) -> bytes:
    """A key whose value is an array of whole numbers."""
    n = len(values)
    return entry(key, ARRAY, struct.pack(f"<IQ{n}Q", UINT64, n, *values))


def copied(metadata: Metadata, raw: memoryview, is_kept: Callable[[str], bool]) -> list[bytes]:
    """The entries of those keys of another file that are kept, byte for byte. raw: its header."""
    spans = [metadata.span(key) for key in metadata if is_kept(key)]
    return [bytes(raw[span.start : span.end]) for span in spans]


def start(n_tensors: int, entries: Sequence[bytes]) -> bytearray:
    """A header up to its tensors."""
    head = bytearray(b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(entries)))
    return head + b"".join(entries)


def add_tensors(head: bytearray, tensors: Sequence[TensorEntry], alignment: int) -> None:
    """Append the tensors, and the padding up to their data."""
    for tensor in tensors:
        dims = tensor.shape[::-1]
        head += string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", tensor.type, tensor.offset)
    head += bytes(-len(head) % alignment)
