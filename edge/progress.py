"""What callers are told while they wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "silent"]

#: Called with how much is done, and how much there is in all: bytes or tokens, as is said there.
Progress: TypeAlias = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """The `Progress` of who wants to hear nothing."""
