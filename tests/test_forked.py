"""A forked child leaves the parent's sessions, files and memory alone, and hangs at no lock."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from children import held, in_child

import edge
from edge import SamplingOptions
from edge.engine.engine import Engine
from edge.session.file import SessionFile
from edge.template.template import ChatTemplate

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

PROMPT = "Hello world and the other world"
BEFORE = "InputError: the model was loaded before a fork: load it in the child"


@pytest.fixture
def model(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Iterator[edge.Model]:
    with edge.load(tiny_gguf(context=512), threads=2, prefix_cache=tmp_path / "pages") as model:
        yield model


def endless(model: edge.Model) -> SamplingOptions:
    bias = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))
    return SamplingOptions(seed=11, logit_bias=bias)


@pytest.mark.parametrize("leave", ["session", "model", "both"])
def test_a_child_leaves_the_file_of_its_parent(
    model: edge.Model, tmp_path: Path, leave: str
) -> None:
    whole = model.session(sampling=endless(model))
    whole.generate(PROMPT, max_tokens=200)
    with model.session(sampling=endless(model)) as session:
        session.autosave(tmp_path / "s", 16)
        session.generate(PROMPT, max_tokens=90)
        before = (tmp_path / "s").read_bytes()
        calls = {"session": [session.close], "model": [model.close]}
        said = in_child(*calls.get(leave, [session.close, model.close]))
        assert set(said) == {"None"}
        assert (tmp_path / "s").read_bytes() == before
        session.generate("", max_tokens=60)
        assert session.tokens == whole.tokens[: len(session.tokens)]
    again = edge.resume(tmp_path / "s", model)
    assert isinstance(again, edge.Session) and again.tokens == session.tokens
    assert again.transcript.cache.length == len(again.tokens) - 1


def test_a_child_is_told_so(model: edge.Model, tmp_path: Path) -> None:
    session = model.session(sampling=endless(model))
    session.autosave(tmp_path / "s", 4)
    stream = session.stream(PROMPT, max_tokens=9)
    next(stream)
    calls: list[Callable[[], object]] = [
        lambda: next(stream), lambda: session.generate("x"), lambda: session.trim(1),
        lambda: session.save(tmp_path / "s"), lambda: session.save(tmp_path / "other"),
        session.keep, session.fork, lambda: model.session().generate("x"),
        lambda: model.chat().send("x"), lambda: model.engine.fingerprint,
    ]  # fmt: skip
    assert set(in_child(*calls)) == {BEFORE}
    assert in_child(lambda: len(model.tokenizer.encode("Hello")), stream.close) == ["1", "None"]
    assert stream.finish().finish_reason == "length" and not (tmp_path / "other").exists()
    session.close()


def test_a_fork_within_a_call(model: edge.Model, tmp_path: Path) -> None:
    """The child is in the middle of it, with the session's lock its own."""
    session, said = model.session(sampling=endless(model)), list[str]()
    run, cache = model.engine.run, session.transcript.cache
    session.autosave(tmp_path / "s", 1)

    def progress(done: int, total: int) -> None:
        if not said:
            said.extend(in_child(lambda: run(cache, [1]), model.close))

    session.generate(PROMPT * 9, max_tokens=3, progress=progress)
    assert said == [BEFORE, "None"]
    session.close()
    assert len(SessionFile.open(tmp_path / "s").contents.tokens) == len(session.tokens)


def test_locks_that_a_thread_had(model: edge.Model) -> None:
    session, engine = model.session(), model.engine
    assert isinstance(engine, Engine) and engine.pool.store is not None
    locks = [session._lock, model._lock, engine._lock, engine.pool.lock, engine.pool.store._lock]
    with held(*locks):
        said = in_child(
            lambda: session.generate("x"), session.close,
            session.transcript.cache.close, engine.pool.store.close, engine.close, model.close,
        )  # fmt: skip
    assert said == [BEFORE, *["None"] * 5]


def test_a_template_that_is_being_compiled() -> None:
    """It is of no process: a child may render."""
    template = ChatTemplate("{{ messages[0].content }}")
    with held(template._lock):
        said = in_child(lambda: template.render([{"role": "user", "content": "hello"}]))
    assert said == ["hello"]


def test_a_child_does_not_keep_the_lock_of_a_file(model: edge.Model, tmp_path: Path) -> None:
    session = model.session()
    session.autosave(tmp_path / "s")
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(target)
        os.read(source, 1)  # until the parent is done
        os._exit(0)
    try:
        os.write(target, b"")
        session.close()
        for _ in range(1000):  # the child may not have come to its first step
            try:
                SessionFile.open(tmp_path / "s", write=True).close()
                break
            except edge.SessionFileError:
                threading.Event().wait(0.02)
        else:
            pytest.fail("the file is locked")
    finally:
        os.close(target)
        os.close(source)
        os.waitpid(child, 0)
