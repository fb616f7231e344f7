"""A conversation in a terminal: questions, answers, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from edge.cli import complain
from edge.cli.answer import explain, open_model, report, stream
from edge.cli.keyboard import Keyboard, parse
from edge.cli.models import model_path
from edge.cli.options import AnswerSettings, sampling_options
from edge.cli.terminal import mebibytes, note, plain, size
from edge.errors import CancelledError, EdgeError, InputError, TemplateError, brief
from edge.session.sampler import sampling_fields

if TYPE_CHECKING:
    from edge.kv.shape import WhenFull
    from edge.model import Model
    from edge.session.chat import Chat, Message
    from edge.session.sampler import SamplingOptions

_SAVE_EVERY = 32  # tokens


def begin(model: Model, system: str | None, file: str | None, settings: AnswerSettings) -> Chat:
    """A new conversation, or the one in the file.

    Raises InputError where the options differ from those in the file.
    """
    when_full = settings.when_full
    if file is None or not os.path.lexists(file):
        variables = settings.variables
        chat = model.chat(system=system, when_full=when_full or "stop", variables=variables)
        if file is not None:
            chat.autosave(file, _SAVE_EVERY)
        return chat
    chat = _resume(file, model, autosave=_SAVE_EVERY)
    if settings.variables:
        chat.session.defaults = chat.session.defaults.but({"variables": settings.variables})
    if system is not None and system != chat.system:
        its_message = "none" if chat.system is None else brief(chat.system)
        raise InputError(
            f"{file} has another system message, {its_message}: leave --system out, or name "
            "another file"
        )
    if when_full is not None and when_full != chat.session.when_full:
        raise InputError(
            f"{file} was begun with --when-full {chat.session.when_full}: leave that out, or name "
            "another file"
        )
    if not settings.quiet:
        note(f"resumed: {len(chat.session.tokens):,} tokens")
    return chat


def _resume(file: str, model: Model, *, autosave: int | None = None) -> Chat:
    """The conversation in a session file. Raises InputError for a file that holds a text."""
    import edge

    resumed = edge.resume(file, model, autosave=autosave)
    if not isinstance(resumed, edge.Chat):
        resumed.close()
        raise InputError(f"{file} holds a text, not a conversation: resume it from Python")
    return resumed


def banner(model: Model) -> str:
    """One line: the model's name, file, parameters, most frequent type and size; the context."""
    facts = model.info()
    parts = [plain(os.path.basename(os.path.normpath(facts["path"])))]
    if n := facts.get("parameters"):
        parts.append(f"{_short(n)} parameters")
    if types := facts.get("types"):
        matrices = {name: n for name, n in types.items() if name != "F32"} or types
        parts.append(max(matrices, key=lambda name: matrices[name]))
    parts += [mebibytes(facts["file_bytes"]), f"context {facts['context']:,} tokens"]
    return f"{plain(facts['name']) or facts['architecture']}: {', '.join(parts)}"


def _short(n: int) -> str:
    """`3.8B`, `135M`, `79K`."""
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.0f}M" if n >= 1e6 else f"{n / 1e3:.0f}K"


class Conversation:
    """A conversation, with the model that it runs on and the settings that its commands change.

    Use it in a `with`. path: of the model, None: the default model. options: arguments of
    `stream`. file: the session file that the conversation saves itself to, None: it does not.
    """

    def __init__(self, path: str | None, settings: AnswerSettings, options: dict[str, Any]) -> None:
        self.settings, self.options = settings, options
        self.file: str | None = None
        self._unanswered: str | Message | None = None  # the last question, if it has no answer
        self._ended = False
        self._snapshot: _Snapshot | None = None  # the conversation, while it has no model
        self._chat: Chat | None = None
        self._model: Model | None = open_model(path, **settings.loading)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def begin(self, system: str | None, file: str | None) -> None:
        """Begin a new conversation, or resume the one in the file."""
        explain(self.model, self.settings)
        self._chat, self.file = begin(self.model, system, file, self.settings), file

    @property
    def model(self) -> Model:
        """The model that answers. Raises InputError where /model could load neither the new model
        nor the old one.
        """
        if self._model is None:
            raise InputError("there is no model any more: /model PATH loads one")
        return self._model

    @property
    def chat(self) -> Chat:
        """The chat with the model. Raises InputError as `model` does."""
        if self._chat is None:
            raise InputError("there is no model any more: /model PATH loads one")
        return self._chat

    def run(self, keyboard: Keyboard) -> None:
        """Answer until /quit, the end of input, or Ctrl-C at an empty prompt."""
        if not self.settings.quiet:
            note(banner(self.model))
            note("/help lists what can be typed, Ctrl-D leaves")
        while not self._ended and (line := keyboard.read()) is not None:
            try:
                command, text, _ = parse(line)
                if command is not None:
                    self._command(command, text)
                elif text:
                    self._ask(text)
            except Exception as e:
                if sys.flags.dev_mode and not isinstance(e, EdgeError):
                    raise
                complain(e)

    def _command(self, name: str, text: str) -> None:
        """Run a command. If it raises, the conversation is as before."""
        command = _COMMANDS.get(_OTHER_NAMES.get(name, name))
        if command is None:
            raise InputError(f"/{name} is not known: /help lists what is")
        command.run(self, text)

    def _ask(self, question: str | Message) -> None:
        """Stream one answer. A question without an answer is not kept in the chat."""
        n_before, self._unanswered = len(self.chat.messages), question
        completion = stream(self.chat, question, quiet=self.settings.quiet, **self.options)
        if len(self.chat.messages) > n_before:
            self._unanswered = None
        click.echo()
        report(self.model, completion, self.settings)

    # ---- commands: `text` is the text behind the name ----

    def _help(self, text: str) -> None:
        commands = [(f"/{name} {row.usage}".strip(), row.help) for name, row in _COMMANDS.items()]
        _table([*commands, *_KEYS])

    def _quit(self, text: str) -> None:
        self._ended = True

    def _reset(self, text: str) -> None:
        self.chat.reset()
        self._unanswered = None

    def _system(self, text: str) -> None:
        if text:
            self.chat.system = text
        else:
            note(self.chat.system or "there is no system message")

    def _undo(self, text: str) -> None:
        question = self.chat.undo()
        if question is None:
            raise InputError("there is no question to take back")
        self._unanswered = None
        note(f"taken back: {brief(question['content'])}")

    def _retry(self, text: str) -> None:
        if self._unanswered is not None:
            self._ask(self._unanswered)
            return
        before = list(self.chat.messages)
        question = self.chat.undo()
        if question is None:
            raise InputError("there is no question to answer anew")
        try:
            self._ask(question)
        finally:
            is_lost = self._unanswered is not None
            if is_lost:
                self.chat.messages[:], self._unanswered = before, None
        if not is_lost and self.chat.messages[-1] == before[-1]:
            note("the same answer: /set seed, or temperature, for another")

    def _set(self, text: str) -> None:
        name, *values = text.split() or [""]
        sampling: SamplingOptions = self.options["sampling"]
        if values:
            self.options["sampling"] = replace(sampling, **_read_option(name, values))
            return
        shown = [o for o in sampling_fields() if name in ("", _flag(o.name), o.name)]
        if not shown:
            _read_option(name, [""])  # raises the same error as the option's flag
        now = replace(sampling.settled(self.model.sampling), seed=sampling.seed)
        _table([(f"{_flag(o.name)} {_plain(getattr(now, o.name))}", o.help) for o in shown])

    def _tokens(self, text: str) -> None:
        chat, n, limit = self.chat, 0, self.chat.session.n_context
        if chat.messages:
            with contextlib.suppress(TemplateError):  # a template may need a question
                n = len(self.model.tokenizer.encode(chat.render(), special=True))
        left = f"{max(limit - n, 0):,} left" if chat.session.when_full == "stop" else "it slides"
        messages = f"{len(chat.messages)} message{'s' * (len(chat.messages) != 1)}"
        note(f"{n:,} tokens, {messages}; context {limit:,} tokens, {left}")

    def _save(self, text: str) -> None:
        path = os.path.expanduser(text) or self.file
        if path is None:
            raise InputError("/save wants the name of a file")
        self.chat.save(path)
        note(f"saved: {path}")

    def _load(self, text: str) -> None:
        path = os.path.expanduser(text)
        if not path:
            raise InputError("/load wants the name of a session file")
        if self.file is not None and os.path.realpath(path) == os.path.realpath(self.file):
            raise InputError(f"{path} is the file of this conversation")
        with self._replacing():
            self.chat.close()  # there may be no memory for two chats
            self._chat = _resume(path, self.model)
        self._unanswered = None
        note(f"loaded: {len(self.chat.messages)} messages")

    def _change(self, text: str) -> None:
        path = os.path.expanduser(text)
        if path:
            path = model_path(path)  # before the other model is closed
            if not os.path.exists(path):
                raise InputError(f"{path}: there is no such file")
            with self._replacing() as snapshot:
                self._close()
                self._model = open_model(path, **self.settings.loading)
                self._chat = snapshot.on(self.model)
        note(banner(self.model))

    # ---- replacing the model or the chat ----

    def _close(self) -> None:
        """Close the model and free its memory: there may be no memory for two models."""
        model, self._model, self._chat = self._model, None, None
        if model is not None:
            model.close()
            del model
            gc.unfreeze()
            gc.collect()

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[_Snapshot]:
        """In the block, replace the chat or the model.

        If the block fails, the old ones are restored. If it succeeds, the conversation no longer
        saves itself to its file.
        """
        path = None if self._model is None else self._model.engine.path
        self._snapshot = snapshot = self._snapshot or _Snapshot.of(self.chat)
        try:
            yield snapshot
        except BaseException as e:
            self._restore(snapshot, path)
            if isinstance(e, KeyboardInterrupt):
                raise CancelledError("stopped: the conversation is as it was") from None
            raise
        self._snapshot = None
        if self.file is not None:
            note(f"{self.file} has the conversation up to here; /save FILE keeps what comes now")
            self.file = None

    def _restore(self, snapshot: _Snapshot, path: str | None) -> None:
        """Restore the conversation on its old model. path: of that model, None: there was none.

        Raises what `open_model` and `edge.resume` raise; then there is no model.
        """
        if self._model is None or self._model.engine.path != path:
            self._close()
            if path is None:
                return
            self._model = open_model(path, **self.settings.loading)
        if self.file is None:
            self._chat = snapshot.on(self._model)
        else:
            self._chat = _resume(self.file, self._model, autosave=_SAVE_EVERY)
        self._snapshot = None


class _Snapshot(NamedTuple):
    """A conversation without its model."""

    messages: list[Message]
    system: str | None
    tools: list[dict[str, Any]] | None
    variables: Mapping[str, Any]
    when_full: WhenFull

    @classmethod
    def of(cls, chat: Chat) -> _Snapshot:
        variables = chat.session.defaults.variables
        about = (chat.system, chat.tools, variables, chat.session.when_full)
        return cls(list(chat.messages), *about)

    def on(self, model: Model) -> Chat:
        """The same conversation on a model."""
        chat = model.chat(self.system, self.tools, self.when_full, variables=self.variables)
        chat.messages[:] = self.messages
        return chat


class _Command(NamedTuple):
    run: Callable[[Conversation, str], None]
    usage: str
    help: str


_COMMANDS = {
    "help": _Command(Conversation._help, "", "this list (/?)"),
    "system": _Command(
        Conversation._system, "[TEXT]", "show, or change, what the model is told first"
    ),
    "set": _Command(Conversation._set, "[NAME VALUE]", "show, or change, how tokens are chosen"),
    "retry": _Command(Conversation._retry, "", "answer the last question anew"),
    "undo": _Command(Conversation._undo, "", "take back the last question and its answer"),
    "tokens": _Command(Conversation._tokens, "", "how much of the context is in use"),
    "save": _Command(Conversation._save, "FILE", "write the conversation to a session file"),
    "load": _Command(Conversation._load, "FILE", "go on with the one in a session file"),
    "model": _Command(Conversation._change, "[PATH]", "show the model, or go on with another one"),
    "reset": _Command(Conversation._reset, "", "forget the conversation (/clear)"),
    "quit": _Command(Conversation._quit, "", "leave (/bye, /exit, Ctrl-D)"),
}
#: The names that other programs have for these commands.
_OTHER_NAMES = {"?": "help", "clear": "reset", "bye": "quit", "exit": "quit", "regen": "retry"}
_KEYS = [
    ('"""', "begins and ends a message of several lines; a paste needs none"),
    ("Ctrl-C", "stops an answer, empties the prompt; at an empty one it leaves"),
]


def _table(rows: Sequence[tuple[str, str]]) -> None:
    """Write two columns to stderr, as wide as the terminal."""
    formatter = click.HelpFormatter(width=(size(sys.stderr)[0] or 80) - 1)
    formatter.write_dl(rows)
    click.echo(formatter.getvalue(), err=True, nl=False)


def _read_option(name: str, values: list[str]) -> dict[str, Any]:
    """A field of SamplingOptions and its value, parsed as the command-line flag. Raises InputError.

    values: one; several for a flag that may be repeated.
    """
    command = sampling_options(seed=-1)(click.Command("/set", add_help_option=False))
    flag, field = f"--{_flag(name)}", name.replace("-", "_")
    try:
        context = command.make_context("/set", [f"{flag}={value}" for value in values])
    except click.UsageError as e:
        raise InputError(e.format_message()) from e
    if len(values) > 1 and not isinstance(context.params[field], dict):
        raise InputError(f"/set {name} wants one value, not {len(values)}")
    return {field: context.params[field]}


def _flag(field: str) -> str:
    return field.replace("_", "-")


def _plain(value: Any) -> str:
    """A value as /set accepts it."""
    if isinstance(value, Mapping):
        return " ".join(f"{token}={bias}" for token, bias in value.items())
    return "-1" if value is None else str(value)
