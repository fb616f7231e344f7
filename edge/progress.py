"""How callers learn of the progress of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "silent"]

#: Called with (done, in all): bytes or tokens, as the function that takes it says.
Progress: TypeAlias = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """The `Progress` that does nothing."""
