"""Where a long text can be cut, so that its pieces have the tokens of the whole.

Encoding takes 100 bytes of memory or more for each byte of text, and cannot be cancelled. So a long
text is encoded piece by piece. It can be cut wherever no token can span the cut:

byte-level BPE  Between two words of the pre-split. A row of presplit.py says where words end.
                "letters": between a letter or digit and ASCII punctuation (except an apostrophe
                and `_`) or white space, and between a letter and a digit. "spaces": there, and
                before a space that follows another character. "nowhere": such a text is not cut.
SentencePiece   Between two characters that no token of the vocabulary holds side by side: no merge
                can cross the cut. Encoding puts a space before each piece, as before the text. So
                the space at the cut is left out of the piece; where there is none, the piece's
                first token is dropped.

No cut goes through an added token (control or user-defined, cut out of a text before anything
else), nor between such a token and the white space that it swallows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

from edge.errors import InputError
from edge.tokenizer.presplit import PRE_SPLITS, WordEnds, pre_split
from edge.tokenizer.vocabulary import TokenType, Vocabulary

__all__ = ["GUARD", "SPM_SPACE", "Pieces", "TextPiece"]

GUARD = "\ufdd0"  # a noncharacter: inside the spelling of a control token it makes ordinary text
SPM_SPACE = "\u2581"

#: The most characters of a piece, where the text has a place for a cut within them.
PIECE = 8192
#: The most UTF-8 bytes of a stretch without a place for a cut; encoding takes 140 bytes for each.
MOST_STRETCH = 32 << 10
#: Places without a space that are tried before a longer piece is tried.
_MOST_TRIES = 256

_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
#: Between a letter or digit and ASCII punctuation, white space or the commonest Chinese marks; and
#: between a letter and a digit.
_ENDS = (
    rf"(?<=[0-9{_LETTERS}])"
    r"(?=[\t\n\r !-&(-/:-@\[-\^`{-~\uff0c\u3002\u3001\uff01\uff1f\uff1b\uff1a])"
    r"|(?<=[A-Za-z])(?=[0-9])"
)
_WORD_ENDS: dict[WordEnds, re.Pattern[str]] = {
    "spaces": re.compile(rf"{_ENDS}|(?<=[^\s{GUARD}])(?= )"),
    "letters": re.compile(_ENDS),
}


class TextPiece(NamedTuple):
    """text: to be encoded; drop: how many of its first tokens to drop, because of the cut."""

    text: str
    drop: int


class Pieces:
    """Cuts texts for one vocabulary.

    added: the tokens that are cut out of a text before anything else, as `tokenizers.AddedToken`.
    """

    def __init__(self, vocabulary: Vocabulary, added: list[Any]) -> None:
        self._tokens, self._is_spm = vocabulary.tokens, vocabulary.is_spm
        self._prefix = vocabulary.space_prefix
        self._word_ends = _WORD_ENDS.get(_word_ends(vocabulary))
        self._cuts = self._word_ends is not None and not any(t.single_word for t in added)
        self._inside = {pair for t in added for pair in map("".join, pairwise(t.content))}
        self._firsts = {token.content[:1] for token in added} | {GUARD}
        self._lasts = {token.content[-1:] for token in added}
        self._swallow = {token.content[-1:] for token in added if token.rstrip}
        n_bytes = len(vocabulary.ids_of(TokenType.BYTE))
        self._known = None if n_bytes == 256 else {t for t in self._tokens if len(t) == 1}
        self._joined: dict[str, bool] = {}  # two characters -> whether a token has them

    def of(self, text: str) -> Iterator[TextPiece]:
        """The pieces of a text, in order. The text must be without lone surrogates.

        Raises InputError for a stretch of more than MOST_STRETCH bytes that cannot be cut.
        """
        start = drop = 0
        while len(text) - start > PIECE and self._cuts:
            end = self._end(text, start)
            if end is None:
                break
            yield TextPiece(text[start:end], drop)
            start, drop = end, 0
            if self._is_spm and self._prefix:
                skips = text[end] == " "
                start, drop = end + skips, 1 - skips
        yield TextPiece(text[start:] if start else text, drop)

    def _end(self, text: str, start: int) -> int | None:
        """The end of the piece that begins at `start`; None: the end of the text."""
        low = start
        while (high := low + PIECE) < len(text):
            for place in self._places(text, low, high):
                if self._is_border(text, place):
                    return place
            low = high
            if len(text[start:high].encode()) > MOST_STRETCH:
                raise InputError(
                    f"the text cannot be cut for {MOST_STRETCH >> 10} KiB from character {start} "
                    "on: break it by spaces or new lines"
                )
        return None

    def _places(self, text: str, low: int, high: int) -> Iterator[int]:
        """Places between low and high where a cut may be tried, the last first."""
        if not self._is_spm and self._word_ends is not None:
            ends = [match.start() for match in self._word_ends.finditer(text, low + 1, high)]
            yield from reversed(ends)
            return
        place = high
        while (place := text.rfind(" ", low + 1, place)) > 0:
            yield place
        yield from range(high - 1, max(low, high - _MOST_TRIES), -1)

    def _is_border(self, text: str, place: int) -> bool:
        """Whether no token can span this place."""
        before, behind = text[place - 1], text[place]
        if before + behind in self._inside or (before in self._swallow and behind.isspace()):
            return False
        if not self._is_spm:
            return True
        if self._swallow and before.isspace():
            return False
        if before in (" ", GUARD, SPM_SPACE) or behind in (GUARD, SPM_SPACE):
            return False
        spelled = SPM_SPACE if behind == " " else behind
        if self._has(before + spelled) or not (self._known is None or spelled in self._known):
            return False
        if not self._prefix:
            return True
        first = text[place + 1 : place + 2] if behind == " " else behind
        if before in self._lasts or first in self._firsts:  # an added token gets its own space
            return False
        if first == SPM_SPACE or not first or first.isspace():
            return False
        return behind == " " or not self._has(SPM_SPACE + behind)

    def _has(self, pair: str) -> bool:
        """Whether a token holds these two characters side by side."""
        is_joined = self._joined.get(pair)
        if is_joined is None:
            is_joined = self._joined[pair] = any(pair in token for token in self._tokens)
        return is_joined


def _word_ends(vocabulary: Vocabulary) -> WordEnds:
    """Where this vocabulary's words end; for SentencePiece, whether its texts can be cut at all."""
    if vocabulary.file is None:
        return "spaces" if vocabulary.is_spm else pre_split(vocabulary.pre).word_ends
    found: WordEnds = "spaces" if vocabulary.is_spm else "nowhere"
    splits: list[Any] = []
    for step in vocabulary.steps:
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            found = found if step.get("use_regex") is False else "spaces"
        elif kind == "Split":
            splits.append(pattern.get("Regex"))
        elif kind == "Replace" and pattern.get("String") in (" ", GUARD):
            pass
        elif kind not in (None, "Sequence", "NFC", "Prepend", "Digits", "Metaspace"):
            return "nowhere"
    if not splits:
        return found
    rows = PRE_SPLITS.values()
    return next((row.word_ends for row in rows if row.patterns == tuple(splits)), "nowhere")
