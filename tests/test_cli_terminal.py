"""`edge-run` on terminals and in pipes: streaming, Ctrl-C, what shows where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_model import ROOT, edge_run
from terminals import FAKE, READLINE, TOOLKIT, Screen, Terminal, needs_pty

from edge.cli import keyboard
from edge.cli.keyboard import History, Keyboard, parse
from edge.cli.terminal import Interrupt, Progress, size


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


#: The fake says what it was asked.
ECHOES = (
    "t.FakeSource.stream = lambda self, prompt, real=t.FakeSource.stream, **o: (\n"
    "    setattr(t.FakeSource, 'words', (repr(prompt),)), real(self, prompt, **o))[1]\n"
)


@pytest.fixture(params=["prompt_toolkit", "readline"])
def editor(request: pytest.FixtureRequest) -> str:
    """What edits the prompt, as code that picks it."""
    pytest.importorskip(request.param)
    return READLINE if request.param == "readline" else TOOLKIT


@needs_pty
@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (("\x1b[200~one\ntwo\nthree\x1b[201~", "\r"), "one\\ntwo\\nthree"),
        (('"""one\r', "  two\r", 'three"""\r'), "one\\n  two\\nthree"),
        (('"""/help"""\r',), "/help"),
        (("not this #", "\x03", "but this\r"), "but this"),
        (('"""not this\r', "nor this #", "\x03", "but this\r"), "but this"),
    ],
    ids=["paste", "quotes", "no command", "taken back", "quotes taken back"],
)
def test_what_is_one_question(
    tmp_path: Path, editor: str, typed: tuple[str, ...], question: str
) -> None:
    terminal = Terminal("chat", "-q", cache=tmp_path, code=editor + ECHOES)
    terminal.prompt()
    for keys in typed:
        if keys == "\x03":
            terminal.press(keys)
            terminal.wait_for("\x1b")
            continue
        terminal.type(keys)
        if "#" in keys:  # Ctrl-C takes what was not read yet with it
            terminal.wait_for("#")
    shown = terminal.wait_for(f"'{question}'")
    terminal.prompt()
    terminal.type("/quit\r")
    assert terminal.exit_code() == 0
    assert "'" not in shown + terminal.seen and "Traceback" not in terminal.seen  # one question


@needs_pty
def test_what_is_typed_meanwhile_waits(tmp_path: Path, editor: str) -> None:
    terminal = Terminal("chat", "-q", pause=0.02, n=60, cache=tmp_path, code=editor)
    terminal.prompt()
    terminal.type("hello\r")
    terminal.prompt()  # of the one that was left
    terminal.wait_for("word word")
    terminal.type("meanwhile")
    terminal.type("\x1b[200~ pasted\nlines\x1b[201~")
    assert terminal.prompt().split() == ["word"] * 58
    terminal.wait_for("lines")  # at the prompt, as one message
    terminal.type("\r")
    terminal.prompt()
    assert terminal.prompt().split() == ["word"] * 60
    terminal.type("/bye\r")
    assert terminal.exit_code() == 0


@needs_pty
@pytest.mark.parametrize("end", ["/quit\r", "\x04", "\x03"], ids=["quit", "end", "ctrl-c"])
def test_the_terminal_is_left_as_it_was(tmp_path: Path, editor: str, end: str) -> None:
    import termios

    code = (
        "import atexit; atexit.register(lambda: (print('left', flush=True), sys.stdin.read(1)))\n"
    )
    terminal = Terminal("chat", "-q", cache=tmp_path, code=editor + code)
    terminal.prompt()
    terminal.type("hello\r")
    terminal.prompt()
    terminal.prompt()
    if editor == READLINE:
        terminal.wait_for("> ")
    terminal.press(end)
    assert "\x1b[?2004l" in terminal.wait_for("left")
    wanted = termios.ECHO | termios.ICANON
    assert termios.tcgetattr(terminal.fd)[3] & wanted == wanted
    terminal.type("\n")
    assert terminal.exit_code() == (130 if end == "\x03" else 0)


def test_lines_that_come_together_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without GNU readline nobody says what is a paste."""
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setitem(sys.modules, "readline", None)
    waiting = iter((True, True, False, False))
    monkeypatch.setattr(keyboard, "_waits", lambda: next(waiting))
    lines = iter(("one", "two", "three", "four"))
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    keys = Keyboard()
    assert (keys.read(), keys.read()) == ("one\ntwo\nthree", "four")


@needs_pty
def test_words_stay_whole_at_the_edge(tmp_path: Path) -> None:
    text = "several words of which none is broken where the row of the terminal ends"
    code = f"t.FakeSource.words = tuple({text!r}[i : i + 3] for i in range(0, {len(text)}, 3))\n"
    for args, rows in ((("chat", "-p", "x"), 12), (("complete", "-p", "x", "-n", "300"), 12)):
        terminal = Terminal(*args, cache=tmp_path, code=code, rows=rows, columns=30)
        assert terminal.exit_code() == 0
        screen = Screen(rows, 30)
        screen.feed(terminal.seen)
        assert screen.lines[:3] == [
            "several words of which none",
            "is broken where the row of",
            "the terminal ends",
        ]


def test_a_history_of_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(History, "MOST", 5)
    for i in range(12):
        History().add(f"question {i}\nof two lines")
    History().add("")
    History().add("x" * (History.LONGEST + 1))
    assert History().entries == [f"question {i}\nof two lines" for i in range(7, 12)]
    path = tmp_path / "chat_history"
    assert len(path.read_bytes().splitlines()) <= 24 and path.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("EDGE_CACHE", str(path / "no folder"))
    History().add("hurts nobody")


@pytest.mark.parametrize(
    ("line", "typed"),
    [
        ("/retry", ("retry", "", False)),
        ("/Set  top-k 3", ("set", "top-k 3", False)),
        ("/?", ("?", "", False)),
        ("/etc/hosts is what?", (None, "/etc/hosts is what?", False)),
        ("/", (None, "/", False)),
        ('"""', (None, "", True)),
        ('"""one\ntwo', (None, "one\ntwo", True)),
        ('"""one\n"two" \n"""', (None, 'one\n"two"', False)),
        ('"""/quit"""', (None, "/quit", False)),
        ('/system """be\nbrief', ("system", "be\nbrief", True)),
        ('/system """be\nbrief"""', ("system", "be\nbrief", False)),
        ('what is """?', (None, 'what is """?', False)),
    ],
)
def test_what_was_typed(line: str, typed: tuple[str | None, str, bool]) -> None:
    assert parse(line) == typed


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
