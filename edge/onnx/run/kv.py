"""Keys and values of one session in memory of the host, in the shapes of its graphs.

FixedCache     arrays of all positions, for each layer's keys and values. The graph, or the host,
               writes new keys and values at their position.
GrowingCache   the graph reads arrays of the past positions, and writes arrays that have the new
               positions, too. Each array has two buffers, which change places after a run.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from edge import check
from edge.errors import InputError, MemoryBudgetError, UnsupportedError
from edge.kv.shape import PAGE, WhenFull, too_many

__all__ = ["ArrayLayout", "FixedCache", "GrowingCache", "HostCache"]

Array = NDArray[Any]

_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class ArrayLayout:
    """The arrays of a cache. dtype: numpy's name.

    keys_last: the shape of keys is (1, heads, head_dim, positions). The shape of values, and of
    other keys, is (1, heads, positions, head_dim).
    """

    dtype: str
    n_layers: int
    n_kv_heads: int
    head_dim: int
    keys_last: bool = False

    @property
    def position_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        numbers = 2 * self.n_layers * self.n_kv_heads * self.head_dim
        return numbers * np.dtype(self.dtype).itemsize

    @property
    def axes(self) -> list[int]:
        """The axis of the positions in each array: layer 0's keys, its values, layer 1's keys..."""
        return [3 if self.keys_last else 2, 2] * self.n_layers

    def shape(self, axis: int, n: int) -> tuple[int, int, int, int]:
        """The shape of an array of n positions. axis: of the positions."""
        if axis == 3:
            return 1, self.n_kv_heads, self.head_dim, n
        return 1, self.n_kv_heads, n, self.head_dim


class HostCache(ABC):
    """A session's keys and values, see `edge.backend.Cache`.

    tokens: the tokens in the cache. limit: the largest number of them. bindings: the io bindings
    of its runs. A page is PAGE positions of every array, one array after the other; positions
    without a token are zeros. Raises UnsupportedError for a context that should slide,
    MemoryBudgetError.
    """

    n_groups = 1

    def __init__(self, layout: ArrayLayout, limit: int, when_full: WhenFull = "stop") -> None:
        check.choice("when_full", when_full, get_args(WhenFull))
        if when_full == "slide":
            raise UnsupportedError(
                "an ONNX model cannot slide: its graphs see all tokens that there are",
                what="when_full slide",
                supported=["when_full stop"],
            )
        self.layout, self.limit = layout, limit
        self.when_full: WhenFull = when_full
        self.tokens = array("i")
        self.bindings: dict[str, Any] = {}
        self._closed = False
        try:
            self._allocate()
        except MemoryError as e:
            needed = layout.position_bytes * limit
            raise MemoryBudgetError(
                f"no memory for keys and values of {limit} tokens", needed=needed, budget=0
            ) from e

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return len(self.tokens)

    @property
    def n_pages(self) -> int:
        """The number of pages of its tokens."""
        return -(-self.length // PAGE)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return PAGE * self.layout.position_bytes

    def has_page(self, number: int) -> bool:
        """Whether a page is in memory."""
        return 0 <= number < self.n_pages

    def page(self, number: int) -> memoryview:
        """The bytes of a page, a copy. Raises InputError for one that it does not have."""
        self.check_open()
        if not self.has_page(number):
            raise InputError(f"the cache has no page {number}")
        page = np.zeros(self.page_bytes, np.uint8)
        start = number * PAGE
        n = min(PAGE, self.length - start)
        for ours, piece in zip(self._slices(start, n), self._inside(page, n), strict=True):
            piece[:] = ours
        return memoryview(page.data).toreadonly()

    def unseen(self, length: int) -> Sequence[range]:
        """Pages that no token behind the first `length` sees: none."""
        return [range(0)]

    def holds(self, length: int) -> bool:
        """Whether `trim` to this length keeps it all: always."""
        return True

    def room(self, n_tokens: int) -> int:
        """The number of tokens that the next run may take: all n_tokens."""
        return n_tokens

    def reserve(self, n_tokens: int) -> None:
        """Raise ContextError if the cache cannot hold n_tokens in all, InputError once closed."""
        self.check_open()
        if n_tokens > self.limit:
            raise too_many(n_tokens, self.limit)

    def append(self, tokens: Sequence[int]) -> None:
        """Add tokens, whose keys and values a run has written."""
        self.tokens.extend(tokens)

    def adopt(self, tokens: Sequence[int]) -> int:
        """Return the length: these caches share no keys and values."""
        self.check_open()
        return self.length

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises InputError if the cache has fewer."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        del self.tokens[length:]

    def fork(self) -> HostCache:
        """A new cache with a copy of the content. Raises MemoryBudgetError."""
        self.check_open()
        copy = type(self)(self.layout, self.limit, self.when_full)
        copy._begin(self.length)
        n = self.length
        for source, target in zip(self._slices(0, n), copy._slices(0, n), strict=True):
            target[:] = source
        copy.tokens = self.tokens[:]
        return copy

    def keep(self, n_tokens: int) -> int:
        """Raise InputError: these caches have no store of prompts."""
        raise InputError("an ONNX model keeps no prompts: save the session instead")

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with the tokens and pages of another one.

        Raises InputError for pages that do not fit the tokens, ContextError.
        """
        if self.length or len(pages) != -(-len(tokens) // PAGE):
            raise InputError(f"{len(pages)} pages of {len(tokens)} tokens do not fill the cache")
        self.reserve(len(tokens))
        self._begin(len(tokens))
        for i, data in enumerate(pages):
            if data is None or memoryview(data).nbytes != self.page_bytes:
                raise InputError(f"page {i} is not one of {self.page_bytes} bytes")
            page = np.frombuffer(data, np.uint8)
            n = min(PAGE, len(tokens) - i * PAGE)
            for ours, piece in zip(self._slices(i * PAGE, n), self._inside(page, n), strict=True):
                ours[:] = piece
        self.append(tokens)

    def close(self) -> None:
        """Free the memory."""
        self._closed = True
        self.tokens = array("i")
        self.bindings = {}
        self._free()

    def check_open(self) -> None:
        """Raise InputError once closed."""
        if self._closed:
            raise InputError("the session was closed")

    def _slices(self, start: int, n: int) -> list[Array]:
        """The positions start..start + n - 1 of each array."""
        return [
            array[_positions(axis, start, n)]
            for axis, array in zip(self.layout.axes, self._arrays(), strict=True)
        ]

    def _inside(self, page: Array, n: int) -> list[Array]:
        """The first n positions of each array in a page (page_bytes,)."""
        parts = page.view(self.layout.dtype).reshape(2 * self.layout.n_layers, -1)
        return [
            part.reshape(self.layout.shape(axis, PAGE))[_positions(axis, 0, n)]
            for axis, part in zip(self.layout.axes, parts, strict=True)
        ]

    @abstractmethod
    def _allocate(self) -> None:
        """Take the memory. Raises MemoryError."""

    @abstractmethod
    def _begin(self, length: int) -> None:
        """Prepare an empty cache for writing `length` positions."""

    @abstractmethod
    def _arrays(self) -> list[Array]:
        """The current arrays, in the order of `ArrayLayout.axes`."""

    @abstractmethod
    def _free(self) -> None:
        """Drop the arrays."""


class FixedCache(HostCache):
    """Arrays of all positions.

    arrays: in the order of `ArrayLayout.axes`. Positions behind `length` hold zeros or old values.
    """

    arrays: list[Array]

    def write(self, start: int, n: int, new: Sequence[Array]) -> None:
        """Write the first n positions of new arrays to the positions from `start` on."""
        indices = {axis: (_positions(axis, start, n), _positions(axis, 0, n)) for axis in (2, 3)}
        for axis, whole, piece in zip(self._axes, self.arrays, new, strict=True):
            target, source = indices[axis]
            whole[target] = piece[source]

    def _allocate(self) -> None:
        layout, self._axes = self.layout, self.layout.axes
        self.arrays = [_zeros(layout.shape(axis, self.limit), layout.dtype) for axis in self._axes]

    def _begin(self, length: int) -> None:
        pass

    def _arrays(self) -> list[Array]:
        return self.arrays

    def _free(self) -> None:
        self.arrays = []


def _zeros(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeros that begin at a cache line, unlike numpy's own: attention reads these faster."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    block = np.zeros(n_bytes + _LINE, np.uint8)
    start = -block.ctypes.data % _LINE
    return block[start : start + n_bytes].view(dtype).reshape(shape)


class _Buffers(NamedTuple):
    """used: buffers of the current arrays. spare: buffers for the next run. filled: positions."""

    used: list[Array]
    spare: list[Array]
    filled: int


class GrowingCache(HostCache):
    """Two buffers for each array, as large as all positions; arrays use the first part of them.

    `_held` changes in one assignment, so that an interrupt never finds it half changed.
    """

    _held: _Buffers

    def step(self, start: int, n: int) -> tuple[list[Array], list[Array]]:
        """The arrays for a run of n tokens behind the first `start`.

        The first ones have the past positions, to read; the second ones also the new positions, to
        write.
        """
        used, spare, filled = self._held
        if filled != start:  # the cache was trimmed
            kept = self._slices(0, start)
            for target, piece in zip(self._shaped(spare, start), kept, strict=True):
                target[:] = piece
            used, spare = spare, used
            self._held = _Buffers(used, spare, start)
        return self._shaped(used, start), self._shaped(spare, start + n)

    def ran(self, length: int) -> None:
        """Take over the arrays that a run wrote, after it succeeded."""
        used, spare, _ = self._held
        self._held = _Buffers(spare, used, length)

    def _allocate(self) -> None:
        size = self.layout.n_kv_heads * self.layout.head_dim * self.limit
        used, spare = (
            [np.empty(size, self.layout.dtype) for _ in self.layout.axes] for _ in range(2)
        )
        self._held = _Buffers(used, spare, 0)

    def _begin(self, length: int) -> None:
        self._held = self._held._replace(filled=length)

    def _arrays(self) -> list[Array]:
        used, _, filled = self._held
        return self._shaped(used, filled)

    def _shaped(self, buffers: list[Array], n: int) -> list[Array]:
        layout = self.layout
        size = layout.n_kv_heads * layout.head_dim * n
        return [
            buffer[:size].reshape(layout.shape(axis, n))
            for axis, buffer in zip(layout.axes, buffers, strict=True)
        ]

    def _free(self) -> None:
        self._held = _Buffers([], [], 0)


def _positions(axis: int, start: int, n: int) -> tuple[slice, ...]:
    """The index of the positions start..start + n - 1 on an axis."""
    return (*(slice(None),) * axis, slice(start, start + n))
