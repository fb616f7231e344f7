"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["StopFilter"]


class StopFilter:
    """Passes text on until the first stop string, which may span any number of pieces.

    Text that could be the start of a stop string is held back until it is clear. Of two stop
    strings the one that is complete first wins, then the one that starts first. Hidden text, a
    control token's spelling, is looked at like any other and never comes out.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[bool] = []  # of each character held: whether it comes out
        self.stopped = False

    def push(self, text: str, *, hidden: bool = False) -> str:
        """The text that is certain now. Nothing comes out after a stop string."""
        if self.stopped or not self._stops:
            return "" if self.stopped or hidden else text
        out = []
        for character in text:  # by character: which stop string wins must not depend on pieces
            self._held += character
            self._shown.append(not hidden)
            ends = [s for s in self._stops if self._held.endswith(s)]
            if ends:
                out.append(self._let_go(len(self._held) - max(map(len, ends))))
                self._held, self.stopped = "", True
                break
            out.append(self._let_go(len(self._held) - self._overlap()))
        return "".join(out)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._let_go(len(self._held))

    def _let_go(self, n: int) -> str:
        """The first n characters held, as far as they come out."""
        text = "".join(itertools.compress(self._held[:n], self._shown))
        self._held, self._shown = self._held[n:], self._shown[n:]
        return text

    def _overlap(self) -> int:
        """Characters at the end of the held text that a stop string could start with."""
        longest = max(map(len, self._stops)) - 1
        for n in range(min(len(self._held), longest), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0
