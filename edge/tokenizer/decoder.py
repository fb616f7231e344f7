"""Token ids to text as they come: whole characters only."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Push ids one by one; what comes back is text, never half a character.

    A token may end inside a character; its bytes wait for the rest. Bytes that cannot become
    a character any more turn into U+FFFD at once, so bad bytes never hold up the stream; what
    is unfinished at the end turns into U+FFFD in `flush`. All pieces joined are what
    `Tokenizer.decode` returns for the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool, after: int | None) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = after is None or tokenizer.is_added(after)

    def push(self, token: int) -> str:
        """The text that this token completes, often empty. InputError for a bad id."""
        data = self._tokenizer.token_bytes(token)
        if self._tokenizer.is_added(token):
            self._at_start = True
            if self._tokenizer.is_special(token) and not self._special:
                return self.flush()
        elif self._at_start:
            self._at_start = False
            if self._tokenizer.space_prefix:  # encoding put a space before the text
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left: U+FFFD for an unfinished character, else "". The decoder goes on."""
        return self._utf8.decode(b"", True)
