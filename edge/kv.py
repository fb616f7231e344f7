"""The KV cache of one session."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edge import memory, native
from edge.errors import ContextError, InputError, MemoryBudgetError
from edge.models.common import Config
from edge.native import ffi, lib

__all__ = ["KVCache", "KVShape", "kv_types"]


def kv_types() -> list[str]:
    """The types that keys and values may be kept in, the most precise first."""
    names: list[str] = []
    while (name := lib.edge_kv_type_name(len(names))) != ffi.NULL:
        names.append(native.text(name))
    return names


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
        return -(-n_tokens // int(lib.edge_page_positions())) * self.page_bytes


class KVCache:
    """Keys and values of the tokens of one session, in pages that come as needed.

    length: how many tokens it holds. A cached key was rotated for its position, so tokens can be
    dropped from the end only.
    """

    def __init__(self, shape: KVShape, limit: int) -> None:
        self.shape, self.limit = shape, limit
        self.tokens: list[int] = []
        self._pages: list[mmap.mmap] = []
        self._views: list[Any] = []
        self._table = ffi.new("void *[]", -(-limit // lib.edge_page_positions()))
        self._handle: Any = ffi.new("edge_kv *", {"pages": self._table})
        self._handle.shape = shape.native[0]

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return len(self.tokens)

    @property
    def handle(self) -> Any:
        """The edge_kv. Raises InputError once closed."""
        if self._handle is None:
            raise InputError("the session was closed")
        return self._handle

    def reserve(self, n_tokens: int) -> None:
        """Make room for n_tokens in all. Raises ContextError, MemoryBudgetError."""
        if n_tokens > self.limit:
            raise ContextError(
                f"{n_tokens} tokens are {n_tokens - self.limit} more than the context of "
                f"{self.limit} holds",
                needed=n_tokens,
                limit=self.limit,
            )
        handle = self.handle
        while len(self._pages) * lib.edge_page_positions() < n_tokens:
            try:
                page = memory.anonymous(self.shape.page_bytes)
            except (OSError, MemoryError) as error:
                needed = self.shape.bytes(n_tokens)
                raise MemoryBudgetError(
                    f"no memory for keys and values of {n_tokens} tokens, "
                    f"{memory.show(needed)} in all",
                    needed=needed,
                    budget=memory.available() or 0,
                    parts={"keys and values": needed},
                ) from error
            view = ffi.from_buffer("uint8_t[]", page)
            self._table[len(self._pages)] = view
            self._pages.append(page)
            self._views.append(view)
            handle.n_pages = len(self._pages)

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were run: they are in the cache now."""
        self.tokens += tokens

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises InputError for more than there are."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        del self.tokens[length:]

    def close(self) -> None:
        """Give the memory back."""
        self._handle = None
        for view, page in zip(self._views, self._pages, strict=True):
            ffi.release(view)
            page.close()
        self._views, self._pages = [], []
