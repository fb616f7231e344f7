"""Commands of a conversation, on a tiny model; and `chat` with one question."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, FakeSource, assert_one_line, run

import edge
from edge.cli import answer
from edge.cli import conversation as conversation_module
from edge.cli.conversation import Conversation, banner
from edge.cli.options import AnswerSettings
from edge.errors import ContextError, MemoryBudgetError

Tiny = Callable[..., Path]
SAMPLING = edge.SamplingOptions(seed=3, temperature=1.5)


class Script:
    """A keyboard that types these messages."""

    def __init__(self, *lines: str) -> None:
        self.lines = iter(lines)

    def read(self) -> str | None:
        return next(self.lines, None)


@pytest.fixture
def conversation(tiny_gguf: Tiny) -> Iterator[Conversation]:
    settings = AnswerSettings({}, None, 6, True, False, SAMPLING)
    options = {"stop": (), "logprobs": 0, "max_tokens": 6, "sampling": SAMPLING}
    with Conversation(str(tiny_gguf("llama")), settings, options) as conversation:
        conversation.begin(None, None)
        yield conversation


@pytest.fixture
def say(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Type some messages; what standard error says."""

    def say(*lines: str) -> str:
        conversation.run(Script(*lines))  # type: ignore[arg-type]
        return capsys.readouterr().err

    return say


def questions(conversation: Conversation) -> list[str]:
    return [m["content"] for m in conversation.chat.messages if m["role"] == "user"]


def test_undo_takes_back_the_last_question(
    conversation: Conversation, say: Callable[..., str]
) -> None:
    assert "no question" in say("/undo")
    assert say("one", "two", "/undo") == "taken back: 'two'\n"
    assert questions(conversation) == ["one"] and len(conversation.chat.messages) == 2
    assert say("/undo", "three") == "taken back: 'one'\n"
    assert questions(conversation) == ["three"]


def test_retry_answers_anew(conversation: Conversation, say: Callable[..., str]) -> None:
    assert "no question" in say("/retry")
    say("one", "two")
    first = conversation.chat.messages[-1]["content"]
    assert "the same answer" in say("/retry") and conversation.chat.messages[-1]["content"] == first
    assert say("/set seed 4", "/retry") == ""
    assert conversation.chat.messages[-1]["content"] != first
    assert questions(conversation) == ["one", "two"] and len(conversation.chat.messages) == 4
    assert say("/set seed -1", "/set seed").startswith("seed -1 ")
    answers = [say("/retry") or conversation.chat.messages[-1]["content"] for _ in range(2)]
    assert answers[0] != answers[1]


def test_retry_without_an_answer_keeps_the_one_there_was(
    conversation: Conversation, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ContextError("too long", needed=9, limit=8)

    say("one")
    before = list(conversation.chat.messages)
    with monkeypatch.context() as patched:
        patched.setattr(conversation_module, "stream", fails)
        assert say("/retry", "two") == "edge-run: too long\n" * 2
    assert conversation.chat.messages == before
    say("/retry")  # the last question got no answer: that one
    assert questions(conversation) == ["one", "two"]


def test_system(conversation: Conversation, say: Callable[..., str]) -> None:
    assert say("/system") == "there is no system message\n"
    assert say("one", '/system """be\nbrief"""', "/system") == "be\nbrief\n"
    assert [m["role"] for m in conversation.chat.messages] == ["system", "user", "assistant"]
    assert say("/system be kind", "two", "/reset", "/system") == "be kind\n"
    assert conversation.chat.messages == [{"role": "system", "content": "be kind"}]


def test_set_takes_what_the_flags_take(conversation: Conversation, say: Callable[..., str]) -> None:
    assert say("/set temperature 0.25", "/set top_k 7", "/set logit-bias 5=-inf 6=2") == ""
    wanted = {"temperature": 0.25, "top_k": 7, "logit_bias": {5: float("-inf"), 6: 2.0}}
    now = conversation.options["sampling"]
    assert {name: getattr(now, name) for name in wanted} == wanted and now.seed == 3
    shown = say("/set")
    for line in ("temperature 0.25 ", "top-k 7 ", "logit-bias 5=-inf 6=2.0 ", "min-p 0.05 "):
        assert f"\n{line}" in f"\n{shown}"
    assert say("/set top-k").startswith("top-k 7  ")
    for wrong, match in (
        ("temperature -1", "--temperature"),
        ("temperature hot", "'hot' is not a valid float"),
        ("temperature 1 2", "one value, not 2"),
        ("temprature 1", "Did you mean"),
        ("temprature", "No such option"),
        ("max-tokens 5", "No such option"),
        ("help x", "No such option"),
    ):
        message = say(f"/set {wrong}")
        assert_one_line(1, message, match)
    assert conversation.options["sampling"] == now


def test_tokens(conversation: Conversation, say: Callable[..., str]) -> None:
    assert say("/tokens") == "0 tokens, 0 messages; context 256 tokens, 256 left\n"
    counts = []
    for question, n in (("one", 2), ("two", 4)):
        match = re.fullmatch(
            rf"(\d+) tokens, {n} messages; .*, (\d+) left\n", say(question, "/tokens")
        )
        assert match and int(match[1]) + int(match[2]) == 256
        counts.append(int(match[1]))
    assert 0 < counts[0] < counts[1]
    say("/undo")
    assert say("/undo", "/tokens").endswith("0 tokens, 0 messages; context 256 tokens, 256 left\n")


def test_save_and_load(conversation: Conversation, say: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "a talk.session"
    assert say("one", f"/save {path}") == f"saved: {path}\n"
    messages = list(conversation.chat.messages)
    assert say("two", f"/load {path}") == "loaded: 2 messages\n"
    assert conversation.chat.messages == messages
    say("three")
    assert questions(conversation) == ["one", "three"] and len(messages) == 2
    for wrong in ("/save", "/load", f"/load {path}x", f"/save {tmp_path}/no/folder"):
        assert_one_line(1, say(wrong))
    assert questions(conversation) == ["one", "three"]
    say("four")
    assert questions(conversation) == ["one", "three", "four"]


def test_load_leaves_the_file_of_the_conversation(
    conversation: Conversation, say: Callable[..., str], tmp_path: Path
) -> None:
    mine, other = str(tmp_path / "mine"), str(tmp_path / "other")
    say("one", f"/save {other}")
    conversation.chat.autosave(mine)
    conversation.file = mine
    assert say("/save") == f"saved: {mine}\n"
    assert "the file of this conversation" in say(f"/load {mine}")
    assert_one_line(1, say(f"/load {tmp_path}"))
    say("two")  # still in its file
    assert f"{mine} has the conversation up to here" in say(f"/load {other}", "three")
    assert questions(conversation) == ["one", "three"] and conversation.file is None
    with edge.resume(mine, conversation.model) as chat:
        assert isinstance(chat, edge.Chat)
        assert [m["content"] for m in chat.messages[::2]] == ["one", "two"]


def test_the_file_follows_at_once(
    conversation: Conversation, say: Callable[..., str], tmp_path: Path
) -> None:
    conversation.chat.autosave(tmp_path / "mine")
    say("one", "two", "/undo", "/system brief")
    shutil.copy(tmp_path / "mine", tmp_path / "copy")  # as if the power were cut now
    with edge.resume(tmp_path / "copy", conversation.model) as chat:
        assert isinstance(chat, edge.Chat) and chat.messages == conversation.chat.messages
        assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
        chat.reset()
        assert chat.system == "brief"


def test_model_keeps_the_messages(
    conversation: Conversation, say: Callable[..., str], tiny_gguf: Tiny, tmp_path: Path
) -> None:
    old, other = conversation.model.engine.path, str(tiny_gguf("phi3"))
    say("/system brief", "one")
    assert say("/model") == f"{banner(conversation.model)}\n"
    assert "tiny phi3: " in say(f"/model {other}", "two")
    assert conversation.model.engine.path == other and questions(conversation) == ["one", "two"]
    assert conversation.chat.system == "brief"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(Path(old).read_bytes()[:5000])
    for wrong in (bad, tmp_path, tmp_path / "none"):
        assert_one_line(1, say(f"/model {wrong}"))
    say("three")
    assert conversation.model.engine.path == other
    assert questions(conversation) == ["one", "two", "three"]


def test_a_model_that_does_not_come_back(
    conversation: Conversation,
    say: Callable[..., str],
    tiny_gguf: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = conversation.model.engine.path

    def refuses(*_: Any, **__: Any) -> None:
        raise MemoryBudgetError("too much", needed=2, budget=1)

    say("one")
    with monkeypatch.context() as patched:
        patched.setattr(conversation_module, "open_model", refuses)
        assert_one_line(1, say(f"/model {path}"), "too much")
        for typed in ("two", "/undo", "/tokens", "/save x", "/load x", "/retry", "/model"):
            assert_one_line(1, say(typed))
    assert "tiny llama" in say(f"/model {path}", "two")
    assert questions(conversation) == ["one", "two"]


def test_ctrl_c_while_another_model_is_loaded(
    conversation: Conversation,
    say: Callable[..., str],
    tiny_gguf: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, other, real = conversation.model.engine.path, str(tiny_gguf("phi3")), answer.open_model

    def load(path: str | None, **options: Any) -> Any:
        if path == other:
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(conversation_module, "open_model", load)
    say("one")
    assert_one_line(1, say(f"/model {other}"), "stopped: the conversation is as it was")
    say("two")
    assert conversation.model.engine.path == path and questions(conversation) == ["one", "two"]


def test_an_error_of_ours_keeps_the_conversation(
    conversation: Conversation, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Conversation, "_ask", lambda *_: 1 / 0)
    monkeypatch.setattr(edge.Chat, "undo", lambda _: {}["x"])
    said = say("one", "/undo", "/nothing", "/tokens")
    assert said.count("a bug of ours") == 2 and "/nothing is not known" in said
    assert said.endswith("256 left\n")


def test_other_names(conversation: Conversation, say: Callable[..., str]) -> None:
    shown = say("/?")
    names = "help system set retry undo tokens save load model reset quit"
    assert all(f"\n/{name} " in f"\n{shown}" for name in names.split())
    say("one", "/regen", "/clear", "/tokens")
    assert conversation.chat.messages == []
    assert say("/exit", "/nothing") == ""


def test_banner() -> None:
    said = "Fake: m.gguf, 3.8B parameters, Q4_0, 5 MiB, context 4,096 tokens"
    assert banner(FakeModel()) == said  # type: ignore[arg-type]


# ---- chat with one question ----


def test_one_question_takes_what_complete_takes(loaded: list[FakeModel], tmp_path: Path) -> None:
    (tmp_path / "q").write_text("Why ü?\n", encoding="utf-8")
    args = (
        "--file",
        str(tmp_path / "q"),
        "--json",
        "--logprobs",
        "2",
        "--stop",
        "a",
        "--stop",
        "b",
    )
    result = run("chat", *args)
    answer = json.loads(result.stdout)
    assert answer["text"] == "One two drei ü" and answer["finish_reason"] == "stop"
    assert answer["logprobs"][1]["top"][1] == {"token": 9, "text": "<9>", "logprob": -2.0}
    question, options = loaded[0].sources[0].asked[0]
    assert question == "Why ü?"
    assert (options["logprobs"], options["stop"]) == (2, ("a", "b"))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["-p", "x", "--logprobs", "2"], "--logprobs needs --json"),
        (["-p", "x", "-f", "FILE"], "one of --prompt TEXT and --file FILE"),
    ],
)
def test_one_question_refuses(loaded: list[FakeModel], args: list[str], match: str) -> None:
    result = run("chat", *args)
    assert (result.exit_code, loaded) == (2, []) and match in result.stderr


def test_a_conversation_is_no_json(
    loaded: list[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.cli.chat._question", lambda *_: None)  # a terminal
    result = run("chat", "--json")
    assert (result.exit_code, loaded) == (2, []) and "--json wants a question" in result.stderr


def test_the_text_alone_is_in_the_file_of_a_pipe(loaded: list[FakeModel]) -> None:
    words = ("Words that ", "go beyond the edge of a terminal, " * 9)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FakeSource, "words", words)
        assert run("chat", "-q", "-p", "x").stdout == "".join(words) + "\n"
