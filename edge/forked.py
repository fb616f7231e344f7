"""What a forked child has of a model: a copy of memory, open files and locks, and no threads.

A lock that a thread held at the fork will never be free in the child, and what the child writes to
a file comes between what the parent writes. So right after the fork locks there refuse, and files
that may be written to are closed. Nothing else is given back: it ends with the child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from edge.errors import InputError

__all__ = ["REFUSAL", "Refusal", "check", "watch"]


class Refusal:
    """What a child finds in the place of a lock. Raises InputError for who takes it."""

    def __enter__(self) -> None:
        raise InputError("the model was loaded before a fork: load it in the child")

    def __exit__(self, *error: object) -> None:
        pass

    def locked(self) -> bool:
        """Nobody has it."""
        return False


REFUSAL = Refusal()


class _Watched(Protocol):
    def _forked(self) -> None:
        """This is a child now."""


_watched: weakref.WeakSet[_Watched] = weakref.WeakSet()


def watch(owner: _Watched) -> None:
    """From now on, `_forked` of the owner is called in every child, before anything else there."""
    _watched.add(owner)


def check(lock: object) -> None:
    """Raise InputError where the lock is a refusal."""
    if lock is REFUSAL:
        REFUSAL.__enter__()


def _tell() -> None:
    for owner in list(_watched):
        owner._forked()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_tell)
