"""Text on a terminal: how wide it is, and a stream of it that breaks no words at the edge."""

from __future__ import annotations

import unicodedata


class Wrap:
    """Where a streamed text stands, and what to write so that rows end between words.

    A word is written as it comes; one that reaches the edge is taken back, and written again in the
    next row. Rows keep the last cell free, so that the cursor never waits behind it. A word that is
    longer than a row is left to the terminal, and wide characters may end a row anywhere.
    column: cells since the last newline.
    """

    def __init__(self) -> None:
        self.column = 0
        self._columns = 0
        self._word = ""  # what the row has of a word, to be taken back
        self._full = False  # a space found no room: what follows begins a row

    def push(self, text: str, columns: int) -> str:
        """What to write for the next piece. columns: the terminal's now; 0: the text as it is."""
        if columns != self._columns:  # what is there was moved by the terminal: leave it
            self._columns, self._word = columns, ""
        if columns == 0:
            _, newline, rest = text.rpartition("\n")
            self.column = cells(rest, 0 if newline else self.column)
            return text
        return "".join(map(self._put, text))

    def _put(self, c: str) -> str:
        if c == "\n":
            return self._break("\n")
        width = cells(c, self.column) - self.column
        here = self.column % self._columns
        fits = here + width < self._columns
        if c in " \t":
            self._word = ""
            if not fits:
                self._full = True
                return ""
            self.column += width
            return c
        if width == 2:
            self._word = ""
        before = ""
        size = cells(self._word)
        if self._full or (not fits and size < here):
            word = self._word
            taken_back = f"\x1b[{size}D\x1b[K" if size else ""
            before = taken_back + self._break("\n") + word
            self._word, self.column = word, size
        self.column += width
        self._word = "" if width == 2 else self._word + c
        return before + c

    def _break(self, newline: str) -> str:
        self.column, self._word, self._full = 0, "", False
        return newline


def cells(text: str, start: int = 0) -> int:
    """The column after a text of one line that begins in column `start`."""
    if text.isascii() and text.isprintable():
        return start + len(text)
    for c in text:
        if c == "\t":
            start += 8 - start % 8
        elif unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc"):
            start += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return start
