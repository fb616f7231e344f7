"""A text cut into windows, and a window into runs.

The text is tokenised once and cut into windows of `context` tokens that do not overlap. Tokens
after the last full window are not used. Where the model wants a beginning-of-sequence token, it
replaces the window's first token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from edge import check
from edge.engine.plan import CHUNK
from edge.engine.states import WindowPiece
from edge.errors import CancelledError, InputError
from edge.native.cancel import Cancel

if TYPE_CHECKING:
    from edge.tokenizer import Tokenizer

__all__ = ["MIN_CONTEXT", "ROWS", "Windows", "cut_tokens", "pieces"]

#: Rows of logits in memory at a time: 51 MB for a vocabulary of 200,000.
ROWS = 64
#: The fewest tokens of a window: three of them are scored.
MIN_CONTEXT = 8


@dataclass(frozen=True)
class Windows:
    """A text cut for measuring. tokens: `context` token ids for each window."""

    tokens: tuple[Sequence[int], ...]
    context: int

    @property
    def first(self) -> int:
        """The first position of a window that is scored."""
        return self.context // 2

    @property
    def n_scored(self) -> int:
        """How many positions of all windows are scored."""
        return len(self.tokens) * (self.context - self.first - 1)


def cut_tokens(
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    cancel: Cancel | None = None,
) -> Windows:
    """Tokenise a text and cut it. context: tokens of a window, from 8; chunks: the most windows,
    None: as many as the text has. Only the text of these windows is encoded. cancel: see
    `Tokenizer.encode`.

    Raises CancelledError; InputError for a text that is too short for one window, and for numbers
    out of range.
    """
    text = check.text("text", text)
    context = check.whole("context", context, MIN_CONTEXT)
    chunks = check.optional(check.whole, "chunks", chunks, 1)
    tokens = array("i")
    for piece in tokenizer.pieces(text):
        if cancel is not None and cancel.is_set():
            raise CancelledError("the call was cancelled")
        tokens.extend(piece)
        if chunks is not None and len(tokens) >= chunks * context:
            break
    n_windows = len(tokens) // context
    if not n_windows:
        raise InputError(
            f"the text has {len(tokens)} tokens, a window of {context} needs {context}: "
            "take a longer text or a smaller context"
        )
    windows = []
    for i in range(n_windows if chunks is None else min(n_windows, chunks)):
        window = tokens[i * context : (i + 1) * context]
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            window[0] = tokenizer.bos_id
        windows.append(window)
    return Windows(tuple(windows), context)


def pieces(tokens: Sequence[int], first: int) -> Iterator[WindowPiece]:
    """A window in runs: those from position `first` on are scored."""
    starts = [*range(0, first, CHUNK), *range(first, len(tokens), ROWS)]
    for start, end in pairwise([*starts, len(tokens)]):
        yield WindowPiece(tokens[start:end], is_scored=start >= first)
