"""Streamed words on a terminal: whole at its edge, whatever their width and its size."""

from __future__ import annotations

import sys

import pytest
from terminals import Screen

from edge.cli import terminal
from edge.cli.terminal import Writer, fit
from edge.cli.wrap import Wrap, cells

TEXT = (
    "The sky is blue because molecules of the air scatter short waves more than long ones.\n"
    "  An indented line, and one with a URL: https://example.org/a/rather/long/path/to/a/page.html\n"
    "\n"
    "| a | table |\tand a tab, then the end   of it"
)
WIDE = "The sky: \u5929\u7a7a\u662f\u84dd\u8272\u7684, \u56e0\u4e3a \U0001f600 and e\u0301te\u0301."


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def shown(text: str, columns: int, size: int) -> list[str]:
    """The rows of a terminal that got the text in pieces of so many characters."""
    screen, wrap = Screen(40, columns), Wrap()
    for piece in pieces(text, size):
        screen.feed(wrap.push(piece, columns).expandtabs().replace("\n", "\r\n"))
        assert screen.column == wrap.column % columns or screen.wraps
    return screen.lines


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("columns", [12, 20, 40, 80])
def test_no_word_is_broken(columns: int, size: int) -> None:
    text = TEXT.replace("\t", " ")
    lines = shown(text, columns, size)
    whole = [word for word in text.split() if len(word) < columns]
    assert [word for line in lines for word in line.split() if word in whole] == whole
    assert "".join("".join(lines).split()) == "".join(text.split())  # and none is lost
    assert all(len(line) < columns or "/" in line for line in lines)
    assert "" in lines  # the empty line


def test_a_row_holds_what_fits() -> None:
    assert shown("aaa bbb ccc ddd", 8, 1)[:3] == ["aaa bbb", "ccc ddd", ""]
    assert shown("aaa bbbb\n", 8, 1)[:3] == ["aaa", "bbbb", ""]
    assert shown("aaaa bb \n\ncc", 8, 1)[:4] == ["aaaa bb", "", "cc", ""]


def test_a_word_is_there_as_it_comes() -> None:
    wrap = Wrap()
    assert [wrap.push(piece, 10) for piece in ("a", "bc", " de", "fgh", "i j")] == [
        "a",
        "bc",
        " de",
        "fgh",
        "\x1b[5D\x1b[K\ndefghi j",
    ]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("columns", [10, 11, 20])
def test_wide_characters_end_a_row_anywhere(columns: int, size: int) -> None:
    lines = shown(WIDE, columns, size)
    assert all(cells(line) < columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(WIDE.split())
    assert any("e\u0301te\u0301." in line for line in lines)
    assert sum(map(bool, lines)) <= cells(WIDE) // (columns - 3) + 1


def test_a_new_width_counts_at_once() -> None:
    wrap = Wrap()
    first = wrap.push("one two three four", 40)
    assert "\n" not in first
    assert wrap.push(" five\nsix seven", 12) == " five\nsix seven"  # 18 cells are 6 in a second row
    assert wrap.push(" eight nine", 40) == " eight nine"
    assert wrap.push("s ten", 24) == "s t\x1b[1D\x1b[K\nten"


def test_cells() -> None:
    assert cells("abc", 2) == 5 and cells("a\tb") == 9 and cells("", 7) == 7
    assert cells("\u00fc\u6f22e\u0301\u200d") == 1 + 2 + 1


def test_only_a_terminal_gets_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "size", lambda _: (12, 30))
    monkeypatch.setenv("TERM", "xterm")
    line = "one two three\tfour five six \x1b[m seven\n"
    Writer().write(line)
    assert capsys.readouterr().out == line
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Writer().write("one two three four\x07")
    assert capsys.readouterr().out == "one two thr\x1b[3D\x1b[K\nthree four"
    monkeypatch.setenv("TERM", "dumb")
    Writer().write("one two three four\x07")
    assert capsys.readouterr().out == "one two three four"


def test_lines_beside_the_answer_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "prompt 5 tokens, 10.0/s; answer 3 tokens, 8.0/s"
    assert fit(line) == line  # standard error is no terminal here
    monkeypatch.setattr(terminal, "size", lambda _: (20, 30))
    rows = fit(f"{line}\n  a table   row").split("\n")
    assert " ".join(rows[:-1]) == line and rows[-1] == "  a table   row"
    assert all(len(row) < 20 for row in rows)
