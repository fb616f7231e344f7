"""How far an answer is, on a terminal: where it stands, what it says, and a text left whole."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from terminals import Screen, Terminal, needs_pty, resize

from edge.cli import status
from edge.cli.status import Status, duration
from edge.cli.terminal import Writer

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
    writer = Writer()
    with Status(300, shown=True, quiet=False) as progress:
        for i, word in enumerate(re.findall(r"\w+\s?", TEXT)):
            writer.write(word)
            progress(writer.column, i, 10)
            screen.feed(capsys.readouterr().out.replace("\n", "\r\n"))
        assert f"{i + 1} of 300 tokens" in screen.lines[-1]
    screen.feed(capsys.readouterr().out)
    assert whole(screen, before + TEXT) and screen.bottom == 11


def test_the_text_stays_whole_when_the_window_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    window = on_terminal(monkeypatch)
    screen, writer = Screen(12, 40), Writer()
    with Status(300, shown=True, quiet=False) as progress:
        for i, word in enumerate(re.findall(r"\w+\s?", TEXT)):
            writer.write(word)
            progress(writer.column, i, 10)
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
            progress(0, i, 100)
    with Status(50, shown=True, quiet=False) as progress:
        for i in range(30):
            progress(0, i, 100)
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
            progress(0, i, 0)
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
            progress(1, i, 0)
    assert capsys.readouterr().out.count("at depth") in (3, 4)
    for name, value in (("TERM", "dumb"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
        with Status(300, shown=True, quiet=value == "xterm") as progress:
            progress(1, 0, 0)
            progress(1, 0, 0)
    assert capsys.readouterr() == ("", "")


def test_durations() -> None:
    assert [duration(s) for s in (0, 7.4, 754, 3723)] == ["0:00", "0:07", "12:34", "1:02:03"]
