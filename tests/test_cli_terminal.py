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
from terminals import FAKE, Terminal, needs_pty

from edge.cli.terminal import Interrupt, Progress, size, write


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
