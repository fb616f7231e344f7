"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

__all__ = ["AnswerText", "StopFilter"]


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


class AnswerText:
    """The text of an answer's tokens, up to a stop string. after: the token before them.

    A stop string may be spelled like a control token, which is in no text itself.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], after: int) -> None:
        self._tokenizer, self._stops = tokenizer, StopFilter(stops)
        self._decoder = tokenizer.decoder(after=after)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that became certain with a token."""
        text = self._stops.push(self._decoder.push(token))
        if self._tokenizer.is_special(token):
            text += self._stops.push(self._tokenizer.token_text(token), hidden=True)
        return text

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()
