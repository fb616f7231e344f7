"""The part of cffi's `ffi` that edge uses, over ctypes: for machines that have no cffi.

A caller that uses only this part cannot tell the two apart. Inside, NULL is None; the address of
bytes, or of a struct that only the library knows, is an int; a pointer to a struct is the struct
itself; arrays are those of ctypes.
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
    """Stands in for `cffi.FFI`, for the declarations of native/edge.h.

    A value that its type cannot hold raises TypeError or OverflowError; as an argument of a call,
    ctypes.ArgumentError around one of these.
    """

    NULL = None
    error = AttributeError  # raised for a function that a library lacks

    def dlopen(self, path: str) -> Any:
        """Open a library: its functions and enum values by name. Raises OSError, FFI.error."""
        return _Library(ctypes.CDLL(path))

    def new(self, kind: str, init: Any = None) -> Any:
        """Memory of type "T *", "T[n]" or "T[]", with the values of init, else zeros. For "T[]",
        init may also be the number of elements.
        """
        kind = kind.replace(" ", "")
        if kind.endswith("*"):
            target = _type(kind[:-1])
            if issubclass(target, _Struct):
                return _filled(target(), init)
            return (target * 1)()
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
        """The memory of a buffer, which stays alive until the result is released or freed."""
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
        target = None if kind == "uintptr_t" else _type(kind.replace(" ", ""))
        if target is None:
            return address
        return (address or None) if target is ctypes.c_void_p else ctypes.cast(address, target)

    def string(self, text: bytes) -> bytes:
        """The bytes of a C string; ctypes has converted it already."""
        return text

    def buffer(self, pointer: Any, n_bytes: int | None = None) -> memoryview:
        """The memory at a pointer, as a writable buffer. n_bytes: None: the size of its target."""
        size = ctypes.sizeof(pointer) if n_bytes is None else n_bytes
        memory = (ctypes.c_uint8 * size).from_address(_address(pointer))
        memory.owner = pointer  # type: ignore[attr-defined]
        return memoryview(memory).cast("B")

    def memmove(self, target: Any, source: Any, n_bytes: int) -> None:
        """Copy bytes; either may be a pointer or a buffer."""
        ctypes.memmove(_address(target), _address(source), n_bytes)

    def gc(self, address: int, destructor: Callable[[Any], None]) -> Any:
        """A pointer that calls destructor(address) when it is released or freed."""
        return _Owned(address, destructor)

    def release(self, owner: Any) -> None:
        """Release the result of `gc` or `from_buffer` now."""
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
        """Look up a function at its first use, because another version may lack some."""
        if name not in FUNCTIONS:
            raise AttributeError(f"native/edge.h does not declare {name}")
        function = getattr(self._handle, name)
        result, arguments = FUNCTIONS[name]
        function.restype = _type(result)
        function.argtypes = [_argument(kind) for kind in arguments]
        self.__dict__[name] = function
        return function


class _Struct(ctypes.Structure):
    """A struct, which is also the pointer to it."""

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
        if type(value) is int:  # ctypes drops the bits that do not fit, and raises nothing
            stored = getattr(self, name)
            if stored != value and type(stored) is int:
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
    """The type of an integer argument. ctypes would drop the bits that do not fit."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_param(self, value: Any) -> Any:
        argument = self._kind(value)
        if argument.value != value:
            raise OverflowError(f"{value} is out of the range of an argument")
        return argument


def _filled(struct: _Struct, init: Any) -> _Struct:
    """The struct, filled from init: a struct of its type, fields by name or in order, or None."""
    if isinstance(init, _Struct):
        ctypes.pointer(struct)[0] = init
    elif init is not None:
        names = [field[0] for field in struct._fields_]
        for name, value in init.items() if isinstance(init, dict) else zip(names, init):  # noqa: B905
            setattr(struct, name, value)
    return struct


def _address(value: Any) -> int:
    """The address of a pointer, an array, a struct or a Python buffer; an int is one already."""
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
    if target in ("void", "uint8_t") or STRUCTS.get(target) == []:  # []: only the library knows it
        return ctypes.c_void_p
    return ctypes.POINTER(_type(target))


def _struct(name: str) -> Any:
    fields = [(field, _type(kind)) for field, kind in STRUCTS[name]]
    return type(name, (_Struct,), {"__slots__": (), "_fields_": fields})


ffi = FFI()
