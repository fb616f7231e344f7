"""One call of a session: the prompt is read, then tokens come one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from edge import native
from edge.errors import CancelledError
from edge.progress import silent
from edge.session.results import FinishReason, Piece, TokenLogprob
from edge.session.sampler import Floats, Sampler, largest
from edge.session.stops import AnswerText

if TYPE_CHECKING:
    from edge.backend import Backend
    from edge.session.stream import Stream
    from edge.session.transcript import Transcript
    from edge.tokenizer import Tokenizer

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """One call of a session: what it works with, and its work.

    engine: what runs tokens. transcript: the session's, which grows by the prompt and the answer.
    stream: has the request and the prompt; its `usage` and `finish_reason` are set here.
    checkpoint: called before each run, when tokens and cache agree.
    """

    engine: Backend
    tokenizer: Tokenizer
    transcript: Transcript
    stream: Stream
    checkpoint: Callable[[], None]

    def pieces(self) -> Generator[Piece, None, None]:
        """The answer, each piece computed when it is asked for.

        A prompt that is cancelled, or fails, is taken back; with `reuse` what was computed of it
        stays. Raises what the engine and the checkpoint raise.
        """
        stream, transcript = self.stream, self.transcript
        try:
            if transcript.is_full and not stream.prompt:
                n, cached = len(transcript.tokens), transcript.cache.length
                stream.usage = replace(stream.usage, prompt_tokens=n, cached_tokens=cached)
                stream.finish_reason = "context"
            elif (logits := self._read_prompt()) is None:
                stream.finish_reason = "cancelled"
            else:
                yield from self._decode(logits)
        except GeneratorExit:  # the caller left
            stream.finish_reason = stream.finish_reason or "cancelled"
            raise

    def _read_prompt(self) -> Floats | None:
        """Logits (n_vocab,) after the prompt; None when it was cancelled, and taken back."""
        if self.stream.cancel_flag.is_set():  # the prompt may not be whole
            return None
        transcript, prompt, reuse = self.transcript, self.stream.prompt, self.stream.request.reuse
        start = transcript.common_prefix(prompt) if reuse else len(transcript.tokens)
        transcript.cut(start)
        is_read = False
        try:
            transcript.append(prompt[start:] if reuse else prompt)
            transcript.adopt()
            logits = self._run_rest()
            is_read = True
            return logits
        except CancelledError:
            return None
        finally:
            if not is_read:
                transcript.cut(max(start, transcript.cache.length) if reuse else start)

    def _run_rest(self) -> Floats:
        """Run the tokens that the cache does not hold yet, chunk by chunk. The logits (n_vocab,) of
        the last.
        """
        stream, transcript = self.stream, self.transcript
        cached, n = transcript.cache.length, len(transcript.tokens)
        stream.usage = replace(stream.usage, prompt_tokens=n, cached_tokens=cached)
        progress = stream.request.progress or silent
        logits: Floats | None = None
        progress(0, n - cached)
        start = perf_counter()
        while transcript.cache.length < n:
            chunk = transcript.next_chunk(self.engine.chunk)
            done = transcript.cache.length + len(chunk)
            logits = self._run(chunk, last=done == n)
            progress(done - cached, n - cached)
        stream.usage = replace(stream.usage, prompt_seconds=perf_counter() - start)
        if stream.cancel_flag.is_set():
            raise CancelledError("the call was cancelled")
        assert logits is not None
        return logits

    def _run(self, tokens: Sequence[int], *, last: bool = True) -> Floats | None:
        """One native call. Logits (n_vocab,) of the last token; None where they are not needed."""
        if self.stream.cancel_flag.is_set():
            raise CancelledError("the call was cancelled")
        self.checkpoint()
        logits = self.engine.run(
            self.transcript.cache,
            tokens,
            logits="last" if last else "none",
            cancel=self.stream.cancel_flag,
        )
        return None if logits is None else logits[0]

    def _decode(self, logits: Floats) -> Generator[Piece, None, None]:
        """Token by token until something ends it; then the text that was held back."""
        request, tokenizer, transcript = self.stream.request, self.tokenizer, self.transcript
        answer = AnswerText(tokenizer, request.stop, after=transcript.tokens[-1])
        sampler = Sampler(request.sampling)
        sampler.draws = len(transcript.tokens)  # by position: a later call draws the same tokens
        limit = request.max_tokens
        reason: FinishReason = "length"
        for i in itertools.count() if limit is None else range(limit):
            start = perf_counter()
            if i:  # the first logits are the prompt's
                if transcript.is_full:
                    reason = "context"
                    break
                try:
                    following = self._run(transcript.tokens[-1:])
                except CancelledError:
                    reason = "cancelled"
                    break
                assert following is not None
                logits = following
            token = sampler.sample(logits, transcript.tokens)
            transcript.append([token])
            ended = token in tokenizer.eos_ids
            self._count(start, not ended, step=i > 0)
            if ended:
                reason = "stop"
                break
            yield _piece(answer.push(token), token, logits, request.logprobs)
            if answer.stopped:
                reason = "stop"
                break
        self.stream.finish_reason = reason
        if rest := answer.flush():
            yield Piece(rest)

    def _count(self, start: float, counts: bool, *, step: bool) -> None:
        """Add one token to the usage. start: when work on it began; counts: it is part of the
        answer; step: it took a run.
        """
        usage = self.stream.usage
        self.stream.usage = replace(
            usage,
            completion_tokens=usage.completion_tokens + counts,
            decode_steps=usage.decode_steps + step,
            decode_seconds=usage.decode_seconds + (perf_counter() - start if step else 0.0),
        )


def _piece(text: str, token: int, logits: Floats, n_top: int) -> Piece:
    """A piece with the log-probabilities of the model itself, before penalties and temperature."""
    if n_top == 0:
        return Piece(text, token)
    logprobs = native.log_softmax(logits)
    top = tuple(TokenLogprob(int(i), float(logprobs[i])) for i in largest(logprobs, n_top))
    return Piece(text, token, float(logprobs[token]), top)
