"""Every error that edge raises on purpose.

EdgeError
  +- ModelFileError       bad or truncated file
  +- SessionFileError     a saved session that cannot be read, written or continued
  +- UnsupportedError     a right file, or a right request, that this build cannot serve
  +- MemoryBudgetError    would not fit
  +- InputError           a prompt, an option or a message that cannot be used
  |    +- ContextError    more tokens than the context holds
  +- TemplateError        the chat template failed or was refused
  +- CancelledError       the caller stopped the run
  +- NativeError          a bug of ours, or a native library that does not fit

EdgeWarning               something continues, but not as it should

The message is one line: what, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike, fspath

__all__ = [
    "CancelledError",
    "ContextError",
    "EdgeError",
    "EdgeWarning",
    "InputError",
    "MemoryBudgetError",
    "ModelFileError",
    "NativeError",
    "SessionFileError",
    "TemplateError",
    "UnsupportedError",
]


def brief(value: object, limit: int = 80) -> str:
    """repr(value) on one line, of at most `limit` characters: for values from outside."""
    # A long value is cut before it is spelled out, so that a message costs little.
    try:
        shown = repr(value[:limit] if isinstance(value, (str, bytes, list, tuple)) else value)
    except Exception:  # a number of thousands of digits, or a broken repr
        shown = f"a value of the type {type(value).__name__}"
    if "\n" in shown:
        shown = " ".join(shown.split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}\u2026"


class EdgeError(Exception):
    """The root: `except edge.EdgeError` catches whatever edge raises on purpose."""


class EdgeWarning(UserWarning):
    """Something continues, but not as it should; `edge-run` writes it to stderr, in one line."""


class _FileError(EdgeError):
    """path: the file; offset: the byte of the error, or None; field: the part that was read."""

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str],
        offset: int | None = None,
        field: str | None = None,
    ) -> None:
        self.path, self.offset, self.field = fspath(path), offset, field
        where = f", {field}" if field else ""
        where += f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{self.path}{where}: {message}")


class ModelFileError(_FileError):
    """A file that is missing, damaged or of another kind than it says.

    path: the file; offset: the byte of the error, or None; field: the part that was read.
    """


class SessionFileError(_FileError):
    """A session file that is missing, damaged, of another version or another model, in use by
    another session, or that cannot be written.

    path: the file; offset: the byte of the error, or None; field: the part that was read.
    """


class UnsupportedError(EdgeError):
    """A valid file or request that this build cannot serve.

    what: the thing asked for; supported: the things that can be asked for instead.
    """

    def __init__(self, message: str, *, what: str, supported: Iterable[str] = ()) -> None:
        self.what, self.supported = what, tuple(supported)
        hint = f" (supported: {', '.join(self.supported)})" if self.supported else ""
        super().__init__(message + hint)


class MemoryBudgetError(EdgeError):
    """Needs more memory than the budget. needed, budget: bytes; parts: name -> bytes."""

    def __init__(
        self, message: str, *, needed: int, budget: int, parts: dict[str, int] | None = None
    ) -> None:
        self.needed, self.budget, self.parts = needed, budget, dict(parts or {})
        super().__init__(message)


class InputError(EdgeError):
    """A prompt, message or option that cannot be used as it is."""


class ContextError(InputError):
    """More tokens than the context holds. needed, limit: tokens; at_least: whether more than
    `needed` may be needed.
    """

    def __init__(self, message: str, *, needed: int, limit: int, at_least: bool = False) -> None:
        self.needed, self.limit, self.at_least = needed, limit, at_least
        super().__init__(message)


class TemplateError(EdgeError):
    """The chat template raised an error, exceeded its limits, or is missing."""


class CancelledError(EdgeError):
    """The caller stopped the run."""


class NativeError(EdgeError):
    """The native library is missing, does not fit, or found a bug of ours.

    code: the library's return code; op: index of the op in the plan, or None.
    """

    def __init__(self, message: str, *, code: int = 0, op: int | None = None) -> None:
        self.code, self.op = code, op
        super().__init__(message)
