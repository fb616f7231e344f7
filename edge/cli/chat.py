"""`edge-run chat`: talk with a model, or ask it one question."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS, complain
from edge.cli.options import (
    Settings,
    model_options,
    read_file,
    read_stdin,
    sampling_options,
    utf8,
)
from edge.cli.single import asked, check, not_empty, single_options
from edge.errors import EdgeError, InputError, brief

if TYPE_CHECKING:
    from edge.conversation import Chat
    from edge.model import Model

_HELP = """\
/help   this list
/reset  forget the conversation
/quit   leave (or Ctrl-D)
Ctrl-C  stops an answer; at the prompt it leaves"""
_HISTORY_LINES = 1000
_SAVE_EVERY = 32  # tokens


@click.command(short_help=COMMANDS["chat"])
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="Ask this, answer, and leave.")
@click.option("-s", "--system", metavar="TEXT", help="What the model is told before the talk.")
@click.option(
    "--session", metavar="FILE", help="Keep the conversation in FILE, and go on with the one there."
)
@single_options
@sampling_options(seed=-1)
def chat(
    model: str | None,
    prompt: str | None,
    file: str | None,
    system: str | None,
    session: str | None,
    **flags: Any,
) -> None:
    """Talk with a model, or ask it one question.

    With --prompt, --file, or a question on standard input, it answers once and leaves. Else it is a
    conversation: /help lists what can be typed, Ctrl-C stops an answer, a second one leaves.
    With --session it survives the program, however that ends.
    """
    from edge.cli.answer import explain, once, open_model

    check(flags)
    if system is not None:
        system = utf8(system, "the system message")
    question = _question(prompt, file)
    if question is None and flags["as_json"]:
        raise click.UsageError("--json wants a question: --prompt, --file, or standard input.")
    settings = Settings.take(flags)
    options = asked(flags, settings)
    with open_model(model, **settings.loading) as loaded:
        explain(loaded, settings)
        talk = _begin(loaded, system, session, settings)
        if question is None:
            _converse(loaded, talk, settings, options)
            return
        shown = {"as_json": flags["as_json"], "newline": True}
        once(loaded, talk, question, settings, **shown, **options)


def _question(prompt: str | None, file: str | None) -> str | None:
    """The one question; None for a conversation. Raises InputError, UsageError."""
    if prompt is not None and file is not None:
        raise click.UsageError("Give the question with one of --prompt TEXT and --file FILE.")
    if prompt is not None:
        return not_empty(utf8(prompt, "the prompt").strip())
    if file is None and sys.stdin.isatty():
        return None
    return not_empty((read_stdin() if file is None else read_file(file)).strip())


def _begin(model: Model, system: str | None, file: str | None, settings: Settings) -> Chat:
    """A new conversation, or the one in the file."""
    when_full = settings.when_full
    if file is None or not os.path.lexists(file):
        talk = model.chat(system=system, when_full=when_full or "stop")
        if file is not None:
            talk.autosave(file, _SAVE_EVERY)
        return talk
    import edge
    from edge.cli.terminal import note

    found = edge.resume(file, model, autosave=_SAVE_EVERY)
    if not isinstance(found, edge.Chat):
        raise InputError(f"{file} holds a text, not a conversation: resume it from Python")
    if system is not None and system != found.system:
        told = "none" if found.system is None else brief(found.system)
        raise InputError(
            f"{file} has another system message, {told}: leave --system out, or name another file"
        )
    if when_full is not None and when_full != found.session.when_full:
        raise InputError(
            f"{file} was begun with --when-full {found.session.when_full}: leave that out, or name "
            "another file"
        )
    if not settings.quiet:
        note(f"resumed: {len(found.session.tokens):,} tokens")
    return found


def _converse(
    model: Model, talk: Chat, settings: Settings, options: dict[str, Any]
) -> None:
    """The conversation, until /quit, the end of input, or Ctrl-C at the prompt."""
    if not settings.quiet:
        click.secho("/help lists what can be typed, Ctrl-D leaves", err=True, dim=True)
    with _history():
        while (line := _read_line()) is not None:
            if line == "/quit":
                break
            if line == "/help":
                click.echo(_HELP)
            elif line == "/reset":
                talk.reset()
            elif line.startswith("/") and line[1:].isalpha():
                click.echo(f"{line} is not known: /help lists what is", err=True)
            elif line:
                _answer(model, talk, line, settings, options)


def _read_line() -> str | None:
    """A line from the terminal, None at the end of input."""
    try:
        line = input("> ")
    except EOFError:
        click.echo()
        return None
    except UnicodeDecodeError:
        click.echo("edge-run: that line is not UTF-8", err=True)
        return ""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()


def _answer(
    model: Model, talk: Chat, line: str, settings: Settings, options: dict[str, Any]
) -> None:
    """Stream one answer; what goes wrong with it leaves the conversation as it is."""
    from edge.cli.answer import report, stream

    try:
        completion = stream(talk, line, quiet=settings.quiet, **options)
        click.echo()
        report(model, completion, settings)
    except EdgeError as e:
        complain(e)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing and a history kept in the cache folder, where readline is there."""
    try:
        import readline
    except ImportError:
        yield
        return
    from edge.store import cache_dir

    path = cache_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # for its owner alone
            readline.write_history_file(path)
