"""The same text in other tokens: those that a model chose, and those that the text encodes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

__all__ = ["common_prefix", "common_text"]


class Sign(NamedTuple):
    """What comes out with a token.

    of: text, or the id of a control token, which stands for itself alone; is_whole: whether no
    character is half done behind it.
    """

    of: str | int
    is_whole: bool = True


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def common_text(
    tokenizer: Tokenizer, a: Sequence[int], b: Sequence[int], *, trimmed: bool = False
) -> tuple[int, int]:
    """How many first tokens of `a`, and of `b`, have the same text: the most of which that is so,
    and behind which no character is half done.

    trimmed: `a` may have whitespace that `b` has not.
    """
    start = common_prefix(a, b)
    while start and not tokenizer.is_special(a[start - 1]):  # where no character is half done
        start -= 1
    after = a[start - 1] if start else None
    left, right = (_Side(_signs(tokenizer, ids[start:], after)) for ids in (a, b))
    best = 0, 0
    while True:
        left.read()
        right.read()
        if not left.text and not right.text:  # the next is a control token, or none
            if left.next is None or left.next != right.next:
                break
            left.skip()
            right.skip()
        elif n := _same(left.text, right.text):
            left.text, right.text = left.text[n:], right.text[n:]
        elif trimmed and left.text[:1].isspace():
            left.text = left.text[1:]
        else:
            break
        if not left.text and not right.text and left.is_whole and right.is_whole:
            best = left.n, right.n
    return start + best[0], start + best[1]


class _Side:
    """One of two token sequences. text: of the first n tokens, what the other has not; is_whole:
    whether they end no character half way; next: the sign of the token behind them, None at the
    end.
    """

    def __init__(self, signs: Iterator[Sign]) -> None:
        self._signs, self.n, self.text, self.is_whole = signs, 0, "", True
        self.next = next(signs, None)

    def read(self) -> None:
        """Have some text, unless a control token or the end comes first."""
        while not self.text and self.next is not None and isinstance(self.next.of, str):
            self.text = self.next.of
            self.skip()

    def skip(self) -> None:
        """Go on to the next token."""
        self.is_whole = self.next is None or self.next.is_whole
        self.n, self.next = self.n + 1, next(self._signs, None)


def _signs(tokenizer: Tokenizer, tokens: Sequence[int], after: int | None) -> Iterator[Sign]:
    """What each of these tokens adds to the text behind the token `after`, None: to its start."""
    decoder, last = tokenizer.decoder(after=after), list[Sign]()  # last: the one before, if any
    for token in tokens:
        text = decoder.push(token)
        if not tokenizer.is_special(token):
            yield from last
            last = [Sign(text, not decoder.is_unfinished)]
            continue
        yield from _ended(last, text)  # what the one before left half done
        last = [Sign(token)]
    yield from _ended(last, decoder.flush())


def _ended(signs: list[Sign], rest: str) -> list[Sign]:
    """The same signs, with what the decoder makes of the character that they left half done."""
    return [sign if isinstance(sign.of, int) else Sign(sign.of + rest) for sign in signs]


def _same(a: str, b: str) -> int:
    """How many first characters are the same."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
