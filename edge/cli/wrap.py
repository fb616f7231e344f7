"""Text on a terminal: its width in cells, and word wrap of streamed text."""

from __future__ import annotations

import unicodedata


class Wrap:
    """Wraps a streamed text, so that rows end between words.

    A word is written piece by piece. When it reaches the edge, it is erased and written again in
    the next row. The last cell of a row stays empty, so that the cursor never waits behind it. The
    terminal breaks a word that is longer than a row. A row may end behind any wide character.
    column: cells since the last newline.
    """

    def __init__(self) -> None:
        self.column = 0
        self._columns = 0
        self._word = ""  # the part of a word that ends the row, to be erased
        self._full = False  # a space had no room: the next character begins a row

    def push(self, text: str, columns: int) -> str:
        """What to write for the next piece.

        columns: of the terminal at this moment; 0: do not wrap.
        """
        if columns != self._columns:  # the terminal has moved the word: leave it
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
            erase = f"\x1b[{size}D\x1b[K" if size else ""
            before = erase + self._break("\n") + word
            self._word, self.column = word, size
        self.column += width
        self._word = "" if width == 2 else self._word + c
        return before + c

    def _break(self, newline: str) -> str:
        self.column, self._word, self._full = 0, "", False
        return newline


def cells(text: str, start: int = 0) -> int:
    """The column behind a text of one line that begins in column `start`."""
    if text.isascii() and text.isprintable():
        return start + len(text)
    for c in text:
        if c == "\t":
            start += 8 - start % 8
        elif unicodedata.category(c) not in ("Mn", "Me", "Cf", "Cc"):
            start += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return start
