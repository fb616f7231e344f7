"""Keys and values of one session in memory of the host, in the shapes that its graphs take.

FixedCache     an array of all positions for each layer's keys and values; new ones are written
               at their position: by the graph itself, or by the host
GrowingCache   the graph makes arrays that are one run longer out of those that there are: two
               buffers of each, which change places
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

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
    """What a cache holds. dtype: as numpy calls it. keys_last: keys lie with their positions last,
    (1, heads, head_dim, positions); values, and keys otherwise, as (1, heads, positions, head_dim).
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
        """Where positions are in each array: of layer 0's keys, its values, layer 1's keys..."""
        return [3 if self.keys_last else 2, 2] * self.n_layers

    def shape(self, axis: int, n: int) -> tuple[int, int, int, int]:
        """Of an array of n positions."""
        if axis == 3:
            return 1, self.n_kv_heads, self.head_dim, n
        return 1, self.n_kv_heads, n, self.head_dim


class HostCache(ABC):
    """A session's keys and values, see `edge.backend.Cache`.

    tokens: those that it holds; limit: the most. A page is PAGE positions of every array one after
    the other, zeros where there are no more. bindings: what runs have bound for it.
    Raises UnsupportedError for a context that should slide, MemoryBudgetError.
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
        """How many tokens it holds."""
        return len(self.tokens)

    @property
    def n_pages(self) -> int:
        """Pages that its tokens take."""
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
        for there, inside in zip(self._slices(start, n), self._inside(page, n), strict=True):
            inside[:] = there
        return memoryview(page.data).toreadonly()

    def unseen(self, length: int) -> Sequence[range]:
        """Pages that no token behind the first `length` sees: none."""
        return [range(0)]

    def holds(self, length: int) -> bool:
        """Whether `trim` to this length keeps it all: always."""
        return True

    def room(self, n_tokens: int) -> int:
        """How many of n_tokens the next run may take: all."""
        return n_tokens

    def reserve(self, n_tokens: int) -> None:
        """Raise ContextError when it cannot hold n_tokens in all, InputError once closed."""
        self.check_open()
        if n_tokens > self.limit:
            raise too_many(n_tokens, self.limit)

    def append(self, tokens: Sequence[int]) -> None:
        """The tokens were run: they are in the cache now."""
        self.tokens.extend(tokens)

    def adopt(self, tokens: Sequence[int]) -> int:
        """Nothing is shared between caches; the length."""
        self.check_open()
        return self.length

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens. Raises InputError for more than there are."""
        if not 0 <= length <= self.length:
            raise InputError(f"the cache holds {self.length} tokens, cannot keep {length}")
        del self.tokens[length:]

    def fork(self) -> HostCache:
        """Another cache with a copy of the content. Raises MemoryBudgetError."""
        self.check_open()
        twin = type(self)(self.layout, self.limit, self.when_full)
        twin._begin(self.length)
        n = self.length
        for mine, its in zip(self._slices(0, n), twin._slices(0, n), strict=True):
            its[:] = mine
        twin.tokens = self.tokens[:]
        return twin

    def keep(self, n_tokens: int) -> int:
        """Raise InputError: there is nowhere to keep them."""
        raise InputError("an ONNX model keeps no prompts: save the session instead")

    def restore(self, tokens: Sequence[int], pages: Sequence[bytes | memoryview | None]) -> None:
        """Fill an empty cache with another's tokens and pages.

        Raises InputError for pages that cannot be those of the tokens, ContextError.
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
            for there, inside in zip(self._slices(i * PAGE, n), self._inside(page, n), strict=True):
                there[:] = inside
        self.append(tokens)

    def close(self) -> None:
        """Give the memory back."""
        self._closed = True
        self.tokens = array("i")
        self.bindings = {}
        self._free()

    def check_open(self) -> None:
        """Raise InputError once closed."""
        if self._closed:
            raise InputError("the session was closed")

    def _slices(self, start: int, n: int) -> list[Array]:
        """n positions of each array."""
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
        """Empty, be ready for `length` positions to be written."""

    @abstractmethod
    def _arrays(self) -> list[Array]:
        """The arrays as they are now, in the order of `ArrayLayout.axes`."""

    @abstractmethod
    def _free(self) -> None:
        """Drop the memory."""


class FixedCache(HostCache):
    """Arrays of all positions.

    arrays: in the order of `ArrayLayout.axes`; positions behind `length` hold zeros, or what was
    there once.
    """

    arrays: list[Array]

    def write(self, start: int, n: int, new: Sequence[Array]) -> None:
        """Put the first n positions of new arrays at start."""
        places = {axis: (_positions(axis, start, n), _positions(axis, 0, n)) for axis in (2, 3)}
        for axis, whole, piece in zip(self._axes, self.arrays, new, strict=True):
            there, here = places[axis]
            whole[there] = piece[here]

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
    """Zeros that start at a cache line, as those of numpy need not: attention reads them faster."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    block = np.zeros(n_bytes + _LINE, np.uint8)
    start = -block.ctypes.data % _LINE
    return block[start : start + n_bytes].view(dtype).reshape(shape)


class GrowingCache(HostCache):
    """Two buffers of all positions for each array, filled in the shape of as many as there are.

    What is held changes in one assignment, so that an interrupt finds it whole.
    """

    _held: tuple[list[Array], list[Array], int]  # buffers in use, the others, positions

    def step(self, start: int, n: int) -> tuple[list[Array], list[Array]]:
        """For a run of n tokens behind the first `start`: what there is, and where it goes with
        the new ones.
        """
        now, other, filled = self._held
        if filled != start:  # it was cut
            kept = self._slices(0, start)
            for there, piece in zip(self._shaped(other, start), kept, strict=True):
                there[:] = piece
            self._held = now, other, _ = other, now, start
        return self._shaped(now, start), self._shaped(other, start + n)

    def ran(self, length: int) -> None:
        """The run ended well: the cache is what it made."""
        now, other, _ = self._held
        self._held = other, now, length

    def _allocate(self) -> None:
        size = self.layout.n_kv_heads * self.layout.head_dim * self.limit
        now, other = (
            [np.empty(size, self.layout.dtype) for _ in self.layout.axes] for _ in range(2)
        )
        self._held = now, other, 0

    def _begin(self, length: int) -> None:
        now, other, _ = self._held
        self._held = now, other, length

    def _arrays(self) -> list[Array]:
        now, _, filled = self._held
        return self._shaped(now, filled)

    def _shaped(self, buffers: list[Array], n: int) -> list[Array]:
        layout = self.layout
        size = layout.n_kv_heads * layout.head_dim * n
        return [
            buffer[:size].reshape(layout.shape(axis, n))
            for axis, buffer in zip(layout.axes, buffers, strict=True)
        ]

    def _free(self) -> None:
        self._held = [], [], 0


def _positions(axis: int, start: int, n: int) -> tuple[slice, ...]:
    """An index of n positions on an axis."""
    return (*(slice(None),) * axis, slice(start, start + n))
