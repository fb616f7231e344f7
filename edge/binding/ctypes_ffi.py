"""The part of cffi's `ffi` that edge uses, over ctypes: for machines that have no cffi.

Callers cannot tell which of the two they use, as long as they keep to what is here. Inside, NULL
is None, the address of bytes or of a struct that only the library knows is an int, a pointer to a
struct is the struct itself, and arrays are those of ctypes.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from edge._declarations import ENUMS, FUNCTIONS, STRUCTS

__all__ = ["FFI", "ffi"]

_INTEGERS = {
    name: getattr(ctypes, f"c_{name[:-2]}") for name in ("int8_t", "int32_t", "int64_t", "uint64_t")
}
_SCALARS = {**_INTEGERS, "uint8_t": ctypes.c_uint8, "float": ctypes.c_float, "char": ctypes.c_char}


class FFI:
    """What `cffi.FFI` is, for the declarations of native/edge.h. TypeError and OverflowError for a
    value that a type does not hold, ctypes.ArgumentError around them in a call.
    """

    NULL = None
    error = AttributeError  # a function that a library lacks

    def dlopen(self, path: str) -> Any:
        """The library: functions and enum values by name. Raises OSError, FFI.error."""
        return _Library(ctypes.CDLL(path))

    def new(self, kind: str, init: Any = None) -> Any:
        """Zeroed memory: "T *" or "T[n]", or "T[]" with init an int; else filled from init."""
        kind = kind.replace(" ", "")
        if kind.endswith("*"):
            made = _type(kind[:-1])
            if issubclass(made, _Struct):
                return _filled(made(), init)
            return (made * 1)()
        if not kind.endswith("[]"):
            return _type(kind)()
        element = _type(kind[:-2])
        if isinstance(init, int):
            return (element * init)()
        if issubclass(element, _Struct):
            array = (element * len(init))()
            for struct, row in zip(array, init, strict=True):
                _filled(struct, row)
            return array
        array = (element * len(init))(*init)
        if element in _INTEGERS.values() and array[:] != list(init):
            raise OverflowError(f"a number out of the range of {kind[:-2]}")
        return array

    def from_buffer(self, kind: str, data: Any) -> Any:
        """The memory of a buffer, which stays alive until this is released or forgotten."""
        view = np.frombuffer(data, np.uint8)
        if kind == "uint8_t[]":
            return _Bytes(view)
        element = _type(kind[:-2])
        count = view.nbytes // ctypes.sizeof(element)
        array = (element * count).from_address(view.ctypes.data)
        array.view = view
        return array

    def cast(self, kind: str, value: Any) -> Any:
        """An address as another pointer, or as an int ("uintptr_t")."""
        address = _address(value)
        made = None if kind == "uintptr_t" else _type(kind.replace(" ", ""))
        if made is None:
            return address
        return (address or None) if made is ctypes.c_void_p else ctypes.cast(address, made)

    def string(self, text: bytes) -> bytes:
        """A C string: ctypes has made bytes of it."""
        return text

    def buffer(self, pointer: Any, n_bytes: int | None = None) -> memoryview:
        """Memory as a writable buffer of bytes; n_bytes: of what is pointed to, its own size."""
        size = ctypes.sizeof(pointer) if n_bytes is None else n_bytes
        memory = (ctypes.c_uint8 * size).from_address(_address(pointer))
        memory.owner = pointer  # type: ignore[attr-defined]
        return memoryview(memory).cast("B")

    def memmove(self, target: Any, source: Any, n_bytes: int) -> None:
        """Copy bytes; either may be a pointer or a buffer."""
        ctypes.memmove(_address(target), _address(source), n_bytes)

    def gc(self, address: int, destructor: Callable[[Any], None]) -> Any:
        """The pointer, with its end: destructor(address), by `release` or when it is forgotten."""
        return _Owned(address, destructor)

    def release(self, owner: Any) -> None:
        """Give back now what `gc` or `from_buffer` holds."""
        owner.release()

    def addressof(self, struct: Any) -> Any:
        """The pointer to a struct."""
        return struct

    def sizeof(self, kind: str) -> int:
        """Bytes of a type."""
        return ctypes.sizeof(_type(kind.replace(" ", "")))


class _Library:
    """Functions and enum values, by name."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        for values in ENUMS.values():
            self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        """A function, when it is first asked for: a library of another version may lack some."""
        if name not in FUNCTIONS:
            raise AttributeError(f"native/edge.h does not declare {name}")
        function = getattr(self._handle, name)
        result, arguments = FUNCTIONS[name]
        function.restype = _type(result)
        function.argtypes = [_argument(kind) for kind in arguments]
        self.__dict__[name] = function
        return function


class _Struct(ctypes.Structure):
    """A struct, and a pointer to it."""

    __slots__ = ()  # no attributes but the fields

    def __getitem__(self, i: int) -> _Struct:
        if i != 0:
            raise IndexError(f"a pointer to one struct has no element {i}")
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, list):  # into an array
            getattr(self, name)[:] = value
            return
        if isinstance(value, dict):  # into a struct
            _filled(getattr(self, name), value)
            return
        super().__setattr__(name, value)
        if type(value) is int:  # ctypes cuts one off without a word
            kept = getattr(self, name)
            if kept != value and type(kept) is int:
                raise OverflowError(f"{type(self).__name__}.{name} cannot hold {value}")


class _Bytes(int):
    """The address of a buffer's memory, which it keeps alive."""

    _view: Any

    def __new__(cls, view: np.ndarray[Any, Any]) -> _Bytes:
        self = super().__new__(cls, view.ctypes.data)
        self._view = view
        return self

    def __len__(self) -> int:
        return int(self._view.nbytes)

    def __enter__(self) -> _Bytes:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        self._view = None


class _Owned:
    """An address with a destructor."""

    def __init__(self, address: int, destructor: Callable[[Any], None]) -> None:
        self._as_parameter_: int | None = address
        self._end = weakref.finalize(self, destructor, address)
        self._end.atexit = False

    def release(self) -> None:
        self._end()
        self._as_parameter_ = None


class _Integer:
    """The type of an integer argument. ctypes would cut off what it cannot hold."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_param(self, value: Any) -> Any:
        made = self._kind(value)
        if made.value != value:
            raise OverflowError(f"{value} is out of the range of an argument")
        return made


def _filled(struct: _Struct, init: Any) -> _Struct:
    """init: a struct of the type, its fields by name or in order, or None."""
    if isinstance(init, _Struct):
        ctypes.pointer(struct)[0] = init
    elif init is not None:
        names = [field[0] for field in struct._fields_]
        for name, value in init.items() if isinstance(init, dict) else zip(names, init):  # noqa: B905
            setattr(struct, name, value)
    return struct


def _address(value: Any) -> int:
    """Of an address, a pointer, an array, a struct, or a buffer of Python's."""
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value)
    if isinstance(value, ctypes._Pointer):
        return ctypes.cast(value, ctypes.c_void_p).value or 0
    if isinstance(value, (ctypes.Array, ctypes.Structure)):
        return ctypes.addressof(value)
    return int(np.frombuffer(value, np.uint8).ctypes.data)


def _argument(kind: str) -> Any:
    return _Integer(_INTEGERS[kind]) if kind in _INTEGERS else _type(kind)


@cache
def _type(kind: str) -> Any:
    """The ctypes type of a C type without spaces; None: void."""
    if kind == "void":
        return None
    if kind.endswith("]"):
        element, _, count = kind[:-1].rpartition("[")
        return _type(element) * int(count)
    if not kind.endswith("*"):
        return _SCALARS[kind] if kind in _SCALARS else _struct(kind)
    target = kind[:-1]
    if target == "char":
        return ctypes.c_char_p
    if target in ("void", "uint8_t") or STRUCTS.get(target) == []:  # [] : the library's own affair
        return ctypes.c_void_p
    return ctypes.POINTER(_type(target))


def _struct(name: str) -> Any:
    fields = [(field, _type(kind)) for field, kind in STRUCTS[name]]
    return type(name, (_Struct,), {"__slots__": (), "_fields_": fields})


ffi = FFI()
