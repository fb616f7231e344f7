"""Token ids to text as they come: whole characters only."""

from __future__ import annotations

import codecs

from edge.tokenizer.spelling import Spelling

__all__ = ["StreamDecoder"]


class StreamDecoder:
    """Turns ids into text, one id at a time, and never returns half a character.

    A token may end inside a character; its bytes wait for the rest. Bytes that cannot become a
    character any more turn into U+FFFD at once, so bad bytes never hold up the stream. `flush`
    turns an unfinished character at the end into U+FFFD. All texts joined are what
    `Tokenizer.decode` returns for the same ids.
    """

    def __init__(self, spelling: Spelling, *, special: bool, after: int | None) -> None:
        self._spelling, self._special = spelling, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = after is None or spelling.is_added(after)

    def push(self, token: int) -> str:
        """The text that this token completes, often empty. Raises InputError for a bad id."""
        data = self._spelling.token_bytes(token)
        if self._spelling.is_added(token):
            self._at_start = True
            if self._spelling.is_special(token) and not self._special:
                return self.flush()
        elif self._at_start:
            self._at_start = False
            if self._spelling.space_prefix:  # encoding put a space before the text
                data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    @property
    def is_unfinished(self) -> bool:
        """Whether the last token ended inside a character."""
        return self._utf8.getstate()[0] != b""

    def flush(self) -> str:
        """U+FFFD where a character is unfinished, else "". The decoder can be used further."""
        return self._utf8.decode(b"", True)
