"""A model in a forked child: the child has copies of memory, open files and locks, but no threads.

A lock that a thread held at the fork is never released in the child, and the child's writes to a
file would mix with the parent's. So right after the fork the child's locks are replaced by
refusals, and its writable files are closed. All else is freed when the child ends.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from edge.errors import InputError

__all__ = ["REFUSAL", "Refusal", "check", "watch"]


class Refusal:
    """Replaces a lock in a child. Taking it raises InputError."""

    def __enter__(self) -> None:
        raise InputError("the model was loaded before a fork: load it in the child")

    def __exit__(self, *error: object) -> None:
        pass

    def locked(self) -> bool:
        """False: nobody holds it."""
        return False


REFUSAL = Refusal()


class _Watched(Protocol):
    def _forked(self) -> None:
        """Called in a child, right after the fork."""


_watched: weakref.WeakSet[_Watched] = weakref.WeakSet()


def watch(owner: _Watched) -> None:
    """Call `_forked` of the owner in every child from now on, before anything else runs there."""
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
