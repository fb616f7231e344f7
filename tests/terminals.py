"""Pseudo terminals for tests: `edge-run` on one, and what its screen would show."""

from __future__ import annotations

import os
import re
import struct
import sys
import time
from pathlib import Path

import pytest
from fake_model import ROOT

from edge.cli.wrap import cells

#: Without prompt_toolkit there is readline; how the two draw a prompt differs.
READLINE, TOOLKIT = "sys.modules['prompt_toolkit'] = None\n", ""

FAKE = (
    f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import edge, fake_model as t\n"
    "edge.__dict__['load'] = t.FakeModel; t.FakeSource.pause = {pause}; "
    "t.FakeSource.words = ('word ',) * {n}"
)

needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals there")


def resize(fd: int, rows: int, columns: int) -> None:
    """Give a pseudo terminal a size."""
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Terminal:
    """The program on a pseudo terminal."""

    def __init__(
        self,
        *args: str,
        pause: float = 0.0,
        n: int = 3,
        cache: Path,
        code: str = READLINE,
        rows: int = 0,
        columns: int = 0,
    ) -> None:
        import pty

        program = FAKE.format(pause=pause, n=n) + f"\n{code}\nfrom edge.cli import main; main()"
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            resize(0, rows, columns)
            env = os.environ | {"EDGE_CACHE": str(cache), "TERM": "xterm"}
            os.execve(sys.executable, [sys.executable, "-c", f"import sys; {program}", *args], env)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """Everything up to this text, since the last call."""
        import select

        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], repr(self.seen)
            try:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:  # the other end was closed
                raise AssertionError(repr(self.seen)) from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def prompt(self) -> str:
        """Wait until a conversation reads what is typed, whatever edits it; what was shown before.

        Pastes are marked meanwhile, too: between two prompts the mode goes off and on twice.
        """
        before = self.wait_for("\x1b[?2004l")
        self.wait_for("\x1b[?2004h")
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def press(self, key: str, seconds: float = 5) -> None:
        """Type it, and again as long as nothing comes of it: readline misses a Ctrl-C between its
        prompt and its waiting for a key."""
        import select

        self.type(key)
        while not select.select([self.fd], [], [], seconds)[0]:
            self.type(key)

    def exit_code(self, press: str = "") -> int:
        """Read until the program ends. press: press this."""
        try:
            if press:
                self.press(press, seconds=0.5)
            while chunk := os.read(self.fd, 4096):
                self.seen += chunk.decode(errors="replace")
        except OSError:
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Screen:
    """As much of a terminal as the status uses. lines: rows that scrolled away, then the screen."""

    TOKEN = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\x1b.|.", re.DOTALL)

    def __init__(self, rows: int, columns: int, keeps_wrap: bool = True) -> None:
        self.rows, self.columns, self.keeps_wrap = rows, columns, keeps_wrap
        self.gone: list[str] = []
        self.screen = [[" "] * columns for _ in range(rows)]
        self.row = self.column = 0
        self.wraps = False  # the next character belongs to the next row
        self.bottom = rows - 1
        self.saved = (0, 0, False)

    @property
    def lines(self) -> list[str]:
        return [*self.gone, *("".join(row).rstrip() for row in self.screen)]

    def feed(self, text: str) -> None:
        for token in self.TOKEN.findall(text):
            if token.startswith("\x1b["):
                self.control(token[2:-1], token[-1])
            elif token == "\x1b7":
                self.saved = self.row, self.column, self.wraps
            elif token == "\x1b8":
                self.row, self.column, wraps = self.saved
                self.wraps = wraps and self.keeps_wrap
            elif token in ("\x1bD", "\n"):
                self.down()
            elif token == "\r":
                self.column, self.wraps = 0, False
            else:
                assert token.isprintable() or not cells(token), repr(token)
                self.put(token)

    def put(self, c: str) -> None:
        width = cells(c)
        if width == 0:
            self.screen[self.row][self.column - (not self.wraps)] += c
            return
        if self.wraps or self.column + width > self.columns:
            self.column = 0
            self.down()
        self.screen[self.row][self.column : self.column + width] = [c, ""][:width]
        self.wraps = self.column + width == self.columns
        self.column = min(self.column + width, self.columns - 1)

    def down(self) -> None:
        self.wraps = False
        if self.row == self.bottom:
            self.gone.append("".join(self.screen.pop(0)).rstrip())
            self.screen.insert(self.bottom, [" "] * self.columns)
        else:
            self.row = min(self.row + 1, self.rows - 1)

    def control(self, numbers: str, kind: str) -> None:
        given = [int(n) for n in numbers.split(";") if n]
        if kind == "r":
            self.bottom = (given[1] if given else self.rows) - 1
            self.row, self.column, self.wraps = 0, 0, False
        elif kind == "H":
            self.row, self.column, self.wraps = given[0] - 1, 0, False
        elif kind == "A":
            self.row, self.wraps = max(self.row - 1, 0), False
        elif kind == "D":
            assert not self.wraps
            self.column -= given[0]
        elif kind == "K":
            start = 0 if numbers == "2" else self.column
            self.screen[self.row][start:] = [" "] * (self.columns - start)
        elif kind == "J":
            self.screen[self.row][self.column :] = [" "] * (self.columns - self.column)
            for i in range(self.row + 1, self.rows):
                self.screen[i] = [" "] * self.columns
        else:
            assert kind == "m"

    def resize(self, rows: int) -> None:
        """As xterm: rows come and go at the bottom, but never the cursor's; margins are off."""
        while len(self.screen) > rows:
            if self.row < len(self.screen) - 1:
                self.screen.pop()
            else:
                self.gone.append("".join(self.screen.pop(0)).rstrip())
                self.row -= 1
        self.screen += [[" "] * self.columns for _ in range(rows - len(self.screen))]
        self.rows, self.bottom = rows, rows - 1
