"""Conversations that survive, and `edge-run chat --session`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fake_model import assert_one_line, run
from sessions import options

import edge
from edge.session.file import SessionFile


def test_a_chat_comes_back(model: edge.Model, tmp_path: Path) -> None:
    tools = [{"name": "clock", "parameters": {"zone": "str"}}]
    variables = {"enable_thinking": False}
    about = {"require_tools": False, "variables": variables}
    chat = model.chat("Be brief.", tools, **about, max_tokens=12)
    chat.autosave(tmp_path / "s")
    chat.send("Hello")
    chat.send({"role": "user", "content": "again", "name": "me"})
    again = edge.resume(tmp_path / "s", model, autosave=None)
    assert isinstance(again, edge.Chat) and again.system == "Be brief."
    assert (again.messages, again.tools) == (chat.messages, tools)
    assert again.session.defaults.variables == variables
    assert again.session.tokens == chat.session.tokens
    one, two = chat.send("And now?"), again.send("And now?")
    assert one.tokens == two.tokens and two.usage.cached_tokens >= 64
    again.reset()
    assert again.messages == [{"role": "system", "content": "Be brief."}]


def test_a_chat_is_reset_in_its_file_too(model: edge.Model, tmp_path: Path) -> None:
    chat = model.chat(max_tokens=5)
    chat.autosave(tmp_path / "s")
    chat.send("Hello")
    chat.reset()
    again = edge.resume(tmp_path / "s", model)
    assert isinstance(again, edge.Chat)
    assert (again.messages, again.session.tokens) == ([], [])


def test_an_answer_that_was_cut_off_is_kept_as_far_as_it_came(
    model: edge.Model, tmp_path: Path
) -> None:
    chat = model.chat("Be brief.", **options(model))
    chat.autosave(tmp_path / "s", 4)
    seen = []
    for question in ("Hello", "Again"):
        for i, _ in enumerate(chat.stream(question, max_tokens=30)):
            again = edge.resume(tmp_path / "s", model)  # as if killed here
            assert isinstance(again, edge.Chat)
            messages, n = chat.messages, len(chat.messages)
            assert again.messages[: n - 2] == messages[: n - 2]
            if i >= 4:
                assert again.messages[-2] == messages[-2]
                text = again.messages[-1]["content"].rstrip("\ufffd")
                assert messages[-1]["content"].startswith(text)
                seen.append(text)
            again.close()
    assert any(seen)
    chat.close()


def test_stop_strings_stay_out_of_a_cut_off_answer(model: edge.Model, tmp_path: Path) -> None:
    chat = model.chat(**options(model))
    text = chat.send("Hello", max_tokens=30).text
    chat.reset()
    stream = chat.stream("Hello", max_tokens=30, stop=text[6:9])
    chat.autosave(tmp_path / "s", 1)
    for _ in stream:
        pass
    again = edge.resume(tmp_path / "s", model)
    assert isinstance(again, edge.Chat)
    assert again.messages[-1]["content"] == chat.messages[-1]["content"] == stream.text


def test_a_question_without_an_answer_leaves_no_trace(model: edge.Model, tmp_path: Path) -> None:
    chat = model.chat(**options(model))
    chat.send("Hello", max_tokens=60)
    chat.messages[:] = chat.messages[:1]  # shorter than what the session still holds
    chat.stream("x", max_tokens=3)
    chat.save(tmp_path / "s")
    again = edge.resume(tmp_path / "s", model)
    assert isinstance(again, edge.Chat) and again.messages == chat.messages


def test_messages_that_json_cannot_hold(model: edge.Model, tmp_path: Path) -> None:
    chat = model.chat()
    chat.messages.append({"role": "user", "content": b"bytes"})
    with pytest.raises(edge.InputError, match="cannot be saved"):
        chat.save(tmp_path / "s")
    assert os.listdir(tmp_path) == []


# ---- edge-run chat --session ----


def test_the_program_keeps_a_conversation(path: Path, tmp_path: Path) -> None:
    def ask(*args: str) -> Any:
        more = ("-n", "5", "--session", str(tmp_path / "s"))
        return run("chat", str(path), "-t", "1", "-p", *args, *more)

    first = ask("Hello", "-s", "Be brief.")
    second = ask("Again")
    assert (first.exit_code, second.exit_code) == (0, 0), first.stderr + second.stderr
    assert "resumed" not in first.stderr and "resumed: " in second.stderr
    file = SessionFile.open(tmp_path / "s")
    asked = [m["content"] for m in file.contents.state["chat"]["messages"][:4:2]]
    file.close()
    assert asked == ["Be brief.", first.stdout[:-1]] and json.dumps(asked)
    other = ask("Again", "-s", "Be long.")
    assert_one_line(other.exit_code, other.stderr, "another system message, 'Be brief.'")
    assert "resumed" not in ask("x", "-q").stderr
    assert ask("x", "--when-full", "stop").exit_code == 0
    other = ask("x", "--when-full", "slide")
    assert_one_line(other.exit_code, other.stderr, "begun with --when-full stop")


def test_the_program_tells_what_is_wrong_with_a_file(
    model: edge.Model, path: Path, tmp_path: Path
) -> None:
    model.session().save(tmp_path / "text")
    (tmp_path / "bad").write_bytes(b"EDGESESS")
    for name, match in [
        ("text", "holds a text, not a conversation"),
        ("bad", "damaged"),
        ("none/s", "cannot be written"),
    ]:
        done = run("chat", str(path), "-p", "x", "--session", str(tmp_path / name))
        assert_one_line(done.exit_code, done.stderr, match)


@pytest.mark.parametrize("slides", [False, True])
def test_the_program_with_a_context_that_is_full(
    tiny_gguf: Any, tmp_path: Path, slides: bool
) -> None:
    more = ("--when-full", "slide", "--context", "256") if slides else ("--context", "96")
    model = str(tiny_gguf(context=300))

    def ask() -> Any:
        return run(
            *("chat", model, "-t", "1", "-p", "Hello", "-n", "500", "--seed", "2"),
            *("--session", str(tmp_path / "s"), *more),
        )

    first, second = ask(), ask()
    why = "are used up" if slides else "is full"
    assert (first.exit_code, why in first.stderr) == (0, True), first.stderr
    file = SessionFile.open(tmp_path / "s")
    assert len(file.contents.tokens) == (301 if slides else 97)
    file.close()
    assert second.exit_code == 1 and "Traceback" not in second.stderr
    said = "edge-run: .* more than the .*(300 positions|context of 96)"
    assert re.match(said, second.stderr.splitlines()[-1])
