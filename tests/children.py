"""A forked child, and what it says."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS = 60  # until a child that hangs is killed


def in_child(*calls: Callable[[], object]) -> list[str]:
    """Make the calls in a forked child: what each returned, or its error. None may hang."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(_SECONDS)
        said = []
        for call in calls:
            try:
                said.append(str(call()))
            except BaseException as error:
                said.append(f"{type(error).__name__}: {error}")
        os.write(target, "\0".join(said).encode())
        os._exit(0)
    os.close(target)
    with open(source, encoding="utf-8") as answer:
        said = answer.read().split("\0")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said
    return said


@contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Another thread has the locks, as one that computes."""
    has, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        has.set()
        done.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()
