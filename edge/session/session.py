"""A session: tokens, the cache of their keys and values, and the loop that makes new ones.

Between two native calls the cache holds the first `cache.length` of the session's tokens, whatever
happened: a token is in the list before it is run, and the cache is cut before the list. So an
exception, Ctrl-C or a stream that nobody finishes leaves nothing to repair.
"""

from __future__ import annotations

import itertools
import os
import threading
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from edge import check, forked, native
from edge.errors import CancelledError, ContextError, InputError, SessionFileError
from edge.kv.shape import PAGE, WhenFull
from edge.native.cancel import Cancel
from edge.session import journal
from edge.session.overlap import common_prefix
from edge.session.request import CallOptions, Request
from edge.session.results import Completion, FinishReason, Piece, TokenLogprob
from edge.session.sampler import Floats, Sampler, largest
from edge.session.stops import AnswerText
from edge.session.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.model import Model

__all__ = ["Session"]

#: What gives the token ids of a call's prompt; it raises CancelledError when the flag is set.
Encode = Callable[[Request, Cancel], list[int]]


class Session:
    """Text, or tokens, that the model continues. One thread at a time; `cancel` from any.

    when_full: what happens when it holds as many tokens as the context: "stop": the answer ends.
    "slide": it goes on, in the same memory. A token then sees the first 64 tokens and, in whole
    blocks of 64, the last n_context - 64 up to itself; positions go on to those that the model was
    made for. options: defaults for the calls of this session, see `edge.session.request.Request`.
    Whole blocks of 64 tokens that another session has computed are not computed again.
    Every method but `cancel` and `close` raises InputError while another thread uses the session,
    and after it or its model was closed.
    """

    def __init__(
        self, model: Model, when_full: WhenFull = "stop", **options: Unpack[CallOptions]
    ) -> None:
        self._model = model
        self._defaults = Request().but(options)
        self._engine = model.engine
        self._cache = self._engine.cache(when_full)
        self._tokens = array("i")
        self._current: Stream | None = None
        self._flag = Cancel()  # of the call under way, from before its prompt is encoded
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        self._user: int | None = None  # the thread that has the lock
        self._closed = False
        self._journal: journal.Journal | None = None
        self._about: Callable[[], dict[str, Any]] = dict  # what a chat adds to a session's file
        forked.watch(self)

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens so far: prompts and answers, end tokens included."""
        return list(self._tokens)

    @property
    def n_context(self) -> int:
        """The most tokens that the session keeps in memory: all that it can hold, unless it slides;
        then the most of one prompt.
        """
        return int(self._engine.config.n_context)

    @property
    def when_full(self) -> WhenFull:
        """What it does when the context is full: "stop" or "slide"."""
        return self._cache.when_full

    def stream(self, prompt: str | Sequence[int], **options: Unpack[CallOptions]) -> Stream:
        """Continue the session with a prompt; pieces of the answer as they come.

        prompt: text or token ids, put behind what the session holds; the first text gets the
        beginning-of-sequence token where the model wants one. Empty: go on where the last call
        ended, which a session that is full ends at once, with the finish reason "context".
        options: see `edge.session.request.Request`. A call that is cancelled, or fails, before the
        first token leaves the session as it was (with reuse: with what was computed so far).
        Raises InputError for a prompt or an option that cannot be, ContextError when the tokens
        do not fit.
        """
        return self._begin(partial(self._encode, prompt), options)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[CallOptions]) -> Completion:
        """As `stream`, run to the end."""
        return self.stream(prompt, **options).finish()

    def cancel(self) -> None:
        """End the call that is under way, from any thread, within one chunk of its work."""
        self._flag.set()

    def trim(self, n_tokens: int) -> None:
        """Keep the first n_tokens tokens. Ends a stream under way. Raises InputError."""
        with self._exclusive():
            n_tokens = self._check_holds(n_tokens)
            self._current = None
            self._cut(n_tokens)
            self._write_journal()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file that `edge.resume` goes on from, without computing anew.

        path: a file that is there is replaced, once the new one is whole and on the disk.
        Raises SessionFileError when that fails: the session goes on, a file that was there stays.
        """
        path = check.path("path", path)
        with self._exclusive():
            mine = self._journal
            if mine is not None and mine.file.path == os.path.realpath(path):
                mine.rewrite(self)
            else:
                journal.save(self, path).close()

    def autosave(self, path: str | os.PathLike[str], every: int = 32) -> None:
        """As `save`, and from now on keep the file up to date: whenever the process is killed or
        the power is cut, at most the last `every` tokens are lost.

        The file is locked until the session is closed or saves itself elsewhere.
        Raises SessionFileError; later, calls raise it when the file cannot be written any more:
        the session stays as it is and goes on, without the file.
        """
        path, every = check.path("path", path), check.whole("every", every, 1)
        with self._exclusive():
            mine = self._journal
            if mine is not None and mine.file.path == os.path.realpath(path):
                mine.rewrite(self)
                mine.every = every
                return
            self._journal = journal.Journal(self, journal.save(self, path), every)
            if mine is not None:
                mine.file.close()

    def reset(self) -> None:
        """Forget everything."""
        self.trim(0)

    def fork(self) -> Session:
        """Another session that goes on from here, with the same options: both share the memory of
        what they have in common.
        """
        with self._exclusive():
            twin = self._model.session(self._cache.when_full)
            twin._defaults, twin._tokens = self._defaults, self._tokens[:]
            twin._cache = self._cache.fork()  # the one it had was empty
            return twin

    def keep(self, n_tokens: int | None = None) -> int:
        """Write what was computed for the first n_tokens (None: all) to the model's prefix_cache,
        so that a later process need not compute it; returns of how many tokens, whole blocks of 64.

        It survives a power cut from then on. Raises InputError when the model was loaded without
        a prefix_cache, or when it cannot be written; the session is as it was.
        """
        with self._exclusive():
            n = len(self._tokens) if n_tokens is None else self._check_holds(n_tokens)
            return self._cache.keep(n)

    def close(self) -> None:
        """Cancel what is under way and give the cache's memory back.

        Nothing happens in a forked child: session and file are the parent's.
        """
        if self._lock is forked.REFUSAL:
            return
        self.cancel()
        if self._lock.locked() and self._user == threading.get_ident():
            raise InputError("a session cannot be closed from within its own call")
        with self._lock:
            if not self._closed:
                self._closed = True
                try:
                    self._write_journal(last=True)
                finally:
                    self._current = None
                    self._cache.close()
                    if self._journal is not None:
                        self._journal.file.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside ----

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the session, or raise InputError. Who loses a race to it waits for one piece."""
        if self._lock.locked():
            raise InputError("the session is in use by another call")
        with self._lock:  # a plain `with`: an interrupt cannot leave it locked
            self._user = threading.get_ident()
            try:
                if self._closed or self._model.closed:
                    raise InputError("the session or its model is closed")
                yield
            finally:
                self._user = None

    def _begin(self, encode: Encode, options: CallOptions) -> Stream:
        """A call whose prompt is encoded here: it can be cancelled from now on."""
        request = self._defaults.but(options).settled(self._engine.n_vocab)
        with self._exclusive():
            before, self._flag = self._flag, Cancel()
            try:
                ids = encode(request, self._flag)
                if not ids and (request.reuse or not self._tokens):
                    raise InputError("the prompt is empty")
                if ids or not self._is_full:
                    n_common = common_prefix(self._tokens, ids) if request.reuse else None
                    self._check_fits(len(ids), n_common)
            except CancelledError:
                ids = []  # the stream ends as cancelled
            except BaseException:
                self._flag = before
                raise
            self._current = Stream(self, request, ids, self._flag)
            return self._current

    def _encode(
        self, prompt: str | Sequence[int], request: Request, cancel: Cancel, *, times: int = 1
    ) -> list[int]:
        """Token ids of a prompt, of a text at most so many times those that there is room for.
        Raises CancelledError, ContextError.
        """
        if isinstance(prompt, str):
            fresh = request.reuse or not self._tokens
            try:
                return self._model.tokenizer.encode(
                    prompt,
                    special=request.special,
                    bos=None if fresh else False,
                    room=times * self._room(request),
                    cancel=cancel,
                )
            except ContextError as error:
                n_common = len(self._tokens) if request.reuse else None
                self._check_fits(error.needed, n_common, at_least=error.at_least)
                raise
        return check.tokens("the prompt", prompt, self._engine.n_vocab)

    def _room(self, request: Request) -> int:
        """The most tokens that the prompt of a call may have."""
        n_held = len(self._tokens)
        room = self._cache.limit - (0 if request.reuse else n_held)
        if self._cache.when_full == "slide":
            room = min(room, self.n_context + (n_held if request.reuse else 0))
        return max(room, 0)

    def _check_text(self, text: str, request: Request) -> None:
        """Raise ContextError for a text that cannot fit, however it is encoded."""
        tokenizer = self._model.tokenizer
        if len(text) > tokenizer.most_bytes(self._room(request)):
            n_tokens = -(-len(text) // tokenizer.most_bytes(1))
            n_common = len(self._tokens) if request.reuse else None
            self._check_fits(n_tokens, n_common, at_least=True)

    def _check_holds(self, n_tokens: int) -> int:
        n_tokens = check.whole("n_tokens", n_tokens)
        if n_tokens > len(self._tokens):
            raise InputError(
                f"the session holds {len(self._tokens)} tokens, cannot keep {n_tokens}"
            )
        return n_tokens

    @property
    def _most_tokens(self) -> int:
        """The most tokens that there can be: all that can be run, and the one that they led to."""
        return self._cache.limit + 1

    @property
    def _is_full(self) -> bool:
        """Whether no token can come any more: the last one cannot be run."""
        return len(self._tokens) >= self._most_tokens

    def _check_fits(self, n_prompt: int, n_common: int | None, *, at_least: bool = False) -> None:
        """Raise ContextError when a prompt of n_prompt tokens, or at_least so many, does not fit.
        n_common: tokens of it that the session holds, None: it goes behind them.
        """
        limit, slides = self._cache.limit, self._cache.when_full == "slide"
        n_tokens = n_prompt + (len(self._tokens) if n_common is None else 0)
        n_new = n_prompt - (n_common or 0)
        hint = "shorten the prompt, or load the model with a larger context"
        what = f"the context of {limit} holds"
        if slides and n_new > self.n_context:
            n_tokens, limit = n_new, self.n_context
            what = f"a context of {limit} takes at once"
        elif slides:
            what = f"the {limit} positions that the model has"
            hint = "start a new session"
        if n_tokens > limit:
            raise ContextError(
                f"{'at least ' * at_least}{n_tokens} tokens are {n_tokens - limit} more than "
                f"{what}: {hint}",
                needed=n_tokens,
                limit=limit,
                at_least=at_least,
            )

    def _can_cut(self, n_tokens: int) -> bool:
        """Whether a cut to n_tokens leaves all that the next token sees; what lies behind a window
        that slid is gone, and all that came after it would be computed anew.
        """
        cache = self._cache
        if cache.when_full == "stop" or n_tokens >= cache.length:
            return True
        gone = cache.unseen(n_tokens)
        return all(i in gone or cache.has_page(i) for i in range(-(-n_tokens // PAGE)))

    def _keep_prefix(self, tokens: Sequence[int]) -> None:
        """`keep` what the session has in common with these tokens, from within a call."""
        self._cache.keep(common_prefix(self._tokens, tokens))

    def _write_journal(self, *, if_due: bool = False, last: bool = False) -> None:
        """Bring the file, if there is one, up to date; leave it where that fails, and raise
        SessionFileError.
        """
        if self._journal is None or (if_due and not self._journal.is_due(self)):
            return
        try:
            self._journal.write(self, last=last)
        except SessionFileError:
            self._journal.file.close()
            self._journal = None
            raise

    def _cut(self, n_tokens: int) -> None:
        if self._journal is not None:
            self._journal.cut(n_tokens)
        if self._cache.length > n_tokens:
            self._cache.trim(n_tokens)
        del self._tokens[n_tokens:]

    def _generate(self, out: Stream) -> Generator[Piece, None, None]:
        """The loop: prompt, then token by token. Sets out.finish_reason and out.usage."""
        try:
            if self._is_full and not out.prompt:
                n, cached = len(self._tokens), self._cache.length
                out.usage = replace(out.usage, prompt_tokens=n, cached_tokens=cached)
                out.finish_reason = "context"
            elif (logits := self._read_prompt(out)) is None:
                out.finish_reason = "cancelled"
            else:
                yield from self._decode(logits, out)
            self._write_journal()
        except GeneratorExit:  # the caller left
            out.finish_reason = out.finish_reason or "cancelled"
            raise

    def _read_prompt(self, out: Stream) -> Floats | None:
        """Logits (n_vocab,) after the prompt; None when it was cancelled, and taken back."""
        if out.cancel_flag.is_set():  # the prompt may not be whole
            return None
        ids, reuse = out.prompt, out.request.reuse
        start = common_prefix(self._tokens, ids) if reuse else len(self._tokens)
        self._cut(start)
        read = False
        try:
            self._tokens.extend(ids[start:] if reuse else ids)
            if self._cache.length >= len(self._tokens):  # the last token again, for its logits
                self._cache.trim(len(self._tokens) - 1)
            self._cache.adopt(self._tokens[:-1])
            logits = self._run_rest(out)
            read = True
            return logits
        except CancelledError:
            return None
        finally:
            if not read:
                self._cut(max(start, self._cache.length) if reuse else start)

    def _run_rest(self, out: Stream) -> Floats:
        """Run the tokens that the cache does not hold yet, chunk by chunk; the last logits."""
        cached, n = self._cache.length, len(self._tokens)
        out.usage = replace(out.usage, prompt_tokens=n, cached_tokens=cached)
        progress = out.request.progress or _no_progress
        logits: Floats | None = None
        progress(0, n - cached)
        began = perf_counter()
        while (done := self._cache.length) < n:
            chunk = self._tokens[done : done + self._cache.room(self._engine.chunk)]
            logits = self._step(chunk, out, last=done + len(chunk) == n)
            progress(done + len(chunk) - cached, n - cached)
        out.usage = replace(out.usage, prompt_seconds=perf_counter() - began)
        if out.cancel_flag.is_set():
            raise CancelledError("the call was cancelled")
        assert logits is not None
        return logits

    def _step(self, tokens: Sequence[int], out: Stream, *, last: bool = True) -> Any:
        """One native call. Logits (n_vocab,) of the last token; None where they are not needed."""
        if out.cancel_flag.is_set():
            raise CancelledError("the call was cancelled")
        self._write_journal(if_due=True)
        logits = self._engine.run(
            self._cache, tokens, logits="last" if last else "none", cancel=out.cancel_flag
        )
        return None if logits is None else logits[0]

    def _decode(self, logits: Floats, out: Stream) -> Generator[Piece, None, None]:
        """Token by token until something ends it; then the text that was held back."""
        request, tokenizer = out.request, self._model.tokenizer
        answer = AnswerText(tokenizer, request.stop, after=self._tokens[-1])
        sampler = Sampler(request.sampling)
        sampler.draws = len(self._tokens)  # by position: going on later gives the same answer
        limit = request.max_tokens
        reason: FinishReason = "length"
        for i in itertools.count() if limit is None else range(limit):
            began = perf_counter()
            if i:  # the first logits are the prompt's
                if self._is_full:
                    reason = "context"
                    break
                try:
                    logits = self._step(self._tokens[-1:], out)
                except CancelledError:
                    reason = "cancelled"
                    break
            token = sampler.sample(logits, self._tokens)
            self._tokens.append(token)
            ended = token in tokenizer.eos_ids
            self._count(out, began, not ended, step=i > 0)
            if ended:
                reason = "stop"
                break
            yield _piece(answer.push(token), token, logits, request.logprobs)
            if answer.stopped:
                reason = "stop"
                break
        out.finish_reason = reason
        if rest := answer.flush():
            yield Piece(rest)

    @staticmethod
    def _count(out: Stream, began: float, counts: bool, *, step: bool) -> None:
        """Add one token to the usage."""
        u = out.usage
        out.usage = replace(
            u,
            completion_tokens=u.completion_tokens + counts,
            decode_steps=u.decode_steps + step,
            decode_seconds=u.decode_seconds + (perf_counter() - began if step else 0.0),
        )


def _no_progress(done: int, total: int) -> None:
    pass


def _piece(text: str, token: int, logits: Floats, n_top: int) -> Piece:
    """A piece with the log-probabilities of the model itself, before penalties and temperature."""
    if n_top == 0:
        return Piece(text, token)
    logprobs = native.log_softmax(logits)
    top = tuple(TokenLogprob(int(i), float(logprobs[i])) for i in largest(logprobs, n_top))
    return Piece(text, token, float(logprobs[token]), top)
