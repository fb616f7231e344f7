"""What a rendering may still cost, and the size of a value."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from sys import getsizeof
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.errors import CancelledError

if TYPE_CHECKING:
    from edge.native.cancel import Cancel

__all__ = [
    "ITEM_BYTES",
    "LIST_BYTES",
    "Budget",
    "Limits",
    "Refused",
    "joined_bytes",
    "n_bytes",
    "running",
    "spending",
]

ITEM_BYTES = 64  # an entry of a list or dict, without the value that it refers to
LIST_BYTES = 384  # a list or dict itself, and its entry in Budget._weights
_TICKS = 32  # calls of `tick` between two checks of the clock
_MAX_NESTING = 100


#: Memory of a rendering, and further memory for each token of the context. Templates make ten to
#: fifteen times the text of a conversation; a token has 5 bytes of text, or 20 where one character
#: of the text takes 4 bytes.
_RENDER_BYTES, _RENDER_TOKEN_BYTES = 4 << 20, 320


@dataclass(frozen=True)
class Limits:
    """What compiling, and one rendering, may cost; a real template needs a small part of it.

    seconds: CPU time of the thread, so that a busy machine does not matter.
    """

    seconds: float = 3.0
    steps: int = 1_000_000  # loop iterations, calls, filters
    value_bytes: int = 32 << 20  # one string or list with everything inside it; the output
    total_bytes: int = 128 << 20  # all values that are made, kept or not
    call_depth: int = 50  # macros inside macros
    source_chars: int = 48 << 10

    @classmethod
    def of_context(cls, n_tokens: int) -> Limits:
        """Limits for conversations that fill a context of n_tokens; memory is planned for
        total_bytes.
        """
        total = _RENDER_BYTES + _RENDER_TOKEN_BYTES * n_tokens
        return cls(value_bytes=total // 2, total_bytes=total)


class Refused(Exception):
    """A bound was reached, or something is not allowed. The message is one line."""


def n_bytes(text: str) -> int:
    """Memory of a text, without the head of the object (about 50 bytes)."""
    return getsizeof(text) - _EMPTY_BYTES


_EMPTY_BYTES = getsizeof("")


def joined_bytes(texts: Iterable[str], times: Iterable[int] = repeat(1)) -> int:
    """Memory of some texts joined into one, each repeated so many times.

    Every character of a text takes as many bytes as its widest one.
    """
    length, width = 0, 1
    for text, n in zip(texts, times, strict=False):
        if text:
            length += n * len(text)
            width = max(width, n_bytes(text) // len(text))
    return length * width


class _Weighed(NamedTuple):
    """A container, kept alive so that its id is not reused; its bytes, its levels of nesting."""

    value: Any
    size: int
    depth: int


class Budget:
    """Counts down what a rendering may still cost; every method raises Refused beyond a limit."""

    def __init__(self, limits: Limits, cancel: Cancel | None = None) -> None:
        self._limits, self._cancel = limits, cancel
        self._deadline = time.thread_time() + limits.seconds
        self._ticks = 0
        self._steps, self._bytes = limits.steps, limits.total_bytes
        self._depth = 0
        self._weights: dict[int, _Weighed] = {}  # id of a container -> its size

    def step(self) -> None:
        """Pay for one iteration, call or filter. Raises CancelledError."""
        self._steps -= 1
        if self._steps < 0:
            raise Refused(f"it took more than {self._limits.steps:,} steps")
        self.look()

    def look(self) -> None:
        """Check the clock, and whether the call was cancelled. Raises CancelledError."""
        if time.thread_time() > self._deadline:
            raise Refused(f"it ran longer than {self._limits.seconds:g} s")
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError("the call was cancelled")

    def tick(self) -> None:
        """`look` at every 32nd call: for cheap steps that happen often. Raises CancelledError."""
        self._ticks += 1
        if self._ticks % _TICKS == 0:
            self.look()

    def iterate(self, values: Iterable[Any]) -> Iterator[Any]:
        """The same values; each costs a step."""
        for value in values:
            self.step()
            yield value

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """The values as a list: for functions of C that loop over it."""
        if isinstance(values, (list, tuple)):
            return list(values)
        self.reserve(ITEM_BYTES * len(values) if isinstance(values, str) else 0)
        return list(self.iterate(values))

    def reserve(self, size: int) -> None:
        """Refuse a value of more than value_bytes before it is made, or as many steps inside C."""
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
        """Bytes of a value; everything inside it counts as often as it appears."""
        return self.weigh(value)[0]

    def weigh(self, value: Any, level: int = 0) -> tuple[int, int]:
        """(size in bytes, levels of nesting). A container is walked once per rendering."""
        if isinstance(value, str):
            return n_bytes(value), 0
        if not isinstance(value, (list, tuple, dict)):
            return ITEM_BYTES, 0
        known = self._weights.get(id(value))
        if known is not None:
            return known.size, known.depth
        size, depth = LIST_BYTES, 1
        for part in _parts(value) if level <= _MAX_NESTING else ():
            inner, below = self.weigh(part, level + 1)
            size += ITEM_BYTES + inner
            depth = max(depth, below + 1)
            self.reserve(size)
        if level + depth > _MAX_NESTING:
            raise Refused(f"its values are nested more than {_MAX_NESTING} levels deep")
        self._weights[id(value)] = _Weighed(value, size, depth)
        return size, depth

    @contextmanager
    def call(self) -> Iterator[None]:
        """Pay for a call, and count its depth, while the block runs."""
        self.step()
        self._depth += 1
        if self._depth > self._limits.call_depth:
            raise Refused(f"its calls are nested more than {self._limits.call_depth} levels deep")
        yield
        self._depth -= 1


def _parts(value: Any) -> Iterable[Any]:
    """The values directly inside a list, tuple or dict."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    else:
        yield from value


class _Running(threading.local):
    budget: Budget | None = None


_running = _Running()


def running() -> Budget:
    """The budget of the rendering that runs in this thread."""
    budget = _running.budget
    if budget is None:
        raise Refused("it runs outside a rendering")
    return budget


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Make `budget` the one of this thread while the block renders or compiles."""
    outer, _running.budget = _running.budget, budget
    try:
        yield
    finally:
        _running.budget = outer
