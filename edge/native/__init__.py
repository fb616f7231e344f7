"""The native library: its errors as exceptions, its instruction sets, its constants.

    cancel.py  the flag that stops a run

Importing this package loads the library, see `edge.binding`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge.binding import library
from edge.errors import (
    CancelledError,
    EdgeError,
    InputError,
    MemoryBudgetError,
    NativeError,
    UnsupportedError,
)

__all__ = [
    "ALIGNMENT",
    "PANEL_ROWS",
    "CData",
    "check",
    "ffi",
    "isa_index",
    "isas",
    "lib",
    "log_softmax",
    "native_bf16",
    "new_threads",
    "refused",
    "softmax",
    "text",
]


ffi, lib = library.load()

#: A struct, a pointer or an array of the native library. Neither cffi nor ctypes has types for them
#: that mypy could check.
CData: TypeAlias = Any

#: Rows of a panel of weights.
PANEL_ROWS = int(lib.edge_panel_rows())

#: Addresses and offsets that the library takes are multiples of so many bytes.
ALIGNMENT = int(lib.edge_alignment())


def text(c_string: CData) -> str:
    """A C string as str."""
    return str(ffi.string(c_string).decode("utf-8", "replace"))


def check(status: int, error: CData = None) -> None:
    """Raise the exception of a native status. error: the edge_error that came with it, or NULL."""
    if status == lib.EDGE_OK:
        return
    message = text(error.text) if error else f"native status {status}"
    raise _exception(status, message, error)


def _exception(status: int, message: str, error: CData) -> EdgeError:
    if status == lib.EDGE_CANCELLED:
        return CancelledError("the run was cancelled")
    if status == lib.EDGE_NO_MEMORY:
        return MemoryBudgetError(message, needed=0, budget=0)
    if status == lib.EDGE_NO_THREADS:
        return UnsupportedError(f"{message}: ask for fewer threads", what="threads")
    if status == lib.EDGE_BAD_TOKEN:
        return InputError(message)
    op = error.op if error and error.op >= 0 else None
    return NativeError(message, code=status, op=op)


def isas() -> list[str]:
    """The instruction sets that this CPU can run, from the plainest to the best."""
    return [name for name, usable in _compiled() if usable]


def _compiled() -> list[tuple[str, bool]]:
    """(name, whether this CPU can run it) of each instruction set in the library."""
    compiled: list[tuple[str, bool]] = []
    while (name := lib.edge_isa_name(len(compiled))) != ffi.NULL:
        compiled.append((text(name), bool(lib.edge_isa_usable(len(compiled)))))
    return compiled


def isa_index() -> int:
    """The index of the instruction set to use: the one that EDGE_ISA names, else the best that this
    CPU can run.

    Raises UnsupportedError for a name that is not known or that this CPU cannot run.
    """
    return _index_of(os.environ.get("EDGE_ISA", ""))


@cache
def _index_of(setting: str) -> int:
    names = [name for name, _ in _compiled()]
    isa = setting or isas()[-1]
    if isa not in isas():
        why = "this CPU cannot run it" if isa in names else "there is none of that name"
        raise UnsupportedError(f"EDGE_ISA={isa}: {why}", what=isa, supported=isas())
    return names.index(isa)


def native_bf16(isa: int) -> bool:
    """Whether EDGE_NATIVE_BF16 asks for the CPU's own bfloat16 dot products. Their results have
    other bits than those of all other machines.

    Raises UnsupportedError when this CPU, or the instruction set in use, has none; InputError.
    """
    setting = os.environ.get("EDGE_NATIVE_BF16", "0")
    if setting not in ("0", "1"):
        raise InputError(f"EDGE_NATIVE_BF16={setting}: 0 or 1")
    if setting == "1" and not lib.edge_isa_has_bf16(isa):
        raise UnsupportedError(
            f"EDGE_NATIVE_BF16=1: {text(lib.edge_isa_name(isa))} has no bfloat16 dot products here",
            what="native bfloat16",
        )
    return setting == "1"


def new_threads(n_threads: int, cpus: Sequence[int] = ()) -> CData:
    """Threads for runs, freed with `ffi.release`. cpus: they run on these alone; (): anywhere.

    Raises UnsupportedError, MemoryBudgetError.
    """
    error, threads = ffi.new("edge_error *"), ffi.new("edge_threads **")
    numbers = ffi.new("int32_t[]", list(cpus))
    check(lib.edge_threads_new(n_threads, numbers, len(cpus), threads, error), error)
    return ffi.gc(threads[0], lib.edge_threads_free)


def refused(threads: CData) -> str | None:
    """Why the system did not let threads run on their CPUs alone; None: it did."""
    number = lib.edge_threads_refused(threads)
    return os.strerror(number) if number else None


def softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp(x) / sum(exp(x)), (n,) float32: the same bits on every machine."""
    return _over_vector(lib.edge_softmax, x)


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """log(softmax(x)), (n,) float32: the same bits on every machine."""
    return _over_vector(lib.edge_log_softmax, x)


def _over_vector(function: Callable[..., None], x: NDArray[np.float32]) -> NDArray[np.float32]:
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty_like(x)
    if x.size:
        source, target = ffi.from_buffer("float[]", x), ffi.from_buffer("float[]", out)
        function(isa_index(), source, x.size, target)
    return out
