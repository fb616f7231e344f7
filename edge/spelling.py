"""The same text in other tokens: those that a model chose, and those that the text encodes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

__all__ = ["common_prefix", "common_text"]

#: What comes out with a token: text, or a control token, which stands for itself alone.
Sign: TypeAlias = "str | int"


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def common_text(
    tokenizer: Tokenizer, a: Sequence[int], b: Sequence[int], *, trimmed: bool = False
) -> tuple[int, int]:
    """How many first tokens of `a`, and of `b`, have the same text: the most of which that is so.

    trimmed: `a` may have whitespace that `b` has not.
    """
    start = common_prefix(a, b)
    while start and not tokenizer.is_special(a[start - 1]):  # where no character is half done
        start -= 1
    after = a[start - 1] if start else None
    left, right = (_signs(tokenizer, ids[start:], after) for ids in (a, b))
    i, j, ahead, behind = 0, 0, "", ""  # text of left[:i] and right[:j] that the other has not
    best = 0, 0
    while True:
        i, ahead = _more(left, i, ahead)
        j, behind = _more(right, j, behind)
        if not ahead and not behind:  # the next is a control token, or none
            if left[i : i + 1] != right[j : j + 1] or i == len(left):
                break
            i, j = i + 1, j + 1
        elif n := _same(ahead, behind):
            ahead, behind = ahead[n:], behind[n:]
        elif trimmed and ahead[:1].isspace():
            ahead = ahead[1:]
        else:
            break
        if not ahead and not behind:
            best = i, j
    return start + best[0], start + best[1]


def _signs(tokenizer: Tokenizer, tokens: Sequence[int], after: int | None) -> list[Sign]:
    """What each of these tokens adds to the text behind the token `after`, None: to its start."""
    decoder, signs = tokenizer.decoder(after=after), list[Sign]()

    def end(text: str) -> None:
        """The last token's, where it left a character half done."""
        if text and isinstance(signs[-1], str):
            signs[-1] += text

    for token in tokens:
        text = decoder.push(token)
        if tokenizer.is_special(token):
            end(text)
            signs.append(token)
        else:
            signs.append(text)
    end(decoder.flush())
    return signs


def _more(signs: Sequence[Sign], i: int, text: str) -> tuple[int, str]:
    """Some text, unless a control token or the end comes first; where the next sign is."""
    while not text and i < len(signs):
        sign = signs[i]
        if isinstance(sign, int):
            break
        i, text = i + 1, sign
    return i, text


def _same(a: str, b: str) -> int:
    """How many first characters are the same."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
