"""A call that is under way: an iterator of pieces that also knows how it ended."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from edge.session.request import Request
from edge.session.results import Completion, FinishReason, Piece, TokenLogprob, Usage

if TYPE_CHECKING:
    from edge.native.cancel import Cancel

__all__ = ["Stream"]


class Stream(Iterator[Piece]):
    """Pieces of an answer, each computed when it is asked for.

    Get one from `Session.stream` or `Chat.stream`. Leave it whenever you like: the session keeps
    what has come so far, and its next call ends this stream. `next` raises InputError when another
    call took the session over, or another thread uses it in this moment; errors of the engine come
    as they are.

    steps: gives what computes the pieces of this stream. hold: gives what each step is within; it
    raises InputError when the session cannot be used, or belongs to another stream.
    """

    def __init__(
        self,
        request: Request,
        prompt: Sequence[int],
        cancel: Cancel,
        steps: Callable[[Stream], Generator[Piece, None, None]],
        hold: Callable[[Stream], AbstractContextManager[None]],
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.cancel_flag = cancel
        #: How it ended; None while it runs, and after an error.
        self.finish_reason: FinishReason | None = None
        self.usage = Usage()
        self._answer = _Answer()
        self._steps, self._hold = steps(self), hold
        self._watchers: list[Callable[[], None]] = []
        #: Whether it ended, be it at its end, by a cancel or by an error.
        self.ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        if self.ended:
            raise StopIteration
        with self._hold(self):
            try:
                piece = next(self._steps)
            except BaseException:  # StopIteration too
                self.ended = True
                self._tell()
                raise
            self._answer.add(piece)
            self._tell()
            return piece

    def cancel(self) -> None:
        """End the stream within one chunk of work, from any thread."""
        self.cancel_flag.set()

    def close(self) -> None:
        """End the stream here. From another thread than the one it runs in: `cancel`."""
        self.cancel()
        if not self.ended:
            try:
                self._steps.close()
            except ValueError:  # it runs, in another thread
                return
            self.ended, self.finish_reason = True, self.finish_reason or "cancelled"

    def finish(self) -> Completion:
        """Run to the end and return the whole answer."""
        for _ in self:
            pass
        return self.completion

    @property
    def text(self) -> str:
        """The text so far."""
        return self._answer.text

    @property
    def n_tokens(self) -> int:
        """How many tokens there are so far."""
        return len(self._answer.tokens)

    @property
    def completion(self) -> Completion:
        """The answer so far."""
        sampling = self.request.sampling
        return Completion(
            text=self.text,
            tokens=tuple(self._answer.tokens),
            finish_reason=self.finish_reason,
            usage=self.usage,
            logprobs=tuple(self._answer.pieces()) if self.request.logprobs else (),
            seed=sampling.seed if sampling.temperature > 0 else None,
        )

    def watch(self, callback: Callable[[], None]) -> None:
        """Call this after each piece and at the end."""
        self._watchers.append(callback)

    def _tell(self) -> None:
        for callback in self._watchers:
            callback()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Answer:
    """The pieces of an answer in little memory, since one in a sliding context may have no end: a
    token takes 4 bytes and its text, and 12 bytes for each log-probability.
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self._text = bytearray()  # UTF-8
        self._lengths = array("i")  # of the texts of the tokens, where there are log-probabilities
        self._top = array("i")
        self._logprobs = array("d")  # of each token: its own, then those of the top ones

    def add(self, piece: Piece) -> None:
        """Put a piece behind the others."""
        self._text += piece.text.encode()
        if piece.token is None:
            return
        self.tokens.append(piece.token)
        if piece.logprob is not None:
            self._lengths.append(len(piece.text))
            self._top.extend(top.token for top in piece.top)
            self._logprobs.extend([piece.logprob, *(top.logprob for top in piece.top)])

    @property
    def text(self) -> str:
        return self._text.decode()

    def pieces(self) -> Iterator[Piece]:
        """The pieces of all tokens again, of an answer with log-probabilities."""
        text, start = self.text, 0
        n_top = len(self._top) // max(len(self.tokens), 1)
        for i, (token, length) in enumerate(zip(self.tokens, self._lengths, strict=True)):
            own, *best = self._logprobs[i * (n_top + 1) : (i + 1) * (n_top + 1)]
            ids = self._top[i * n_top : (i + 1) * n_top]
            top = tuple(map(TokenLogprob, ids, best))
            yield Piece(text[start : start + length], token, own, top)
            start += length
