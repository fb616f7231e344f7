"""Output to a terminal: progress bars, wrapped text, figures; and Ctrl-C that stops an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import click

from edge.cli.wrap import Wrap, cells
from edge.device import memory

#: Deletes control characters, with which a model could take over a terminal; keeps tab and newline.
_CONTROL = {i: None for i in (*range(32), *range(127, 160)) if i not in (9, 10)}


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def size(stream: Any) -> tuple[int, int]:
    """Columns and rows of a stream's terminal; 0, 0 where they are unknown."""
    try:
        terminal = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # no terminal, or closed
        return 0, 0
    return terminal.columns, terminal.lines


class Line:
    """A line of stderr that each draw overwrites; nothing else may write to the terminal."""

    def __init__(self) -> None:
        self._width = 0

    def follow(self, column: int) -> None:
        """Do nothing: stdout is not on this terminal."""

    def draw(self, line: str) -> None:
        """Replace the line that is shown."""
        line = line[: (size(sys.stderr)[0] or 80) - 1]
        print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
        self._width = len(line)

    def clear(self) -> None:
        """Remove the line."""
        if self._width:
            self.draw("")
            print("\r", end="", file=sys.stderr, flush=True)


class Progress:
    """A bar on stderr, called with (done, total). It appears on terminals alone, after a delay."""

    AFTER_SECONDS, EVERY_SECONDS, CELLS = 0.3, 0.1, 30

    def __init__(self, label: str) -> None:
        self._label = label
        self._on = is_terminal(sys.stderr)
        self._next: float | None = None  # when to draw again
        self._line = Line()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._next is None:
            self._next = now + self.AFTER_SECONDS
        if not self._on or total <= 0 or now < self._next:
            return
        self._next = now + self.EVERY_SECONDS
        self._line.draw(self.text(done, total))

    def text(self, done: int, total: int) -> str:
        """The bar as a line."""
        cells = self.CELLS * done // total
        bar = "#" * cells + "." * (self.CELLS - cells)
        return f"{self._label} [{bar}] {100 * done // total:3} %"

    def clear(self) -> None:
        """Remove the bar."""
        self._line.clear()


class Interrupt:
    """In its `with`, Ctrl-C calls `cancel`; a second Ctrl-C raises KeyboardInterrupt.

    Python runs a signal's handler only when native code returns, which takes seconds in a long
    prompt. But it writes to the wake-up descriptor at once, so a thread that reads it can cancel.
    hit: whether Ctrl-C was pressed. Outside the main thread, and where Ctrl-C is ignored already,
    nothing is installed.
    """

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.hit = False
        self._cancel = cancel
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Interrupt:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            try:
                self._install()
            except (ImportError, OSError, RuntimeError):  # no memory for a socket or a thread
                self._undo.close()
        return self

    def _install(self) -> None:
        import socket

        reader, writer = socket.socketpair()
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        try:
            thread.start()
        except RuntimeError:
            reader.close()
            writer.close()
            raise
        self._undo.callback(reader.close)
        self._undo.callback(thread.join)
        self._undo.callback(writer.close)
        writer.setblocking(False)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno()))
        self._undo.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._undo.close()

    def _watch(self, reader: Any) -> None:
        while signals := reader.recv(16):
            if signal.SIGINT in signals:
                self._cancel()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True


class Writer:
    """Writes a model's text to stdout, piece by piece.

    On a terminal, control characters are left out, and rows end between words. Elsewhere the text
    is unchanged.
    """

    def __init__(self) -> None:
        self._shows = sys.stdout.isatty()
        self._moves = is_terminal(sys.stdout) and sys.platform != "win32"
        self._wrap = Wrap()

    @property
    def column(self) -> int:
        """Cells of the terminal since the last newline."""
        return self._wrap.column

    def write(self, text: str) -> None:
        """Write a piece, and flush it."""
        if self._shows:
            columns = size(sys.stdout)[0] if self._moves else 0
            text = self._wrap.push(text.translate(_CONTROL), columns)
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


def note(text: str) -> None:
    """Write lines to stderr, dimmed."""
    click.secho(fit(text), err=True, dim=True)


def fit(text: str) -> str:
    """Lines for stderr; where that is a terminal, broken between words at its edge."""
    columns = size(sys.stderr)[0]
    return "\n".join(row for line in text.split("\n") for row in _rows(line, columns - 1))


def _rows(line: str, width: int) -> list[str]:
    if width < 1 or cells(line) <= width:
        return [line]
    import textwrap

    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)


def figures(usage: Any, engine: Any) -> str:
    """One line of an answer: tokens, tokens/s, peak memory, kernels, threads."""
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    parts = [
        f"prompt {usage.prompt_tokens} tokens{cached}{_speed(usage.prompt_tokens_per_second)}",
        f"answer {usage.completion_tokens} tokens{_speed(usage.decode_tokens_per_second)}",
    ]
    if peak := memory.peak():
        parts.append(f"peak memory {mebibytes(peak)}")
    threads = "1 thread" if engine.threads == 1 else f"{engine.threads} threads"
    refused = f" (not kept on the fast cores: {engine.refused})" if engine.refused else ""
    slow = _why_slow(engine.isa)
    return "; ".join([*parts, f"kernels {engine.isa}{slow}, {threads}{refused}"])


def _why_slow(isa: str) -> str:
    """A note for a CPU that has only the slowest kernels; else ""."""
    from edge import native

    return " (there are no faster ones for this CPU)" if native.isas() == [isa] else ""


def _speed(tokens_per_second: float) -> str:
    return f", {tokens_per_second:.1f}/s" if tokens_per_second else ""


def mebibytes(n_bytes: int) -> str:
    """A size as people read it."""
    return f"{n_bytes / 2**20:,.0f} MiB" if n_bytes >= 2**20 else f"{n_bytes / 2**10:,.1f} KiB"


def plain(value: object) -> str:
    """A value from a file as text on one line, safe for a terminal."""
    text = " ".join(str(value if value is not None else "").split())
    return "".join(c if c.isprintable() else "?" for c in text)
