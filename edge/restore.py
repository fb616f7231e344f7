"""A session or a conversation out of its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edge.conversation import Chat
from edge.errors import ContextError, InputError, SessionFileError
from edge.journal import Journal, check_every, facts
from edge.kv import PAGE
from edge.sampler import SamplingOptions
from edge.session import Session
from edge.session_file import Contents, SessionFile

if TYPE_CHECKING:
    from edge.engine import Engine
    from edge.model import Model
    from edge.request import Options

__all__ = ["resume"]


def resume(
    path: str | os.PathLike[str], model: Model, *, autosave: int | None = None
) -> Session | Chat:
    """Go on with what `save` or `autosave` wrote: a Session, or a Chat if it was one.

    The next call computes no token anew whose keys and values are in the file, and gives the same
    tokens as if there had been no break: `stream("")` goes on with a text. Options are those that
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
    talk: Session | Chat | None = None
    try:
        contents = file.contents
        try:
            _check(engine, contents, file.path)
            talk = _make(model, contents)
            _fill(talk if isinstance(talk, Session) else talk.session, file)
            if isinstance(talk, Chat):
                talk._resume(contents.state["chat"])
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as e:
            if isinstance(e, ContextError):
                raise
            raise SessionFileError(
                f"does not hold what a session file holds: {type(e).__name__} {e}", path=path
            ) from e
        session = talk if isinstance(talk, Session) else talk.session
        if autosave is not None:
            session._journal = Journal(session, file, autosave)
    except BaseException:
        if talk is not None:
            talk.close()
        file.close()
        raise
    if autosave is None:
        file.close()
    return talk


def _check(engine: Engine, contents: Contents, path: str) -> None:
    """Raise SessionFileError, ContextError when this model cannot go on with it."""
    had, have = contents.meta, facts(engine)

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
    if had["kv"] != have["kv"] or had["page_bytes"] != have["page_bytes"]:
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
    if any(record.n_bytes != have["page_bytes"] for record, _ in contents.pages.values()):
        raise refuse("has pages of a wrong size")


def _make(model: Model, contents: Contents) -> Session | Chat:
    """A new session, or chat, with the options that it had."""
    options: Options = contents.meta["defaults"]
    sampling: Mapping[str, Any] = contents.state["sampling"]
    bias = {int(token): value for token, value in sampling["logit_bias"]}
    options = {**options, "sampling": SamplingOptions(**{**sampling, "logit_bias": bias})}
    if "chat" in contents.state:
        tools = contents.state["chat"]["tools"]
        return model.chat(None, tools, contents.meta["when_full"], **options)
    return model.session(contents.meta["when_full"], **options)


def _fill(session: Session, file: SessionFile) -> None:
    """Tokens and pages into a new session; what has no page is computed by its next call."""
    cache, pages = session._cache, file.contents.pages
    tokens = file.contents.tokens.tolist()
    for last in sorted(pages, reverse=True):
        known = last * PAGE + pages[last][1]
        gone = cache.unseen(known)
        if all(i in pages or i in gone for i in range(last)):
            for i in gone:
                pages.pop(i, None)
            cache.restore(tokens[:known], file.pages(last + 1))
            break
    session._tokens = tokens
