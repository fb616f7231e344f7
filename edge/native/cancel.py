"""The flag that stops a run, of any engine."""

from __future__ import annotations

from typing import Any

from edge.native import ffi

__all__ = ["Cancel"]


class Cancel:
    """A flag that stops a run within one chunk of its work; safe to set from any thread."""

    def __init__(self) -> None:
        self._flag = ffi.new("int32_t *")

    def set(self) -> None:
        """Stop the run that has this flag, and all later ones."""
        self._flag[0] = 1

    def clear(self) -> None:
        """Allow runs again."""
        self._flag[0] = 0

    def is_set(self) -> bool:
        """Whether the flag is set."""
        return bool(self._flag[0])

    @property
    def pointer(self) -> Any:
        """The int32_t that the native library reads."""
        return self._flag
