"""A file that is deleted, moved, replaced or emptied while a session writes to it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_model import edge_run
from sessions import PROMPT, options, resumed, same_pages

import edge


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def overwritten(path: Path) -> None:
    """In place, as `cp` does."""
    data = (path.parent / "other").read_bytes()
    with open(path, "r+b") as file:
        file.write(data)


#: What others do to it.
DEEDS: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "moved": lambda path: path.rename(path.parent / "moved"),
    "replaced": lambda path: os.replace(path.parent / "other", path),
    "copied back": lambda path: (
        shutil.copy(path, path.parent / "copy"),
        os.replace(path.parent / "copy", path),
    ),
    "emptied": emptied,
    "overwritten": overwritten,
}


@pytest.mark.parametrize("deed", DEEDS)
def test_it_is_written_anew_and_said(
    model: edge.Model, whole: list[int], tmp_path: Path, deed: str
) -> None:
    path = tmp_path / "s"
    with model.session() as other:
        other.generate([1, 2, 3], max_tokens=3)
        other.save(tmp_path / "other")
    session = model.session(**options(model))
    session.autosave(path, 8)
    session.generate(PROMPT, max_tokens=100)
    DEEDS[deed](path)
    with pytest.warns(edge.EdgeWarning, match="deleted or changed by others: it was written anew"):
        session.generate("", max_tokens=20)
    again = resumed(path, model)
    assert again.tokens == session.tokens and same_pages(again, model)
    with pytest.raises(edge.SessionFileError, match="another session writes"):
        resumed(path, model, autosave=8)  # the lock went along
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.generate("", max_tokens=20)
        session.close()
    assert resumed(path, model).tokens == whole[: len(session.tokens)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_last_write_notices_too(model: edge.Model, tmp_path: Path) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s")
    (tmp_path / "s").unlink()
    with pytest.warns(edge.EdgeWarning, match="written anew"):
        session.close()
    assert resumed(tmp_path / "s", model).tokens == []


def test_what_is_not_ours_is_not_replaced(model: edge.Model, tmp_path: Path) -> None:
    """Another session's file that is in use, and a file of another kind, stay: an error."""
    session, other = (model.session(**options(model)) for _ in range(2))
    session.generate(PROMPT, max_tokens=2)
    session.autosave(tmp_path / "s", 8)
    other.autosave(tmp_path / "other", 8)
    os.replace(tmp_path / "other", tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(edge.SessionFileError, match="another session writes to this file"):
        session.generate("", max_tokens=20)
    assert (tmp_path / "s").read_bytes() == before
    session.generate("", max_tokens=5)  # without the file
    session.autosave(tmp_path / "third", 8)
    (tmp_path / "third").write_bytes(b"GGUF")  # in place, or it is another file
    with pytest.raises(edge.SessionFileError, match="it is not replaced"):
        session.save(tmp_path / "third")
    (tmp_path / "third").unlink()
    (tmp_path / "third").write_bytes(b"GGUF")
    for attempt in (lambda: session.save(tmp_path / "third"), lambda: session.generate("x")):
        with pytest.raises(edge.SessionFileError, match="it is not replaced"):
            attempt()
    assert (tmp_path / "third").read_bytes() == b"GGUF"
    with pytest.warns(edge.EdgeWarning):
        other.close()


def test_a_folder_that_is_gone(model: edge.Model, tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    session = model.session(**options(model))
    session.autosave(tmp_path / "f" / "s", 8)
    shutil.rmtree(tmp_path / "f")
    with pytest.raises(edge.SessionFileError, match="No such file"):
        session.generate(PROMPT, max_tokens=20)
    session.close()


def test_the_program_says_so(path: Path, tmp_path: Path) -> None:
    """On one line, and the conversation is kept."""
    code = (
        "from edge.session.journal import Journal\nimport os\nreal = Journal.cut\n"
        "def cut(journal, n):\n    os.unlink(journal.file.path)\n    real(journal, n)\n"
        "Journal.cut = cut"
    )
    args = ("chat", path, "-p", "Hello", "-n", "3", "-t", "1", "--session", tmp_path / "s")
    done = edge_run(*args, code=code)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert [line for line in lines if "written anew" in line] == [
        f"edge-run: warning: {tmp_path / 's'} was deleted or changed by others: it was written anew"
    ]
    assert (tmp_path / "s").exists()
