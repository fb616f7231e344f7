"""A session or a conversation out of its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast, get_args

from edge import check
from edge.errors import ContextError, InputError, SessionFileError, brief
from edge.kv.shape import PAGE, WhenFull, pages_of
from edge.session.chat import Chat
from edge.session.contents import Contents, take
from edge.session.file import SessionFile
from edge.session.request import CallOptions, Request
from edge.session.sampler import SamplingOptions
from edge.version import __version__

if TYPE_CHECKING:
    from edge.backend import Backend, Cache, Loaded
    from edge.session.session import Session

__all__ = ["resume"]

#: What is in META, and of which type.
_FACTS = (
    ("edge", str),
    ("model", str),
    ("fingerprint", str),
    ("kv", dict),
    ("factors", str, type(None)),
    ("native_bf16", bool),
    ("context", int),
    ("when_full", str),
    ("defaults", dict),
)


def resume(
    path: str | os.PathLike[str], model: Loaded[Session], *, autosave: int | None = None
) -> Session | Chat:
    """Go on with what `save` or `autosave` wrote: a Session, or a Chat if it was one.

    The next call computes no token anew whose keys and values are in the file (unless another
    version of edge wrote it, whose numbers may differ), and gives the same tokens as if there had
    been no break: `stream("")` goes on with a text. Options are those that
    the session had, sampling as in its last call. An answer that was cut off stays in a chat's
    messages as far as it came.
    autosave: go on in the file, as `Session.autosave` with so many tokens does; None: only read it.

    Raises SessionFileError for a file that is missing, damaged, of another version, model or type
    of keys and values, or in use; ContextError when the model was loaded with a context that is
    too small; MemoryBudgetError.
    """
    path = check.path("path", path)
    autosave = check.optional(check.whole, "autosave", autosave, 1)
    if not hasattr(model, "engine"):
        raise InputError(f"model is {brief(model)}, it must be what `edge.load` gives")
    engine = model.engine
    file = SessionFile.open(path, write=autosave is not None, page_bytes=engine.page_bytes)
    session: Session | None = None
    try:
        with _bounds(file):
            _check(engine, file.contents, file.path)
            session = _new_session(model, file.contents)
            chat = _chat(session, file.contents)
        is_ours = _fill(session, file)
        if autosave is None:
            file.close()
        else:
            with _bounds(file):
                session.keep_in(file, autosave)
            if not is_ours:
                session.save(file.path)
    except BaseException:
        file.close()
        if session is not None:
            session.close()
        raise
    return session if chat is None else chat


@contextmanager
def _bounds(file: SessionFile) -> Iterator[None]:
    """Turn the errors that strange values in a file lead to into a SessionFileError."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as e:
        message = f"does not hold what a session file holds: {type(e).__name__} {_line(e)}"
        raise SessionFileError(message, path=file.path) from e


def _check(engine: Backend, contents: Contents, path: str) -> None:
    """Raise SessionFileError when this model cannot go on with it, ValueError for strange facts."""
    meta, facts = contents.meta, engine.facts()
    for key, *kinds in _FACTS:
        take(meta, key, *kinds)

    def refuse(message: str) -> SessionFileError:
        return SessionFileError(message, path=path)

    model, kv = _line(meta["model"]), _line(meta["kv"]["type"])
    if meta["fingerprint"] != facts["fingerprint"]:
        if (meta["model"], meta["factors"]) == (facts["model"], facts["factors"]):
            raise refuse(f"belongs to another state of {model}")
        if meta["model"] != facts["model"]:
            raise refuse(f"belongs to {model}, the model here is {_line(facts['model'])}")
        raise refuse(
            f"was made with {_line(meta['factors'])}, the context limit of {facts['context']} "
            f"chose {facts['factors']}: {_hint(contents)}, which chooses the same"
        )
    if meta["kv"] != facts["kv"]:
        raise refuse(
            f"keeps keys and values as {kv}, the model was loaded with "
            f"{facts['kv']['type']}: load it with --kv {kv}"
        )
    if meta["native_bf16"] != facts["native_bf16"]:
        raise refuse(
            f"was computed with EDGE_NATIVE_BF16={int(meta['native_bf16'])}, which gives other "
            "bits: set it as it was"
        )
    n, limit = len(contents.tokens), facts["context"]
    if (
        meta["when_full"] == "slide"
        and meta["context"] // PAGE != limit // PAGE
        and n > min(meta["context"], limit) - PAGE
    ):
        raise refuse(
            f"slides in a context of {meta['context']}, this one is {limit}: {_hint(contents)}"
        )
    if n and not 0 <= min(contents.tokens) <= max(contents.tokens) < engine.n_vocab:
        raise refuse("has tokens that the model does not have")


def _hint(contents: Contents) -> str:
    return f"load it with a context of {contents.meta['context']}"


def _line(value: object) -> str:
    """Text out of a file for a message: one line, and not a long one."""
    return " ".join(str(value).split())[:100]


def _new_session(model: Loaded[Session], contents: Contents) -> Session:
    """An empty session with the options that this one had. Raises ValueError, TypeError."""
    defaults = _request(contents)
    when_full = contents.meta["when_full"]
    if when_full not in get_args(WhenFull):
        raise ValueError(f"when_full is {brief(when_full)}")
    session = model.session(when_full)
    session.defaults = defaults
    return session


def _chat(session: Session, contents: Contents) -> Chat | None:
    """The conversation on a session; None where the file has none. Raises ValueError, TypeError."""
    if "chat" not in contents.state:
        return None
    state = take(contents.state, "chat", dict)
    return Chat.of_state(session, session.model.template, state, contents.tokens)


def _request(contents: Contents) -> Request:
    """The options that `Request.as_json` gave: the session's own, with the sampling of its last
    call. Raises ValueError, TypeError.
    """
    sampling: Mapping[str, Any] = take(contents.state, "sampling", dict)
    bias = {int(token): value for token, value in sampling["logit_bias"]}
    try:
        chosen = SamplingOptions(**{**sampling, "logit_bias": bias})
        options = cast(CallOptions, {**contents.meta["defaults"], "sampling": chosen})
        return Request().but(options)
    except InputError as e:
        raise ValueError(str(e)) from e


def _fill(session: Session, file: SessionFile) -> bool:
    """Put tokens and pages into a new session. Its next call computes what has no page.

    Pages of another version of edge may have other bits: they are not taken, and False is returned.
    Raises ContextError for more tokens than the session can hold.
    """
    transcript, contents = session.transcript, file.contents
    cache, n = transcript.cache, len(contents.tokens)
    if n > transcript.most_tokens:
        what = f"the {cache.limit} positions that the model has"
        if cache.when_full == "stop":
            what = f"the context of {cache.limit}: {_hint(contents)}"
        raise ContextError(
            f"{file.path} holds {n} tokens, {n - cache.limit} more than {what}",
            needed=n,
            limit=cache.limit,
        )
    is_ours = bool(contents.meta["edge"] == __version__)
    if not is_ours:
        contents.pages.clear()
    transcript.append(contents.tokens)
    known = _known(cache, contents)
    for gap in cache.unseen(known):
        for number in gap:
            contents.pages.pop(number, None)
    if known:
        cache.restore(transcript.tokens[:known], file.pages(pages_of(known) * cache.n_groups))
    return is_ours


def _known(cache: Cache, contents: Contents) -> int:
    """Of how many first tokens the file has all pages that a token behind them sees."""
    pages, known = contents.pages, 0
    groups = range(cache.n_groups)
    starts = [0 for _ in groups]  # in each group pages are there, and full, from this one on
    for i in range(pages_of(len(contents.tokens))):
        numbers = [i * len(groups) + g for g in groups]
        held = [pages.get(number, (None, 0))[1] for number in numbers]
        upto = min(i * PAGE + min(held), cache.limit)
        if min(held) and all(
            start <= gap.stop // len(groups)
            and all(number in pages for number in range(g, gap.start, len(groups)))
            for g, start, gap in zip(groups, starts, cache.unseen(upto), strict=True)
        ):
            known = upto
        starts = [i + 1 if n < PAGE else start for n, start in zip(held, starts, strict=True)]
    return known
