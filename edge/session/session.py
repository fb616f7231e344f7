"""A session: what users call to continue a text, its lock, its calls and its file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from edge import check, forked
from edge.errors import CancelledError, ContextError, InputError, SessionFileError
from edge.kv.shape import WhenFull
from edge.native.cancel import Cancel
from edge.session import journal
from edge.session.contents import Kind
from edge.session.file import SessionFile
from edge.session.generate import Call
from edge.session.recommended import recommended
from edge.session.request import CallOptions, Request
from edge.session.results import Completion, Piece
from edge.session.stream import Stream
from edge.session.transcript import Transcript

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.backend import Loaded

__all__ = ["Session"]

#: What gives the token ids of a call's prompt; it raises CancelledError when the flag is set.
Encode = Callable[[Request, Cancel], list[int]]


class Session:
    """Text, or tokens, that the model continues. One thread at a time; `cancel` from any.

    Get one from `Model.session`, `Session.fork` or `edge.resume`.
    when_full: what happens when it holds as many tokens as the context: "stop": the answer ends.
    "slide": it goes on, in the same memory. A token then sees the first 64 tokens and, in whole
    blocks of 64, the last n_context - 64 up to itself; positions go on to those that the model was
    made for. options: defaults for the calls of this session, see `edge.session.request.Request`.
    Whole blocks of 64 tokens that another session has computed are not computed again.
    Every method but `cancel` and `close` raises InputError while another thread uses the session,
    and after it or its model was closed.
    """

    def __init__(
        self,
        model: Loaded[Session],
        when_full: WhenFull = "stop",
        **options: Unpack[CallOptions],
    ) -> None:
        self.model = model
        self.defaults = Request().but(options)
        self._engine = model.engine
        self._recommended, _ = recommended(model.engine.recommended)
        cache = self._engine.cache(when_full)
        self.transcript = Transcript(cache, int(self._engine.config.n_context))
        #: What a chat adds to what the session's file says.
        self.about: Callable[[], dict[str, Any]] = dict
        self._current: Stream | None = None  # the one that may go on
        self._flag = Cancel()  # of the call under way, from before its prompt is encoded
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        self._user: int | None = None  # the thread that has the lock
        self._closed = False
        self._journal: journal.Journal | None = None
        forked.watch(self)

    @property
    def tokens(self) -> list[int]:
        """A copy of the tokens so far: prompts and answers, end tokens included."""
        return list(self.transcript.tokens)

    @property
    def n_context(self) -> int:
        """The most tokens that the session keeps in memory: all that it can hold, unless it slides;
        then the most of one prompt.
        """
        return self.transcript.n_context

    @property
    def when_full(self) -> WhenFull:
        """What it does when the context is full: "stop" or "slide"."""
        return self.transcript.cache.when_full

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
        return self.begin(partial(self.encode, prompt), options)

    def generate(self, prompt: str | Sequence[int], **options: Unpack[CallOptions]) -> Completion:
        """As `stream`, run to the end."""
        return self.stream(prompt, **options).finish()

    def cancel(self) -> None:
        """End the call that is under way, from any thread, within one chunk of its work."""
        self._flag.set()

    def trim(self, n_tokens: int) -> None:
        """Keep the first n_tokens tokens. Ends a stream under way. Raises InputError."""
        with self.hold():
            n_tokens = self._check_holds(n_tokens)
            self.end_stream()
            self.transcript.cut(n_tokens)
            self.update_file()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file that `edge.resume` goes on from, without computing anew.

        path: a file that is there is replaced, once the new one is whole and on the disk.
        Raises SessionFileError when that fails: the session goes on, a file that was there stays.
        """
        path = check.path("path", path)
        with self.hold():
            if (own := self._journal_at(path)) is not None:
                own.rewrite()
            else:
                journal.save(self.transcript, self._facts, path).close()

    def autosave(self, path: str | os.PathLike[str], every: int = 32) -> None:
        """As `save`, and from now on keep the file up to date: whenever the process is killed or
        the power is cut, at most the last `every` tokens are lost.

        The file is locked until the session is closed or saves itself elsewhere.
        Raises SessionFileError; later, calls raise it when the file cannot be written any more:
        the session stays as it is and goes on, without the file.
        """
        path, every = check.path("path", path), check.whole("every", every, 1)
        with self.hold():
            if (own := self._journal_at(path)) is not None:
                own.rewrite()
                own.every = every
                return
            former = self._journal
            self.keep_in(journal.save(self.transcript, self._facts, path), every)
            if former is not None:
                former.file.close()

    def reset(self) -> None:
        """Forget everything."""
        self.trim(0)

    def fork(self) -> Session:
        """Another session that goes on from here, with the same options: both share the memory of
        what they have in common.
        """
        with self.hold():
            twin = self.model.session(self.when_full)
            twin.defaults = self.defaults
            twin.transcript = self.transcript.fork()  # the one it had was empty
            return twin

    def keep(self, n_tokens: int | None = None) -> int:
        """Write what was computed for the first n_tokens (None: all) to the model's prefix_cache,
        so that a later process need not compute it; returns of how many tokens, whole blocks of 64.

        It survives a power cut from then on. Raises InputError when the model was loaded without
        a prefix_cache, or when it cannot be written; the session is as it was.
        """
        with self.hold():
            n = len(self.transcript.tokens) if n_tokens is None else self._check_holds(n_tokens)
            return self.transcript.cache.keep(n)

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
                    self.update_file(last=True)
                finally:
                    self.end_stream()
                    self.transcript.cache.close()
                    if self._journal is not None:
                        self._journal.file.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- for `edge.Chat` and `edge.resume`, which build on a session ----

    @contextmanager
    def hold(self, stream: Stream | None = None) -> Iterator[None]:
        """Nobody else can use the session within this. Who loses a race to it waits for one piece.

        stream: hold it for a step of this stream. Raises InputError when the session is in use or
        closed, or when another call has taken it over from the stream.
        """
        if self._lock.locked():
            raise InputError("the session is in use by another call")
        with self._lock:  # a plain `with`: an interrupt cannot leave it locked
            self._user = threading.get_ident()
            try:
                if self._closed or self.model.closed:
                    raise InputError("the session or its model is closed")
                if stream is not None and stream is not self._current:
                    raise InputError("another call has taken over the session of this stream")
                yield
            finally:
                self._user = None

    def begin(self, encode: Encode, options: CallOptions) -> Stream:
        """As `stream`, of a prompt that is encoded within the call, which `cancel` can end then."""
        request = self.defaults.but(options).settled(self._engine.n_vocab, self._recommended)
        with self.hold():
            transcript = self.transcript
            before, self._flag = self._flag, Cancel()
            try:
                ids = encode(request, self._flag)
                if not ids and (request.reuse or not transcript.tokens):
                    raise InputError("the prompt is empty")
                if ids or not transcript.is_full:
                    n_common = transcript.common_prefix(ids) if request.reuse else None
                    transcript.check_fits(len(ids), n_common)
            except CancelledError:
                ids = []  # the stream ends as cancelled
            except BaseException:
                self._flag = before
                raise
            self._current = Stream(request, ids, self._flag, self._steps, self.hold)
            return self._current

    def encode(
        self, prompt: str | Sequence[int], request: Request, cancel: Cancel, *, times: int = 1
    ) -> list[int]:
        """Token ids of a prompt, of a text at most so many times those that there is room for.
        Raises CancelledError, ContextError.
        """
        transcript, reuse = self.transcript, request.reuse
        if not isinstance(prompt, str):
            return check.tokens("the prompt", prompt, self._engine.n_vocab)
        try:
            return self.model.tokenizer.encode(
                prompt,
                special=request.special,
                bos=None if reuse or not transcript.tokens else False,
                room=times * transcript.room(reuse=reuse),
                cancel=cancel,
            )
        except ContextError as error:
            n_common = len(transcript.tokens) if reuse else None
            transcript.check_fits(error.needed, n_common, at_least=error.at_least)
            raise

    def end_stream(self) -> None:
        """A stream under way raises InputError when it is asked for more. Hold the session."""
        self._current = None

    def keep_in(self, file: SessionFile, every: int) -> None:
        """Keep a file up to date that holds the session as it is, see `autosave`. Hold it."""
        new = journal.Journal(self.transcript, self._facts, file, every)
        self._journal, self.transcript.on_cut = new, new.cut

    def update_file(self, *, if_due: bool = False, last: bool = False) -> None:
        """Bring the file, if there is one, up to date; leave it where that fails, and raise
        SessionFileError. if_due: not before `every` tokens are new; last: pages with room, too.
        """
        if self._journal is None or (if_due and not self._journal.is_due()):
            return
        try:
            self._journal.write(last=last)
        except SessionFileError:
            self._journal.file.close()
            self._journal = self.transcript.on_cut = None
            raise

    # ---- inside ----

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    def _steps(self, stream: Stream) -> Generator[Piece, None, None]:
        """What computes the pieces of a stream; the file has all of them at the end."""
        checkpoint = partial(self.update_file, if_due=True)
        tokenizer = self.model.tokenizer
        call = Call(self._engine, tokenizer, self.transcript, stream, checkpoint)
        yield from call.pieces()
        self.update_file()

    def _facts(self, kind: Kind) -> dict[str, Any]:
        """What the file says besides tokens and pages. META: of what model, with which options;
        STATE: what changes from call to call.
        """
        if kind == Kind.META:
            facts = self._engine.facts() | {"when_full": self.when_full}
            return facts | {"defaults": self.defaults.as_json()}
        request = self.defaults if self._current is None else self._current.request
        return self.about() | {"sampling": request.as_json()["sampling"]}

    def _journal_at(self, path: str) -> journal.Journal | None:
        """The journal, if it writes to this path."""
        own = self._journal
        return own if own is not None and own.file.path == os.path.realpath(path) else None

    def _check_holds(self, n_tokens: int) -> int:
        n_tokens, n_held = check.whole("n_tokens", n_tokens), len(self.transcript.tokens)
        if n_tokens > n_held:
            raise InputError(f"the session holds {n_held} tokens, cannot keep {n_tokens}")
        return n_tokens
