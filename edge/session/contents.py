"""What the records of a session file say, see `edge.session.file`, and how large they can be."""

from __future__ import annotations

import json
import struct
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

from edge.errors import brief
from edge.kv.shape import PAGE, pages_of

__all__ = ["RECORD", "Bytes", "Contents", "Kind", "Part", "Record", "check_size", "take"]

Bytes: TypeAlias = "bytes | memoryview"

#: A record's header: mark, kind, a, b, n_bytes, batch, sum, left, crc.
RECORD = struct.Struct("<4sIQQQQQQII")

_MOST_JSON = 16 << 20  # bytes of a META or STATE record
_MOST_TOKENS = 1 << 23  # of a session: a week of answers


class Kind(IntEnum):
    """What a record holds."""

    META = 1
    TOKENS = 2
    PAGE = 3
    STATE = 4


def check_size(kind: int, n_bytes: int) -> None:
    """Raise ValueError for an unknown kind of record, and for a payload that is larger than the
    kind allows. A page may have any size: that depends on the model.
    """
    if kind not in list(Kind):
        raise ValueError(f"a record of kind {kind}")
    most = {Kind.PAGE: n_bytes, Kind.TOKENS: 4 * _MOST_TOKENS}.get(Kind(kind), _MOST_JSON)
    if n_bytes > most:
        raise ValueError(f"{Kind(kind).name} of {n_bytes} bytes, the most is {most}")


def take(values: Mapping[str, Any], key: str, *kinds: type) -> Any:
    """A value out of JSON. Raises ValueError where it is missing, or of another type."""
    value = values.get(key)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{key} is {brief(value)}")
    return value


class Part(NamedTuple):
    """One record to write. a, b: as `edge.session.file` draws them."""

    kind: Kind
    a: int
    b: int
    data: Bytes

    @classmethod
    def json(cls, kind: Kind, value: dict[str, Any]) -> Part:
        """A META or STATE record. Raises TypeError, ValueError for what JSON cannot hold."""
        return cls(kind, 0, 0, json.dumps(value, separators=(",", ":")).encode())

    @classmethod
    def tokens(cls, start: int, ids: Sequence[int]) -> Part:
        """Tokens from a position on."""
        return cls(Kind.TOKENS, start, 0, struct.pack(f"<{len(ids)}i", *ids))


class Record(NamedTuple):
    """A record of a file. at: position of its header."""

    at: int
    kind: int
    a: int
    b: int
    n_bytes: int
    batch: int
    sum: tuple[int, int]
    left: int

    @property
    def end(self) -> int:
        """Position behind its payload."""
        return self.at + RECORD.size + self.n_bytes


@dataclass
class Contents:
    """What the records up to `end` say. tokens: ids; pages: number -> (record, positions that hold
    of it). Page i of layer group g has the number i * n_groups + g.
    """

    end: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    tokens: array[int] = field(default_factory=lambda: array("i"))
    pages: dict[int, tuple[Record, int]] = field(default_factory=dict)
    _json_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes of the file that are not obsolete, but for record headers."""
        pages = sum(record.n_bytes for record, _ in self.pages.values())
        return pages + 4 * len(self.tokens) + sum(self._json_bytes.values())

    @property
    def n_groups(self) -> int:
        """Layer groups that META tells of; what tells of none is of one."""
        kv = self.meta.get("kv")
        groups = kv.get("groups") if isinstance(kv, dict) else None
        return len(groups) if isinstance(groups, list) and groups else 1

    def copy(self) -> Contents:
        """A copy that can be changed without changing this one."""
        tokens, pages = self.tokens[:], dict(self.pages)
        return replace(self, tokens=tokens, pages=pages, _json_bytes=dict(self._json_bytes))

    def apply(self, record: Record, data: Bytes) -> None:
        """Do what a record says. data: its payload, empty for a page. Raises ValueError."""
        if record.kind == Kind.PAGE:
            start = record.a // self.n_groups * PAGE
            if not 0 < record.b <= PAGE or start + record.b > len(self.tokens):
                raise ValueError("a page of tokens that are not there")
            self.pages[record.a] = record, record.b
        elif record.kind == Kind.TOKENS:
            if record.a > len(self.tokens) or record.n_bytes % 4:
                raise ValueError("tokens behind a gap")
            if record.a + record.n_bytes // 4 > _MOST_TOKENS:
                raise ValueError(f"more than {_MOST_TOKENS} tokens")
            self._cut(record.a)
            ids = array("i")
            ids.frombytes(data)
            if sys.byteorder == "big":
                ids.byteswap()
            self.tokens.extend(ids)
        else:
            value = json.loads(bytes(data))
            if not isinstance(value, dict):
                raise ValueError("no JSON object")
            if record.kind == Kind.META:
                self.meta = value
            else:
                self.state = value
            self._json_bytes[record.kind] = record.n_bytes
        self.end = record.end

    def _cut(self, n_tokens: int) -> None:
        """A page keeps what it has of the first n_tokens: keys and values look back only."""
        n_groups = self.n_groups
        first, end = n_tokens // PAGE, pages_of(len(self.tokens))
        for number in range(first * n_groups, end * n_groups):
            record, n = self.pages.pop(number, (None, 0))
            left = min(n, n_tokens - number // n_groups * PAGE)
            if record is not None and left > 0:
                self.pages[number] = record, left
        del self.tokens[n_tokens:]
