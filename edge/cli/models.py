"""MODEL of a command: found by its path or name, or fetched while a bar shows the progress."""

from __future__ import annotations

import time

from edge.cli.status import duration
from edge.cli.terminal import Progress, note
from edge.sizes import show

__all__ = ["Fetching", "model_path"]


class Fetching(Progress):
    """A bar for bytes that come from a server, with their speed and the time that is left."""

    def __init__(self) -> None:
        super().__init__("fetching")
        self._began: tuple[float, int] | None = None  # when the first call came, and its bytes

    def text(self, done: int, total: int) -> str:
        """`fetching [##........]  20 %, 19.6 MiB of 98.0 MiB, 4.1 MiB/s, 0:19 left`."""
        now = time.monotonic()
        self._began = self._began or (now, done)  # what was here before counts for no speed
        seconds, n_bytes = now - self._began[0], done - self._began[1]
        line = f"{super().text(done, total)}, {show(done)} of {show(total)}"
        if n_bytes > 0 and seconds > 0:
            speed = n_bytes / seconds
            line += f", {show(int(speed))}/s, {duration((total - done) / speed)} left"
        return line


def model_path(model: str | None, memory: str | int | None = None) -> str:
    """The path of a MODEL, see `edge.hub.find.find`. memory: that it must fit into."""
    from edge.hub.find import find

    with Fetching() as progress:
        return find(model, memory=memory, progress=progress, say=note)
