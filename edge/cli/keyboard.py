"""The keyboard of a conversation: editing, history and pastes, and no echo during an answer."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import click

from edge.cli.terminal import is_terminal
from edge.disk.atomic import replacing
from edge.disk.room import cache_dir
from edge.errors import UnsupportedError

_PROMPT, _MORE = "> ", ". "
_QUOTES = '"""'
_COMMAND = re.compile(r"\s*/([A-Za-z]+|\?)(?=\s|$)(.*)", re.DOTALL)
_MARK_PASTES, _MARK_NO_PASTES = "\x1b[?2004h", "\x1b[?2004l"


class Keyboard:
    """Messages from the terminal. Use it in a `with`: between two calls of `read` the terminal
    echoes no keys, and what was typed waits for the next prompt.

    The editor is prompt_toolkit (extra `chat`), else `input`, with readline where Python has it.
    Make a Keyboard before a model is loaded, because the ledger counts the memory that the process
    has by then.
    """

    def __init__(self) -> None:
        self._history = History()
        self._editor: _Editor
        try:
            self._editor = _Toolkit(self._history.entries)
        except ImportError:
            self._editor = _Lines(self._history.entries)
        self._modes: list[Any] | None = None  # the terminal's own, to restore

    def __enter__(self) -> Keyboard:
        with contextlib.suppress(ImportError):  # no termios on this system
            import termios

            with contextlib.suppress(termios.error):
                self._modes = termios.tcgetattr(sys.stdin)
        self._hush()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def read(self) -> str | None:
        """The next message, without the space around it; None at the end of input.

        Ctrl-C empties a prompt that has text. At an empty prompt it raises KeyboardInterrupt.
        """
        self._restore()
        try:
            text = self._editor.read()
        except EOFError:
            click.echo()
            return None
        except UnicodeDecodeError:
            click.echo("edge-run: that line is not UTF-8", err=True)
            return ""
        finally:
            self._hush()
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        self._history.add(text)
        return text

    def _hush(self) -> None:
        """Turn off the echo and the terminal's line buffer; Ctrl-C stays a signal."""
        if self._modes is None:
            return
        import termios

        modes = list(self._modes)
        modes[3] &= ~(termios.ECHO | termios.ICANON)
        self._mode(modes)
        self._mark_pastes(_MARK_PASTES)

    def _restore(self) -> None:
        if self._modes is not None:
            self._mark_pastes(_MARK_NO_PASTES)
            self._mode(self._modes)

    @staticmethod
    def _mode(modes: list[Any]) -> None:
        import termios

        with contextlib.suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)

    def _mark_pastes(self, sequence: str) -> None:
        if self._editor.knows_pastes and is_terminal(sys.stdout):
            sys.stdout.write(sequence)
            sys.stdout.flush()


class Typed(NamedTuple):
    """A message, or a command and its text. is_open: the closing three quotes are still missing."""

    command: str | None
    text: str
    is_open: bool = False


def parse(line: str) -> Typed:
    """Parse what was typed: `/command text`, or text. The text may stand in three double quotes,
    and have several lines there.
    """
    match = _COMMAND.match(line)
    command, text = (match[1].lower(), match[2]) if match else (None, line)
    text = text.strip()
    if not text.startswith(_QUOTES):
        return Typed(command, text)
    body = text[len(_QUOTES) :]
    return Typed(command, body.removesuffix(_QUOTES).strip(), not body.endswith(_QUOTES))


class _Editor(Protocol):
    """Reads messages. knows_pastes: it reads a paste that the terminal marks as one message."""

    knows_pastes: bool

    def read(self) -> str:
        """A message. Raises EOFError, KeyboardInterrupt, UnicodeDecodeError."""


class _Lines:
    """Reads with `input`. GNU readline knows pastes; without it, lines that are waiting already
    belong to the same message.
    """

    def __init__(self, history: list[str]) -> None:
        self.knows_pastes = False
        self._readline: Any = None
        with contextlib.suppress(ImportError):
            import readline

            self._readline = readline
            readline.set_auto_history(False)  # an entry is a message, not one of its lines
            for entry in history:
                readline.add_history(entry)
            if "libedit" not in (readline.__doc__ or "") and is_terminal(sys.stdout):
                readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
                self.knows_pastes = True

    def read(self) -> str:
        text = ""
        while True:
            try:
                text = input(_PROMPT)
                while parse(text).is_open or (not self.knows_pastes and _waits()):
                    text += "\n" + input(_MORE)
                break
            except KeyboardInterrupt:
                if not text and (self._readline is None or not self._readline.get_line_buffer()):
                    raise
                text = ""
                click.echo()
        if self._readline is not None and text.strip():
            self._readline.add_history(text)
        return text


def _waits() -> bool:
    """Whether more lines of the terminal are waiting."""
    import select

    try:
        return sys.stdin.isatty() and bool(select.select([sys.stdin], [], [], 0)[0])
    except OSError:  # select takes no terminals here
        return False


class _Toolkit:
    """prompt_toolkit's editor. Raises ImportError where it is not installed, or has no terminal."""

    knows_pastes = True

    def __init__(self, history: list[str]) -> None:
        if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
            raise ImportError("prompt_toolkit needs a terminal")
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import create_output

        def enter(event: Any) -> None:
            if parse(event.current_buffer.text).is_open:
                event.current_buffer.insert_text("\n")
            else:
                event.current_buffer.validate_and_handle()

        def new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        def take_back(event: Any) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        keys = KeyBindings()
        keys.add("enter")(enter)
        keys.add("escape", "enter")(new_line)
        keys.add("c-c")(take_back)
        output: Any = create_output()
        output.enable_cpr = False  # do not ask where the cursor is: the reply comes as if typed
        self._session: Any = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_MORE,
            key_bindings=keys,
            history=InMemoryHistory(history),
            output=output,
        )

    def read(self) -> str:
        text: str = self._session.prompt()
        return text


class History:
    """The messages of this conversation and of earlier ones, oldest first.

    They are kept in a file in the cache folder that only its owner can read. A line of the file is
    a message, with carriage returns for its newlines.
    """

    MOST, LONGEST = 1000, 10_000  # messages; characters of a message

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._path: Path | None = None
        with contextlib.suppress(OSError, UnsupportedError):  # there is no cache folder
            self._path = cache_dir() / "chat_history"
            text = self._path.read_bytes().decode("utf-8", "replace")
            lines = [line for line in text.split("\n") if line]
            self.entries = [line.replace("\r", "\n") for line in lines[-self.MOST :]]
            if len(lines) > 2 * self.MOST:
                with replacing(self._path, ".history-") as file:
                    os.chmod(file.fileno(), 0o600)
                    file.write("".join(f"{line}\n" for line in lines[-self.MOST :]).encode())

    def add(self, text: str) -> None:
        """Keep a message, unless it is empty or too long. Errors of the disk are ignored."""
        if self._path is None or not text or len(text) > self.LONGEST:
            return
        line = text.replace("\r\n", "\n").replace("\n", "\r") + "\n"
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
            handle = os.open(self._path, flags, 0o600)
            with open(handle, "ab", buffering=0) as file:
                file.write(line.encode())
