"""GGUF files written by hand, byte by byte, so that they can be wrong."""

from __future__ import annotations

import struct
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = dict(
    zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True)
)


def string(text: str | bytes) -> bytes:
    """u64 length and bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, x: Any) -> bytes:
    """A value without its type; x of an array: (item kind, items)."""
    if kind == STRING:
        return string(x)
    if kind == ARRAY:
        item, items = x
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, i) for i in items)
    return struct.pack("<" + _CODES[kind], x)


def key(name: str | bytes, kind: int, x: Any) -> bytes:
    """A metadata entry; x as bytes for a kind that is no string: the raw payload."""
    raw = x if isinstance(x, bytes) and kind != STRING else value(kind, x)
    return string(name) + struct.pack("<I", kind) + raw


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor's description; dims as on disk, fastest first."""
    head = string(name) + struct.pack("<I", len(dims))
    return head + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def header(n_tensors: int, n_keys: int, version: int = 3) -> bytes:
    """The first 24 bytes."""
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def gguf(
    keys: list[bytes] | tuple[()] = (),
    tensors: list[bytes] | tuple[()] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file."""
    head = header(len(tensors), len(keys), version) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % alignment) + data


def sample() -> bytes:
    """A right file with every value type and several tensors, about 900 bytes."""
    keys = [
        key("u8", U8, 200),
        key("i8", I8, -100),
        key("u16", U16, 60000),
        key("i16", I16, -30000),
        key("u32", U32, 4 * 10**9),
        key("i32", I32, -(2 * 10**9)),
        key("f32", F32, 0.5),
        key("yes", BOOL, True),
        key("text", STRING, "Grüße, 世界"),
        key("words", ARRAY, (STRING, ["", "a", "é\0", "世界" * 9])),
        key("bools", ARRAY, (BOOL, [True, False])),
        key("floats", ARRAY, (F32, [1.0, -2.5])),
        key("none", ARRAY, (U32, [])),
        key("nested", ARRAY, (ARRAY, [(I16, [1, -2]), (STRING, ["x"]), (ARRAY, [(U8, [3])])])),
        key("u64", U64, 2**63),
        key("i64", I64, -(2**63)),
        key("f64", F64, 0.1),
        key("general.alignment", U32, 64),
    ]
    tensors = [
        tensor("vector", (3,), 0, 128),  # F32, 12 bytes
        tensor("matrix", (32, 2), 2, 0),  # Q4_0, 36 bytes
        tensor("cube", (2, 3, 2), 1, 64),  # F16, 24 bytes
    ]
    return gguf(keys, tensors, bytes(range(140)), alignment=64)
