"""Files with right checksums and strange contents: one typed error, or a session that works."""

from __future__ import annotations

import copy
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sessions import PROMPT, options

import edge
from edge.kv.shape import PAGE
from edge.session.contents import Contents, Kind, Part, Record
from edge.session.file import SessionFile
from edge.session.restore import _known

GONE = object()
STRANGE: list[Any] = [
    GONE, None, True, -1, 0, 7, 10**30, 10**400, 1e308, float("inf"), float("nan"), "", "x",
    "\ud800", "a\nb\x1b[31m" * 1000, [], [1], ["x"], [[]], [[1, 2, 3]], [["x", "y"]], [[1, "x"]],
    [{}], {}, {"x": 1},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value inside."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*at, key))


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


def write(path: Path, meta: Any, state: Any, tokens: list[int], pages: list[Part]) -> None:
    """A session file that says this."""
    parts = [Part(Kind.META, 0, 0, json.dumps(meta).encode())]
    parts += [Part(Kind.STATE, 0, 0, json.dumps(state).encode()), Part.tokens(0, tokens), *pages]
    SessionFile.create(path, parts).close()


def goes_on(path: Path, model: edge.Model, autosave: int | None) -> bool:
    """Resume and ask; False: it is a SessionFileError, of one line. What else may come is an
    EdgeError of the call, for options that no call can have.
    """
    try:
        found = edge.resume(path, model, autosave=autosave)
    except (edge.SessionFileError, edge.ContextError) as error:
        assert "\n" not in str(error) and len(str(error)) < 600, error
        return False
    with found:
        try:
            if isinstance(found, edge.Chat):
                _ = found.system
                found.send("Hello", max_tokens=2)
            else:
                found.generate("", max_tokens=2)
        except edge.EdgeError as error:
            assert not isinstance(error, edge.NativeError)
    return True


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def chat_file(model: edge.Model, tmp_path: Path) -> tuple[Any, Any, list[int]]:
    """What is in a file of a chat whose answer was cut off."""
    tools = [{"name": "f"}]
    given = options(model) | {"require_tools": False, "max_tokens": 3, "stop": ["#"]}
    with model.chat("S", tools, **given) as chat:
        chat.send("Hello")
        stream = chat.stream("Again", max_tokens=9)
        for _ in range(3):
            next(stream)
        chat.save(tmp_path / "kept")
    file = SessionFile.open(tmp_path / "kept")
    file.close()
    c = file.contents
    assert c.state["chat"]["asked"] and c.state["chat"]["answer_at"]
    return c.meta, c.state, c.tokens.tolist()


@pytest.mark.parametrize("autosave", [None, 8])
def test_strange_values(
    model: edge.Model, chat_file: Any, tmp_path: Path, autosave: int | None
) -> None:
    """Each value of each JSON, by strange ones in turn."""
    meta, state, tokens = chat_file
    path, n = tmp_path / "s", [0, 0]
    for which, kind in enumerate((meta, state)):
        for k, at in enumerate(places(kind)):
            step = 3 if autosave is None else 9
            for new in STRANGE[k % step :: step]:
                both = [meta, state]
                both[which] = changed(kind, at, new)
                write(path, *both, tokens, [])
                n[goes_on(path, model, autosave)] += 1
    assert min(n) > 20


def test_wholly_strange(model: edge.Model, chat_file: Any, tmp_path: Path) -> None:
    meta, state, tokens = chat_file
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    for both in ({}, state), (meta, {}), ({}, {}), (state, meta):
        write(tmp_path / "s", *both, tokens, [])
        assert not goes_on(tmp_path / "s", model, 8)
    write(tmp_path / "s", meta, state | {"more": deep}, tokens, [])
    goes_on(tmp_path / "s", model, 8)
    for ids in ([10**9], [-1], [model.engine.n_vocab]):
        write(tmp_path / "s", meta, state, ids, [])
        assert not goes_on(tmp_path / "s", model, None)


def test_pages_that_do_not_make_a_text(model: edge.Model, tmp_path: Path) -> None:
    """What is missing is computed anew, and a page that is full in part has none behind it."""
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=300)
    session.save(tmp_path / "kept")
    file = SessionFile.open(tmp_path / "kept")
    c, n_pages = file.contents, len(file.contents.pages)
    pages = [
        Part(Kind.PAGE, i, c.pages[i][1], bytes(p or b""))
        for i, p in enumerate(file.pages(n_pages))
    ]
    file.close()
    tokens = c.tokens.tolist()
    cases: list[tuple[list[Part], int]] = [
        (pages, len(tokens) - 1),
        (pages[1:], 0),
        ([*pages[:2], *pages[3:]], 2 * PAGE),
        ([*pages[:2], pages[2]._replace(b=10), *pages[3:]], 2 * PAGE + 10),
        (list(reversed(pages)), len(tokens) - 1),
        ([], 0),
    ]
    for parts, known in cases:
        write(tmp_path / "s", c.meta, c.state, tokens, parts)
        again = edge.resume(tmp_path / "s", model)
        assert isinstance(again, edge.Session)
        assert (again.tokens, again.transcript.cache.length) == (tokens, known)
        again.generate("", max_tokens=5)
        session.trim(len(tokens))
        session.generate("", max_tokens=5)
        assert again.tokens == session.tokens
        again.close()
    for data in (b"", bytes(100), pages[0].data + b"\0"):  # type: ignore[operator]
        write(tmp_path / "s", c.meta, c.state, tokens, [pages[0]._replace(data=data)])
        with pytest.raises(edge.SessionFileError, match=f"{len(data)} bytes, where"):
            edge.resume(tmp_path / "s", model)


def test_finding_pages_is_not_quadratic(model: edge.Model) -> None:
    n = 20_000
    contents = Contents(tokens=array("i", bytes(4 * n * PAGE)))
    contents.pages = {i: (Record(0, Kind.PAGE, i, PAGE, 0, 0, (0, 0), 0), PAGE) for i in range(n)}
    del contents.pages[n // 2]
    looked = 0

    class Cache:
        limit, n_groups = n * PAGE, 1

        def unseen(self, length: int) -> list[range]:
            nonlocal looked
            looked += 1
            return [range(0)]

    assert _known(Cache(), contents) == n // 2 * PAGE and looked <= n  # type: ignore[arg-type]
