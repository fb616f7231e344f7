"""`edge-run` on terminals and in pipes: streaming, Ctrl-C, what shows where, the status."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_model import ROOT, edge_run

from edge.cli import status
from edge.cli.status import Status, cells, duration
from edge.cli.terminal import Interrupt, Progress, size, write

FAKE = (
    f"sys.path.insert(0, {str(ROOT / 'tests')!r}); import edge, fake_model as t\n"
    "edge.__dict__['load'] = t.FakeModel; t.FakeSource.pause = {pause}; "
    "t.FakeSource.words = ('word ',) * {n}"
)


def test_reader_that_leaves_is_no_error() -> None:
    program = FAKE.format(pause=0.001, n=100_000) + "\nfrom edge.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; {program}", "complete", "-p", "x"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.read(5) == b"word "  # the first piece is not held back
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(30) == 1


def test_pipe_gets_text_alone() -> None:
    done = edge_run("complete", "-q", "-p", "x", code=FAKE.format(pause=0, n=3))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"word word word ", b"")


def test_a_character_that_the_terminal_lacks_is_replaced() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    code = FAKE.format(pause=0, n=3) + "; t.FakeSource.words = ('\\u00fc',)"
    done = edge_run("complete", "-q", "-p", "x", code=code, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?", b"")


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
        code: str = "",
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

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self, press: str = "") -> int:
        """Read until the program ends. press: type this, and again as long as nothing comes of it:
        readline misses a Ctrl-C between its prompt and its waiting for a key."""
        import select

        try:
            self.type(press)
            while press and not select.select([self.fd], [], [], 0.5)[0]:
                self.type(press)
            while chunk := os.read(self.fd, 4096):
                self.seen += chunk.decode(errors="replace")
        except OSError:
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


needs_pty = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo terminals there")


@needs_pty
def test_conversation(tmp_path: Path) -> None:
    terminal = Terminal("chat", "m.gguf", cache=tmp_path)
    terminal.wait_for("> ")
    for typed, answer in (
        ("hello", "word word word"),
        ("/help", "/reset"),
        ("/nothing", "/nothing is not known"),
        ("/reset", ""),
        ("", ""),
        ("/etc/hosts is what?", "word word word"),
    ):
        terminal.type(f"{typed}\n")
        assert answer in terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen


@needs_pty
def test_end_of_input_leaves_and_history_stays(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    terminal = Terminal("chat", cache=tmp_path / "cache")
    terminal.wait_for("> ")
    terminal.type("remember this\n")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    history = tmp_path / "cache" / "chat_history"
    assert "remember this" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@needs_pty
def test_ctrl_c_stops_the_answer_and_the_next_leaves(tmp_path: Path) -> None:
    terminal = Terminal("chat", pause=0.02, n=100_000, cache=tmp_path)
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("word word")
    terminal.type("\x03")
    terminal.wait_for("> ", seconds=5)
    terminal.type("again\n")  # the session is still there
    terminal.wait_for("word word")
    terminal.type("\x03")
    terminal.wait_for("> ", seconds=5)
    assert terminal.exit_code(press="\x03") == 130
    assert "Traceback" not in terminal.seen


@needs_pty
def test_two_ctrl_c_leave_an_answer_that_does_not_stop(tmp_path: Path) -> None:
    terminal = Terminal("chat", pause=2, n=100, cache=tmp_path)
    terminal.wait_for("> ")
    terminal.type("hello\n")
    time.sleep(0.5)
    terminal.type("\x03")
    time.sleep(0.2)
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert "Traceback" not in terminal.seen


@needs_pty
def test_ctrl_c_ends_a_single_answer(tmp_path: Path) -> None:
    terminal = Terminal("chat", "-p", "hello", pause=0.02, n=100_000, cache=tmp_path)
    terminal.wait_for("word word")
    terminal.type("\x03")
    assert terminal.exit_code() == 130
    assert "tokens" in terminal.seen  # the figures of what there was
    assert "Traceback" not in terminal.seen


def test_ignored_ctrl_c_stays_ignored() -> None:
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt(lambda: None):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)


@needs_pty
def test_bytes_that_are_no_text_keep_the_conversation(tmp_path: Path) -> None:
    terminal = Terminal("chat", cache=tmp_path)
    terminal.wait_for("> ")
    terminal.type("\xff\n")
    terminal.wait_for("> ")
    terminal.type("/quit\n")
    assert terminal.exit_code() == 0


def test_a_terminal_is_spared_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write("a\x1b[2J\tb\n\x9bc")
    assert capsys.readouterr().out == "a[2J\tb\nc"


def test_a_file_has_no_size(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        assert size(file) == (0, 0)
    assert size(file) == (0, 0)  # closed


def test_progress_needs_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "AFTER_SECONDS", -1.0)
    with Progress("loading") as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("loading") as progress:
        progress(1, 2)
    shown, cleared = capsys.readouterr().err.split("%")
    assert "loading [" in shown and " 50 " in shown
    assert cleared.endswith("\r")


# ---- the status of an answer ---------------------------------------------------------------------


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
                assert token.isprintable(), repr(token)
                self.put(token)

    def put(self, c: str) -> None:
        if self.wraps:
            self.column = 0
            self.down()
        self.screen[self.row][self.column] = c
        self.wraps = self.column == self.columns - 1
        self.column += not self.wraps

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
        elif kind == "K":
            self.screen[self.row] = [" "] * self.columns
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


#: Draw at every token, to have many draws.
ALWAYS = "from edge.cli.status import Status; Status.AFTER_SECONDS = Status.EVERY_SECONDS = 0\n"
WORDS = "t.FakeSource.words = tuple(f'{i:x}' + ' \\n'[i % 17 == 3] for i in range(300))"
TEXT = "".join(f"{i:x}" + " \n"[i % 17 == 3] for i in range(300))


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Both outputs are a terminal of [columns, rows]; each token is drawn."""
    now = [40, 12]
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status, "size", lambda _: tuple(now))
    for name in ("AFTER_SECONDS", "EVERY_SECONDS"):
        monkeypatch.setattr(Status, name, 0.0)
    return now


def text_of(screen: Screen) -> str:
    """What it holds, rows that are full joined to the next."""
    return "".join(f"{line:<{screen.columns}}" for line in screen.lines)


def whole(screen: Screen, text: str) -> bool:
    """Whether the screen holds the text, and nothing else. Trailing spaces do not show."""
    shown = Screen(1000, screen.columns)
    shown.feed(text.replace("\n", "\r\n"))
    return text_of(screen).rstrip() == text_of(shown).rstrip()


@needs_pty
@pytest.mark.parametrize("command", [("complete", "-p", "x"), ("chat", "-p", "x")], ids=" ".join)
def test_the_last_row_has_the_status(tmp_path: Path, command: tuple[str, ...]) -> None:
    args = (*command, "-n", "300")
    terminal = Terminal(*args, cache=tmp_path, code=ALWAYS + WORDS, rows=12, columns=40)
    assert terminal.exit_code() == 0
    assert terminal.seen.count("\x1b7") == terminal.seen.count("\x1b8") > 100
    before, after = terminal.seen.rsplit("\x1b[r", 1)
    screen = Screen(12, 40)
    screen.feed(before)
    assert re.match(r"(299|300) of 300 tokens, [0-9.]+/s at d", screen.lines[-1])
    screen.feed("\x1b[r" + after)
    assert screen.bottom == 11
    shown = text_of(screen)
    assert "/s at depth" not in shown and "peak memory" in shown
    assert "".join(TEXT.split()) in "".join(shown.split())


@needs_pty
@pytest.mark.parametrize(
    ("args", "rows"),
    [(("-n", "300", "-q"), 12), (("-n", "200"), 12), ((), 12), (("-n", "300"), 9)],
    ids=["quiet", "short", "no limit", "small screen"],
)
def test_no_row_is_kept(tmp_path: Path, args: tuple[str, ...], rows: int) -> None:
    command = ("complete", "-p", "x", *args)
    terminal = Terminal(*command, cache=tmp_path, code=ALWAYS + WORDS, rows=rows, columns=40)
    assert terminal.exit_code() == 0
    assert "\x1b7" not in terminal.seen and "\x1b[1;" not in terminal.seen


@needs_pty
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_gives_the_row_back(tmp_path: Path, presses: int) -> None:
    options = {"code": ALWAYS, "rows": 12, "columns": 40}
    pause = 0.01 if presses == 1 else 0.3
    args = ("complete", "-p", "x", "-n", "5000")
    terminal = Terminal(*args, pause=pause, n=5000, cache=tmp_path, **options)
    terminal.wait_for("of 5,000 tokens")
    for _ in range(presses):
        terminal.type("\x03")
        time.sleep(0.05)
    assert terminal.exit_code() == 130
    assert terminal.seen.rindex("\x1b[r") > terminal.seen.rfind("\x1b[1;11r")
    assert "Traceback" not in terminal.seen


@needs_pty
def test_an_error_gives_the_row_back(tmp_path: Path) -> None:
    fails = "t.FakeSource.words = type('W', (), {'__iter__': lambda s: t.fails(300)})()"
    code = (
        "from edge.errors import InputError\n"
        "def words(n):\n    yield from ('word ',) * n\n    raise InputError('it broke')\n"
        f"t.fails = words\n{fails}\n{ALWAYS}"
    )
    args = ("complete", "-p", "x", "-n", "5000")
    terminal = Terminal(*args, cache=tmp_path, code=code, rows=12, columns=40)
    assert terminal.exit_code() == 1
    drawn, after = terminal.seen.rsplit("\x1b[r", 1)
    assert "\x1b[1;11r" in drawn and "it broke" in after and "\x1b[1;" not in after


@needs_pty
def test_a_resize_moves_the_status(tmp_path: Path) -> None:
    args = ("complete", "-p", "x", "-n", "5000")
    options = {"code": ALWAYS, "rows": 12, "columns": 40}
    terminal = Terminal(*args, pause=0.005, n=5000, cache=tmp_path, **options)
    terminal.wait_for("\x1b[1;11r")
    resize(terminal.fd, 20, 60)
    terminal.wait_for("\x1b[1;19r\x1b[20H")
    resize(terminal.fd, 5, 60)
    terminal.wait_for("\x1b[r")  # too small: given back
    resize(terminal.fd, 12, 60)
    terminal.wait_for("\x1b[1;11r")
    terminal.type("\x03")
    assert terminal.exit_code() == 130


@pytest.mark.parametrize("keeps_wrap", [True, False])
@pytest.mark.parametrize("start", [0, 5, 11])
def test_the_text_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keeps_wrap: bool,
    start: int,
) -> None:
    """Also where the screen was full before, and on terminals that forget about a wrap."""
    on_terminal(monkeypatch)
    screen, before = Screen(12, 40, keeps_wrap), "\n" * start
    screen.feed(before)
    with Status(300, shown=True, quiet=False) as progress:
        for i, word in enumerate(re.findall(r"\w+\s?", TEXT)):
            write(word)
            progress(word, i, 10)
            screen.feed(capsys.readouterr().out.replace("\n", "\r\n"))
        assert f"{i + 1} of 300 tokens" in screen.lines[-1]
    screen.feed(capsys.readouterr().out)
    assert whole(screen, before + TEXT) and screen.bottom == 11


def test_the_text_stays_whole_when_the_window_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = on_terminal(monkeypatch)
    screen = Screen(12, 40)
    with Status(300, shown=True, quiet=False) as progress:
        for i, word in enumerate(re.findall(r"\w+\s?", TEXT)):
            write(word)
            progress(word, i, 10)
            screen.feed(capsys.readouterr().out.replace("\n", "\r\n"))
            if i % 50 == 25:  # in the middle of a line
                window[1] = (17, 11, 5, 24, 10, 12)[i // 50]
                screen.resize(window[1])
    screen.feed(capsys.readouterr().out)
    assert whole(screen, TEXT) and screen.bottom == screen.rows - 1


def test_a_line_of_stderr_where_the_text_goes_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    times = iter(range(1000))
    monkeypatch.setattr(status.time, "monotonic", lambda: next(times) / 4)
    with Status(None, shown=True, quiet=False) as progress:
        for i in range(50):
            progress("word", i, 100)
    with Status(50, shown=True, quiet=False) as progress:
        for i in range(30):
            progress("word", i, 100)
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.endswith("\r")
    lines = [line.rstrip() for line in shown.err.split("\r")]
    assert "50 tokens, 4.0/s at depth 150" in lines
    assert "30 of 50 tokens, 4.0/s at depth 130, 0:05 left [######....]" in lines


def test_the_speed_is_that_of_late(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch)
    now = [0.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    with Status(None, shown=False, quiet=False) as progress:
        for i in range(100):
            now[0] += 0.01 if i < 60 else 1.0
            progress("", i, 0)
    assert "100 tokens, 1.0/s" in capsys.readouterr().err


def test_a_status_is_rare_and_needs_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setattr(Status, "AFTER_SECONDS", 0.3)
    monkeypatch.setattr(Status, "EVERY_SECONDS", 0.25)
    times = iter(range(1000))
    monkeypatch.setattr(status.time, "monotonic", lambda: next(times) / 100)  # 10 ms a token
    with Status(300, shown=True, quiet=False) as progress:
        for i in range(101):
            progress("a", i, 0)
    assert capsys.readouterr().out.count("at depth") in (3, 4)
    for name, value in (("TERM", "dumb"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
        with Status(300, shown=True, quiet=value == "xterm") as progress:
            progress("a", 0, 0)
            progress("a", 0, 0)
    assert capsys.readouterr() == ("", "")


def test_cells_and_durations() -> None:
    assert cells("abc", 2) == 5 and cells("a\tb") == 9 and cells("", 7) == 7
    assert cells("\u00fc\u6f22e\u0301\u200d") == 1 + 2 + 1
    assert [duration(s) for s in (0, 7.4, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]
