"""Finds the native library, and the binding that calls it.

The library is plain C in one file that works with every Python. It is looked for at EDGE_LIBRARY,
then in the package, then where apps must keep it: on iOS a `.fwork` file in the package says where,
on Android the system finds it by its name among the app's libraries.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from edge.errors import InputError, NativeError
from edge.version import __version__

__all__ = ["BINDINGS", "NAMES", "load", "on_bus_error"]

#: The file names of the library, by system.
NAMES = ("libedge.so", "libedge.dylib", "edge.dll")
#: The values of EDGE_BINDING. The default is cffi, which calls faster, where it is installed.
BINDINGS = ("cffi", "ctypes")
#: The message that a program writes to stderr on a bus error, before it ends with code 1. A bus
#: error comes of a mapped file that is truncated while it is in use, or of a disk that fails. Set
#: this before the library is loaded. "": a bus error kills the process, as usual.
on_bus_error = ""

_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the package
_AGAIN = "install the package again"
#: ELF's e_machine -> the machine's name in messages.
_MACHINES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}


def load() -> tuple[Any, Any]:
    """(ffi, lib) of cffi or of `edge.binding.ctypes_ffi`; both are used alike.

    Raises NativeError when the library is missing, does not load, is not edge's, or is of another
    version; InputError for an EDGE_BINDING that is not known or not installed.
    """
    ffi = _binding(os.environ.get("EDGE_BINDING", ""))
    path, advice = _find()
    lib = _open(ffi, path, advice)
    version = ffi.string(lib.edge_version()).decode()
    if version != __version__:
        raise NativeError(f"{path} is of version {version}, the package of {__version__}: {advice}")
    if on_bus_error:
        lib.edge_exit_on_bus_error(on_bus_error.encode())
    return ffi, lib


def _binding(setting: str) -> Any:
    """The ffi to use. Without a setting, ctypes replaces a cffi that is missing or broken."""
    if setting not in ("", *BINDINGS):
        raise InputError(f"EDGE_BINDING={setting}: one of {', '.join(BINDINGS)}")
    try:
        if setting != "ctypes":
            try:
                from edge._cffi import ffi

                return ffi
            except ImportError as error:
                if error.name == "edge._cffi":
                    raise
                if setting == "cffi":
                    raise InputError(f"EDGE_BINDING=cffi: {error}") from error
        from edge.binding import ctypes_ffi
    except ModuleNotFoundError as error:
        raise NativeError(
            "the native library is not built: install the package, or run scripts/build"
        ) from error
    return ctypes_ffi.ffi


def _find() -> tuple[str, str]:
    """(the path or bare name to open, advice for the message if it is not right)."""
    setting = os.environ.get("EDGE_LIBRARY", "")
    if setting:
        path = os.path.abspath(setting)  # a name without a slash would be looked for elsewhere
        if not os.path.isfile(path):
            raise NativeError(f"EDGE_LIBRARY={setting}: there is no such file")
        return _followed(path), "set EDGE_LIBRARY to the right file, or leave it out"
    paths = [os.path.join(_FOLDER, name) for name in (*NAMES, "libedge.fwork")]
    in_package = next((path for path in paths if os.path.exists(path)), None)
    if in_package:
        return _followed(in_package), _AGAIN
    return NAMES[{"darwin": 1, "ios": 1, "win32": 2}.get(sys.platform, 0)], _AGAIN


def _followed(path: str) -> str:
    """The library that a .fwork file names, relative to the app's bundle; else the path."""
    if not path.endswith(".fwork"):
        return path
    try:
        with open(path, encoding="utf-8") as file:
            target = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise NativeError(f"{path} does not say where the library is: {error}: {_AGAIN}") from error
    return os.path.join(os.path.dirname(sys.executable), target)


def _open(ffi: Any, path: str, advice: str) -> Any:
    try:
        lib = ffi.dlopen(path)
        _ = lib.edge_version  # functions are looked up when they are first asked for
        return lib
    except ffi.error as error:
        why = _reason(error, path)
        raise NativeError(f"{path} is not edge's library: {why}: {advice}") from error
    except OSError as error:
        why = _mismatch(path) or _reason(error, path)
        if path in NAMES:
            raise NativeError(
                f"there is no native library: none of {', '.join(NAMES)} in {_FOLDER}, and {path} "
                f"by its name alone: {why}: {advice}, or set EDGE_LIBRARY to its path"
            ) from error
        raise NativeError(f"{path} does not load: {why}: {advice}") from error


def _reason(error: Exception, path: str) -> str:
    """The system's message, without the path and without cffi's second try of a bare name."""
    return str(error).partition(".  Additionally, ")[0].rpartition(f"{path}: ")[2]


def _mismatch(path: str) -> str:
    """The machine that a library was built for, if it is not this one; else "". The system may only
    say "no such file" then.
    """
    theirs, ours = _machine(path), _machine("/proc/self/exe")
    return (
        f"it is for {theirs}, this Python for {ours}" if theirs and ours and theirs != ours else ""
    )


def _machine(path: str) -> str:
    """The machine that an ELF file is for; "": it is no ELF file."""
    try:
        with open(path, "rb") as file:
            header = file.read(20)
    except OSError:
        return ""
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return ""
    number = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    return _MACHINES.get(number, f"machine {number}")
