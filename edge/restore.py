"""A session or a conversation out of its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from edge import __version__
from edge.conversation import Chat
from edge.errors import ContextError, InputError, SessionFileError
from edge.journal import Journal, check_every
from edge.kv import PAGE
from edge.request import Options, Request
from edge.sampler import SamplingOptions
from edge.session import Session
from edge.session_file import Contents, SessionFile

if TYPE_CHECKING:
    from edge.backend import Backend
    from edge.model import Model

__all__ = ["resume"]


def resume(
    path: str | os.PathLike[str], model: Model, *, autosave: int | None = None
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
    if autosave is not None:
        check_every(autosave)
    engine = model.engine
    file = SessionFile.open(path, write=autosave is not None)
    made: list[Session | Chat] = []
    try:
        try:
            _check(engine, file.contents, file.path)
            talk = _make(model, file.contents, made)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise SessionFileError(
                f"does not hold what a session file holds: {type(e).__name__} {e}", path=path
            ) from e
        session = talk.session if isinstance(talk, Chat) else talk
        is_ours = _fill(session, file)
        if autosave is None:
            file.close()
        else:
            session._journal = Journal(session, file, autosave)
            if not is_ours:
                session._journal.rewrite(session)
    except BaseException:
        file.close()
        for talk in made:
            talk.close()
        raise
    return talk


def _check(engine: Backend, contents: Contents, path: str) -> None:
    """Raise SessionFileError, ContextError when this model cannot go on with it."""
    had, have = contents.meta, engine.facts()

    def refuse(message: str) -> SessionFileError:
        return SessionFileError(message, path=path)

    context = f"load it with a context of {had['context']}"
    if had["fingerprint"] != have["fingerprint"]:
        if (had["model"], had["factors"]) == (have["model"], have["factors"]):
            raise refuse(f"belongs to another state of {have['model']}")
        if had["model"] != have["model"]:
            raise refuse(f"belongs to {had['model']}, the model here is {have['model']}")
        raise refuse(
            f"was made with {had['factors']}, the context limit of {have['context']} chose "
            f"{have['factors']}: {context}, which chooses the same"
        )
    if had["kv"] != have["kv"]:
        raise refuse(
            f"keeps keys and values as {had['kv']['type']}, the model was loaded with "
            f"{have['kv']['type']}: load it with --kv {had['kv']['type']}"
        )
    if had["native_bf16"] != have["native_bf16"]:
        raise refuse(
            f"was computed with EDGE_NATIVE_BF16={int(had['native_bf16'])}, which gives other "
            "bits: set it as it was"
        )
    n, limit, slides = len(contents.tokens), have["context"], had["when_full"] == "slide"
    if slides and had["context"] // PAGE != limit // PAGE and n > min(had["context"], limit) - PAGE:
        raise refuse(f"slides in a context of {had['context']}, this one is {limit}: {context}")
    if not slides and n > limit:
        raise ContextError(
            f"{path} holds {n} tokens, {n - limit} more than the context of {limit}: {context}",
            needed=n,
            limit=limit,
        )
    if n and not 0 <= min(contents.tokens) <= max(contents.tokens) < engine.n_vocab:
        raise refuse("has tokens that the model does not have")


def _make(model: Model, contents: Contents, made: list[Session | Chat]) -> Session | Chat:
    """A new session, or chat, with the options that it had; in `made`, whatever comes after."""
    options = _options(contents)
    when_full = contents.meta["when_full"]
    if "chat" not in contents.state:
        made.append(model.session(when_full, **options))
        return made[0]
    state = contents.state["chat"]
    chat = model.chat(None, state["tools"], when_full, **options)
    made.append(chat)
    chat._resume(state, contents.tokens)
    return chat


def _options(contents: Contents) -> Options:
    """The session's own, with the sampling of its last call. Raises ValueError, TypeError."""
    sampling: Mapping[str, Any] = contents.state["sampling"]
    bias = {int(token): value for token, value in sampling["logit_bias"]}
    try:
        chosen = SamplingOptions(**{**sampling, "logit_bias": bias})
        options = cast(Options, {**contents.meta["defaults"], "sampling": chosen})
        Request().but(options)
    except InputError as e:
        raise ValueError(str(e)) from e
    return options


def _fill(session: Session, file: SessionFile) -> bool:
    """Tokens and pages into a new session; what has no page is computed by its next call.

    Pages of another version of edge may have other bits: they are left alone. False: so it was.
    """
    cache, pages = session._cache, file.contents.pages
    is_ours = bool(file.contents.meta["edge"] == __version__)
    if not is_ours:
        pages.clear()
    session._tokens = file.contents.tokens.tolist()
    for last in sorted(pages, reverse=True):
        known = last * PAGE + pages[last][1]
        gone = cache.unseen(known)
        if all(i in pages or i in gone for i in range(last)):
            for i in gone:
                pages.pop(i, None)
            cache.restore(session._tokens[:known], file.pages(last + 1))
            break
    return is_ours
