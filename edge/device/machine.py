"""The two limits of this machine's speed: how fast it reads memory, and multiplies integers."""

from __future__ import annotations

import statistics
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

from edge import native
from edge.device.cores import Cores
from edge.device.memory import anonymous, available
from edge.errors import MemoryBudgetError
from edge.native import ffi, lib
from edge.sizes import show

__all__ = ["Machine", "Roofs", "buffer_bytes", "largest_cache", "written"]

_LEAST, _MOST = 64 << 20, 1 << 30  # bytes of the buffer that is read
_CACHES = 8  # times the largest cache: so little of the buffer stays in the cache between passes
_PASSES = 3
_PIECE = 16 << 20  # bytes; a divisor of the least buffer


class Roofs(NamedTuple):
    """One measurement. read: bytes per second; dot: int8 multiply-adds per second."""

    read: float
    dot: float


class Machine:
    """Measures the roofs with a number of threads. Raises MemoryBudgetError, UnsupportedError.

    small: whether to read less where memory is short, but still more than the caches hold.
    """

    def __init__(self, threads: int, *, small: bool = False) -> None:
        size = buffer_bytes(largest_cache())
        free = available()
        if small and free is not None:
            least = buffer_bytes(largest_cache(), times=2)
            size = max(least, min(size, free // 4 >> 20 << 20))
        self._block = written(size)
        self._isa = native.isa_index()
        self._threads: Any = native.new_threads(threads, Cores.now().cpus(threads))
        self._base: Any = ffi.from_buffer("uint8_t[]", self._block)

    def measure(self) -> Roofs:
        """Measure both roofs now; the bandwidth is the median of a few passes."""
        ns, macs = ffi.new("int64_t *"), ffi.new("int64_t *")
        native.check(lib.edge_measure_dot(self._threads, self._isa, macs, ns))
        dot = macs[0] / ns[0] * 1e9
        reads = []
        for _ in range(_PASSES):
            native.check(lib.edge_measure_read(self._threads, self._base, len(self._block), ns))
            reads.append(len(self._block) / ns[0] * 1e9)
        return Roofs(statistics.median(reads), dot)

    def read(self) -> float:
        """Bytes per second that are read when no other program runs: the lower quartile of the
        times of many pieces, because other programs disturb only some of them.
        """
        ns, seconds = ffi.new("int64_t *"), list[float]()
        for first in [*range(0, len(self._block) - _PIECE + 1, _PIECE)] * _PASSES:
            native.check(lib.edge_measure_read(self._threads, self._base + first, _PIECE, ns))
            seconds.append(ns[0] / 1e9)
        return _PIECE / sorted(seconds)[len(seconds) // 4]

    def close(self) -> None:
        """Give the memory and the threads back."""
        if self._threads is not None:
            ffi.release(self._threads)
            ffi.release(self._base)
            self._block.close()
            self._threads = None

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def written(size: int, *, huge: bool = True) -> mmap:
    """Memory to read, of whole MiB. It is written first: else all its pages are one page of zeros.
    huge: in huge pages where the system has them.

    Raises MemoryBudgetError when it is more than half of the available memory.
    """
    free = available()
    if free is not None and size > free // 2:
        raise MemoryBudgetError(
            f"{show(size)} are read to measure the bandwidth, {show(free)} are available",
            needed=size,
            budget=free,
            parts={"buffer": size},
        )
    block = anonymous(size, huge=huge)
    for first in range(0, size, 1 << 20):
        block[first : first + (1 << 20)] = b"\1" * (1 << 20)
    return block


def buffer_bytes(cache: int | None, times: int = _CACHES) -> int:
    """Bytes to read, a multiple of 1 MiB. cache: bytes of the largest cache, None: unknown."""
    size = _LEAST if cache is None else min(max(times * cache, _LEAST), _MOST)
    return size >> 20 << 20


def largest_cache(root: str = "/sys/devices/system/cpu/cpu0/cache") -> int | None:
    """Bytes of the largest cache of CPU 0; None: the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in Path(root).glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text[:-1].isdecimal() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=None)
