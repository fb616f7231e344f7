"""The shape of the cache of keys and values: what a page holds, and how much that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from edge import native
from edge.errors import ContextError
from edge.models.common import Config
from edge.native import ffi, lib

__all__ = ["PAGE", "KVShape", "WhenFull", "kv_types", "pages_of", "too_many"]

#: What a session does when its context is full, see `KVCache`.
WhenFull = Literal["stop", "slide"]

#: Positions of a page.
PAGE = int(lib.edge_page_positions())


def kv_types() -> list[str]:
    """The types that keys and values may be kept in, the most precise first."""
    names: list[str] = []
    while (name := lib.edge_kv_type_name(len(names))) != ffi.NULL:
        names.append(native.text(name))
    return names


def too_many(n_tokens: int, limit: int) -> ContextError:
    """The error of a cache that cannot hold so many."""
    return ContextError(
        f"{n_tokens} tokens are {n_tokens - limit} more than the context of {limit} holds",
        needed=n_tokens,
        limit=limit,
    )


@dataclass(frozen=True)
class KVShape:
    """What a page holds: positions of all layers and key heads, in one of `kv_types`."""

    type: str
    n_layers: int
    n_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Config, kv: str = "f16") -> KVShape:
        """The shape of a model's pages."""
        return cls(kv, config.n_layers, config.n_kv_heads, config.head_dim)

    @property
    def native(self) -> Any:
        """An edge_kv_shape."""
        numbers = [kv_types().index(self.type), self.n_layers, self.n_kv_heads, self.head_dim]
        return ffi.new("edge_kv_shape *", numbers)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, -1: the type cannot keep such heads."""
        return int(lib.edge_page_bytes(self.native))

    def bytes(self, n_tokens: int) -> int:
        """Bytes of the pages of n_tokens positions."""
        return pages_of(n_tokens) * self.page_bytes


def pages_of(n_tokens: int) -> int:
    """Pages that so many positions take."""
    return -(-n_tokens // PAGE)
