"""What a rendering may still cost, and what a value weighs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from sys import getsizeof
from typing import TYPE_CHECKING, Any

from edge.errors import CancelledError

if TYPE_CHECKING:
    from edge.native.cancel import Cancel

__all__ = [
    "ITEM_BYTES",
    "Budget",
    "Limits",
    "Refused",
    "joined_bytes",
    "n_bytes",
    "running",
    "spending",
]

ITEM_BYTES = 64  # an entry of a list or dict, without what it refers to
_LIST_BYTES = 384  # a list or dict itself, and what is noted of it
_TICKS = 32  # of `tick`, between two looks at the clock
_MAX_NESTING = 100


#: Memory of a rendering, and more of it for each token of the context: templates make ten to
#: fifteen times the text of a conversation, of 5 bytes a token, or of 20 where one of its
#: characters takes 4.
_RENDER_BYTES, _RENDER_TOKEN_BYTES = 4 << 20, 320


@dataclass(frozen=True)
class Limits:
    """What compiling, and one rendering, may cost; a real template needs a small part of it.

    seconds: of the thread's CPU time: a busy machine takes nothing away.
    """

    seconds: float = 3.0
    steps: int = 1_000_000  # loop iterations, calls, filters
    value_bytes: int = 32 << 20  # one string or list, everything inside it counted; the output
    total_bytes: int = 128 << 20  # everything made, kept or not
    call_depth: int = 50  # macros inside macros
    source_chars: int = 48 << 10

    @classmethod
    def of_context(cls, n_tokens: int) -> Limits:
        """Those of conversations that fill a context; memory is planned for total_bytes."""
        total = _RENDER_BYTES + _RENDER_TOKEN_BYTES * n_tokens
        return cls(value_bytes=total // 2, total_bytes=total)


class Refused(Exception):
    """A bound was reached, or something is not allowed. One line."""


def n_bytes(text: str) -> int:
    """Memory of a text, without the object's own head (some 50 bytes)."""
    return getsizeof(text) - _EMPTY_BYTES


_EMPTY_BYTES = getsizeof("")


def joined_bytes(texts: Iterable[str], times: Iterable[int] = repeat(1)) -> int:
    """Memory of texts, each so many times, as one: its widest character makes all as wide."""
    length, width = 0, 1
    for text, n in zip(texts, times, strict=False):
        if text:
            length += n * len(text)
            width = max(width, n_bytes(text) // len(text))
    return length * width


class Budget:
    """Counts down; every method raises Refused when there is nothing left."""

    def __init__(self, limits: Limits, cancel: Cancel | None = None) -> None:
        self._limits, self._cancel = limits, cancel
        self._deadline = time.thread_time() + limits.seconds
        self._ticks = 0
        self._steps, self._bytes = limits.steps, limits.total_bytes
        self._depth = 0
        self._weights: dict[int, tuple[Any, int, int]] = {}  # id -> (it, kept alive; size, depth)

    def step(self) -> None:
        """One iteration, call or filter. Raises CancelledError."""
        self._steps -= 1
        if self._steps < 0:
            raise Refused(f"it took more than {self._limits.steps:,} steps")
        self.look()

    def look(self) -> None:
        """Look at the clock, and whether the call was cancelled. Raises CancelledError."""
        if time.thread_time() > self._deadline:
            raise Refused(f"it ran longer than {self._limits.seconds:g} s")
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError("the call was cancelled")

    def tick(self) -> None:
        """`look`, now and then: for what is cheap and happens often. Raises CancelledError."""
        self._ticks += 1
        if self._ticks % _TICKS == 0:
            self.look()

    def iterate(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values, a step each."""
        for value in values:
            self.step()
            yield value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """The values as a list; for loops that run inside C."""
        if isinstance(values, (list, tuple)):
            return list(values)
        self.reserve(ITEM_BYTES * len(values) if isinstance(values, str) else 0)
        return list(self.iterate(values))

    def reserve(self, size: int) -> None:
        """Ask before making one value of `size` bytes, or doing that many steps inside C."""
        limit = self._limits.value_bytes
        if size > limit:
            raise Refused(f"it makes or searches more than {limit >> 20} MiB at once")

    def charge(self, size: int) -> None:
        """Pay for `size` bytes that were made."""
        self.reserve(size)
        self._bytes -= size
        if self._bytes < 0:
            most = self._limits.total_bytes
            raise Refused(
                f"it makes more than {most >> 20} MiB of values: a conversation that fills the "
                "context needs less"
            )

    def made(self, value: Any) -> Any:
        """Pay for a new value and pass it on."""
        self.step()
        self.charge(self.size(value))
        return value

    def size(self, value: Any) -> int:
        """Bytes of a value, everything inside counted as often as it appears."""
        return self.weigh(value)[0]

    def weigh(self, value: Any, level: int = 0) -> tuple[int, int]:
        """(size in bytes, levels of nesting). A container is walked once per rendering."""
        if isinstance(value, str):
            return n_bytes(value), 0
        if not isinstance(value, (list, tuple, dict)):
            return ITEM_BYTES, 0
        known = self._weights.get(id(value))
        if known is not None:
            return known[1], known[2]
        size, depth = _LIST_BYTES, 1
        for part in _parts(value) if level <= _MAX_NESTING else ():
            inner, below = self.weigh(part, level + 1)
            size += ITEM_BYTES + inner
            depth = max(depth, below + 1)
            self.reserve(size)
        if level + depth > _MAX_NESTING:
            raise Refused(f"its values are nested more than {_MAX_NESTING} levels deep")
        self._weights[id(value)] = value, size, depth
        return size, depth

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call."""
        self.step()
        self._depth += 1
        if self._depth > self._limits.call_depth:
            raise Refused(f"its calls are nested more than {self._limits.call_depth} levels deep")
        yield
        self._depth -= 1


def _parts(value: Any) -> Iterable[Any]:
    """What is directly inside a list, tuple or dict."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    else:
        yield from value


class _Running(threading.local):
    budget: Budget | None = None


_running = _Running()


def running() -> Budget:
    """The budget of the rendering that this thread is in."""
    budget = _running.budget
    if budget is None:
        raise Refused("it runs outside a rendering")
    return budget


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Make `budget` this thread's own for the time of a rendering, or of compiling."""
    outer, _running.budget = _running.budget, budget
    try:
        yield
    finally:
        _running.budget = outer
