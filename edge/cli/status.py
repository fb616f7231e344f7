"""The progress of an answer, shown on the terminal's last row or on a line of stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from typing import Protocol

from edge.cli.terminal import Line, is_terminal, size

_SAVE, _RESTORE = "\x1b7", "\x1b8"  # the cursor's place and colours
_SCROLL_ALL = "\x1b[r"
_DOWN, _UP = "\x1bD", "\x1b[A"  # down scrolls at the last row; both keep the column
_ERASE_ROW, _ERASE_BELOW = "\x1b[2K", "\x1b[J"
_DIM, _PLAIN = "\x1b[2m", "\x1b[m"


class Status:
    """Shows the tokens so far, recent tokens/s, depth, and the time left if there is a limit.

    limit: tokens that the answer may have. shown: the answer's text goes to stdout. If the text is
    on the same terminal, the status takes the last row, but only for an answer that may be long.
    If the text goes elsewhere, the status is a line of stderr. Without a terminal, and when quiet,
    nothing is shown. Use it in a `with`, which gives the row back, and call it after each piece.
    """

    AFTER_SECONDS, EVERY_SECONDS = 0.3, 0.25
    RECENT = 32  # tokens that the speed is measured over
    LONG = 256  # the least limit for which a row is taken
    CELLS = 10  # of the bar

    def __init__(self, limit: int | None, *, shown: bool, quiet: bool) -> None:
        self._limit = limit
        self._place = None if quiet else self._find_place(limit or 0, shown)
        self._times: deque[float] = deque(maxlen=self.RECENT + 1)
        self._tokens = 0
        self._next = 0.0  # when to draw

    @classmethod
    def _find_place(cls, limit: int, shown: bool) -> _Place | None:
        if not is_terminal(sys.stderr):
            return None
        if not shown or not sys.stdout.isatty():
            return Line()
        return Row() if limit >= cls.LONG and sys.platform != "win32" else None

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *_: object) -> None:
        if self._place is not None:
            self._place.clear()

    def __call__(self, column: int, token: int | None, n_prompt: int) -> None:
        """Tell that a piece was written.

        column: cells of stdout since the last newline. token: None: the piece has no new token.
        n_prompt: tokens before the answer.
        """
        if self._place is None:
            return
        self._place.follow(column)
        if token is None:
            return
        now = time.monotonic()
        self._times.append(now)
        self._tokens += 1
        if self._tokens == 1:
            self._next = now + self.AFTER_SECONDS
        elif now >= self._next:
            self._next = now + self.EVERY_SECONDS
            self._place.draw(self._line(n_prompt + self._tokens))

    def _line(self, depth: int) -> str:
        """`512 of 2,048 tokens, 41.3/s at depth 1,012, 0:37 left [##........]`."""
        n, limit = self._tokens, self._limit
        speed = (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        speed_at_depth = f"{speed:.1f}/s at depth {depth:,}"
        if limit is None:
            return f"{n:,} tokens, {speed_at_depth}"
        cells = self.CELLS * n // limit
        bar = "#" * cells + "." * (self.CELLS - cells)
        left = duration((limit - n) / speed)
        return f"{n:,} of {limit:,} tokens, {speed_at_depth}, {left} left [{bar}]"


class _Place(Protocol):
    """A place on the terminal that shows a status."""

    def follow(self, column: int) -> None:
        """Tell where the text on stdout ends. column: cells since the last newline."""

    def draw(self, line: str) -> None:
        """Replace the line that is shown."""

    def clear(self) -> None:
        """Remove the line."""


class Row:
    """The last row of a terminal, excluded from the scrolling (DECSTBM) of the text above it.

    The terminal's size is read at each draw; after a change the row is set up again. While the text
    ends at the right edge, nothing is drawn: a terminal whose cursor is restored there may forget
    that the next character belongs to the next row, and lose a character.
    """

    LEAST_ROWS = 10

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None  # columns and rows that the row was set up for
        self._column = 0  # cells since the last newline

    def follow(self, column: int) -> None:
        """Note where the text ends."""
        self._column = column

    def draw(self, line: str) -> None:
        """Replace the line; give the row back where the terminal became too small."""
        columns, rows = size(sys.stdout)
        if rows < self.LEAST_ROWS or columns < self.LEAST_ROWS:
            self.clear()
        elif not self._at_edge(columns):
            ready = "" if self._size == (columns, rows) else self._set_up()
            self._size = columns, rows
            region = f"\x1b[1;{rows - 1}r\x1b[{rows}H"  # moves the cursor
            text = f"{_DIM}{line[: columns - 1]}{_PLAIN}"
            self._write(f"{ready}{_SAVE}{region}{_ERASE_ROW}{text}{_RESTORE}")

    def clear(self) -> None:
        """Let the whole screen scroll again."""
        if self._size is None:
            return
        columns, rows = size(sys.stdout)
        row = below = ""
        if not self._at_edge(columns):  # the status is below the cursor, whatever the size
            below = _ERASE_BELOW
        elif self._size == (columns, rows):
            row = f"\x1b[{rows}H{_ERASE_ROW}"
        self._size = None
        with contextlib.suppress(OSError):  # the terminal was closed
            self._write(f"{_SAVE}{_SCROLL_ALL}{row}{_RESTORE}{below}")

    def _set_up(self) -> str:
        """Make room for a row below the cursor, by scrolling if the cursor is in the last row."""
        below = "" if self._size is None else _ERASE_BELOW
        return f"{_SAVE}{_SCROLL_ALL}{_RESTORE}{below}{_DOWN}{_UP}"

    def _at_edge(self, columns: int) -> bool:
        return self._column > 0 and self._column % max(columns, 1) == 0

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def duration(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
