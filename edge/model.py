"""A loaded model, and the sessions and chats that run on it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any
from warnings import warn

from edge import check, forked
from edge.engine.engine import DescribedFile
from edge.errors import EdgeWarning, InputError, ModelFileError
from edge.kv.shape import WhenFull
from edge.loading import Loading, LoadOptions
from edge.onnx import is_onnx
from edge.progress import Progress
from edge.session.chat import Chat, uses_tools
from edge.session.recommended import recommended
from edge.session.request import CallOptions
from edge.session.session import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.backend import Backend, Described
    from edge.session.sampler import SamplingOptions
    from edge.template.template import ChatTemplate
    from edge.tokenizer import Tokenizer

__all__ = ["Model", "load"]


def load(
    path: str | PathLike[str] | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[LoadOptions],
) -> Model:
    """Load a GGUF model, a packed one, or a folder of ONNX graphs.

    path: a GGUF or packed file, or any shard of a split model; a folder, or one of its .onnx files;
    a name such as "owner/repo:Q4_K_M" (see `edge.hub.wanted`), whose model is fetched where it is
    not on this machine; None: the default model in the cache.
    progress(bytes done, bytes in all): of fetching, then of packing.
    options: see `edge.loading.Loading`.
    When this returns, everything in the file except the weights has been read.
    Raises ModelFileError, UnsupportedError, MemoryBudgetError, InputError, ContextError. Warns
    (EdgeWarning) of keys that no code reads, and of recommended sampling that it cannot follow.
    """
    loading = Loading.of(options)  # checked before anything is read
    check.optional(check.function, "progress", progress, "(bytes done, bytes in all)")
    if path is None or isinstance(path, str):
        from edge.hub.find import find

        name = path and check.path("path", path)
        path = find(name, memory=loading.native.memory, progress=progress)
    path = check.path("path", path)
    with open_described(path, loading) as described:
        described.ledger.require()  # before the tokenizer takes any memory
        tokenizer = _TokenizerThread(described)
        try:
            engine = described.start(progress)
        finally:
            tokenizer.join()  # it reads the file, which may be truncated after `load` returns
    if notes := (*engine.notes, *recommended(engine.recommended)[1]):
        warn(f"{engine.path}: {'; '.join(notes)}", EdgeWarning, stacklevel=2)
    return Model(engine, tokenizer)


def open_described(path: str, loading: Loading) -> Described:
    """Open a model with the engine that runs it. Raises InputError for another engine's option."""
    if is_onnx(path):
        from edge.onnx.run.engine import DescribedFolder

        return DescribedFolder.open(path, loading.for_onnx())
    return DescribedFile.open(path, loading.for_native(path))


class Model:
    """A model in memory, shared by any number of sessions and threads; they take turns.

    Close it, or use it in a `with`, to give the memory back: that cancels and closes its sessions.
    All but `close` and `closed` raise InputError afterwards.
    """

    def __init__(self, engine: Backend, tokenizer: _TokenizerThread | None = None) -> None:
        self._engine, self._thread = engine, tokenizer
        self._lock: threading.Lock | forked.Refusal = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._template = tokenizer.template if tokenizer is not None else None
        self._no_template = tokenizer.no_template if tokenizer is not None else None
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self.closed = False
        forked.watch(self)

    @property
    def engine(self) -> Backend:
        """The engine that runs it."""
        if self.closed:
            raise InputError("the model is closed")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises ModelFileError, UnsupportedError.

        Warns (EdgeWarning), once, of keys of the tokenizer that the file lacks.
        """
        engine = self.engine
        if self._tokenizer is not None:
            return self._tokenizer
        with self._lock:
            if self._tokenizer is None:
                assert self._thread is not None
                tokenizer = self._thread.result()
                if tokenizer.n_vocab != engine.n_vocab:
                    raise ModelFileError(
                        f"{tokenizer.n_vocab} tokens, the model has {engine.n_vocab}",
                        path=engine.path,
                        field="key tokenizer.ggml.tokens",
                    )
                if tokenizer.notes:
                    warn(f"{engine.path}: {'; '.join(tokenizer.notes)}", EdgeWarning, stacklevel=3)
                self._tokenizer, self._thread = tokenizer, None
            return self._tokenizer

    @property
    def template(self) -> ChatTemplate:
        """Its chat template, compiled at the first use. Raises TemplateError, ModelFileError."""
        _ = self.engine  # raises when the model is closed
        if self._template is None:
            assert self._no_template is not None
            raise self._no_template.with_traceback(None)  # the old traceback would grow each time
        return self._template

    @property
    def sampling(self) -> SamplingOptions:
        """What its files recommend: it counts where a call leaves an option of sampling out."""
        return recommended(self.engine.recommended)[0]

    def session(self, when_full: WhenFull = "stop", **options: Unpack[CallOptions]) -> Session:
        """A new, empty session.

        when_full: "stop" or "slide", see `Session`. options: defaults for its calls, see
        `edge.session.request.Request`. Raises InputError for a wrong option, and for a context that
        is too small to slide.
        """
        session = Session(self, when_full, **options)
        self._sessions.add(session)
        return session

    def chat(
        self,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        when_full: WhenFull = "stop",
        require_tools: bool = True,
        **options: Unpack[CallOptions],
    ) -> Chat:
        """A new conversation, see `Chat`.

        require_tools: False: accept `tools` that the model's template does not use, so that the
        model never sees them. options: defaults for its calls, see
        `edge.session.request.Request`. Raises InputError for a wrong option, and for tools that the
        template does not use; TemplateError where the model has no template.
        """
        require_tools, template = check.flag("require_tools", require_tools), self.template
        session = self.session(when_full, **options)
        try:
            chat = Chat(session, template, system, tools)
            about = (chat.messages, chat.tools or (), session.defaults.variables)
            if chat.tools and require_tools and not uses_tools(template, *about):
                raise InputError(
                    "the model's chat template does not use tools, the model would not see them: "
                    "describe them in the system message, take another model, or say "
                    "require_tools=False to go on without"
                )
        except BaseException:
            session.close()
            raise
        return chat

    def info(self) -> dict[str, Any]:
        """Facts about the model, plain values for JSON. Sizes in bytes, contexts in tokens."""
        return self.engine.info()

    def close(self) -> None:
        """Cancel and close the sessions, then the engine.

        In a forked child this only marks the model as closed.
        """
        if self._lock is forked.REFUSAL:
            self.closed = True
            return
        with self._lock:
            self.closed = True
            if self._thread is not None:
                self._thread.join()
        with contextlib.ExitStack() as stack:  # after an exception `close` can be called again
            stack.callback(self._engine.close)
            for session in list(self._sessions):
                stack.callback(session.close)

    def _forked(self) -> None:
        self._lock = forked.REFUSAL

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _TokenizerThread(threading.Thread):
    """Builds the tokenizer while the weights are loaded; loading them needs little of the GIL.

    template: the chat template, after `join`; None: there is none, no_template is the error.
    """

    def __init__(self, described: Described) -> None:
        super().__init__(name="edge tokenizer")
        self._described: Described | None = described
        self.template: ChatTemplate | None = None
        self.no_template: BaseException | None = None
        self._tokenizer: Tokenizer | None = None
        self._error: BaseException | None = None
        try:
            self.start()
        except RuntimeError:  # the system has no more threads
            self.run()

    def run(self) -> None:
        described, self._described = self._described, None  # it keeps the file open
        assert described is not None
        try:
            self.template = described.new_template()
        except BaseException as error:  # `Model.template` raises it
            self.no_template = error
        try:
            self._tokenizer = described.new_tokenizer()
        except BaseException as error:
            self._error = error

    def result(self) -> Tokenizer:
        """The tokenizer. Raises the error of building it."""
        self.join()
        if self._error is not None:
            raise self._error.with_traceback(None)  # the old traceback would grow each time
        assert self._tokenizer is not None
        return self._tokenizer

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread, if it was started."""
        if self.ident is not None:
            super().join(timeout)
