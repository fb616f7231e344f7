"""The KV cache of one session."""

from __future__ import annotations

from typing import Any

from edge import native
from edge.errors import ContextError, InputError, MemoryBudgetError
from edge.memory import available, show
from edge.models.common import Config
from edge.native import ffi, lib

__all__ = ["KVCache", "cache_bytes"]


def cache_bytes(config: Config, n_tokens: int) -> int:
    """Bytes of keys and values of n_tokens positions."""
    return int(lib.edge_cache_bytes(config.n_layers, config.n_kv_heads, config.head_dim, n_tokens))


class KVCache:
    """Keys and values of the tokens of one session, in pages of 64 positions that come as needed.

    length: how many tokens it holds. A cached key was rotated for its position, so tokens can be
    dropped from the end only.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.limit = config.n_context
        self.length = 0
        out, error = ffi.new("edge_cache **"), ffi.new("edge_error *")
        status = lib.edge_cache_new(
            config.n_layers, config.n_kv_heads, config.head_dim, self.limit, out, error
        )
        native.check(status, error)
        self._handle: Any = ffi.gc(out[0], lib.edge_cache_free)

    @property
    def handle(self) -> Any:
        """The edge_cache. Raises InputError once closed."""
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
        error = ffi.new("edge_error *")
        status = lib.edge_cache_reserve(self.handle, n_tokens, error)
        if status == lib.EDGE_NO_MEMORY:
            needed = cache_bytes(self._config, n_tokens)
            raise MemoryBudgetError(
                f"no memory for keys and values of {n_tokens} tokens, {show(needed)} in all",
                needed=needed,
                budget=available() or 0,
                parts={"keys and values": needed},
            )
        native.check(status, error)

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises InputError for more than there are."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        self.length = length

    def close(self) -> None:
        """Give the memory back."""
        if self._handle is not None:
            ffi.release(self._handle)
            self._handle = None
