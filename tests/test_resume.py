"""Sessions that survive: saved, killed, torn, resumed; the same tokens as without a break."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed import PROMPT, options
from test_session_file import limited, seal

import edge
from edge import journal
from edge.session_file import Kind, Part, SessionFile

pytestmark = pytest.mark.native

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def path(tiny_gguf: Make) -> Path:
    return tiny_gguf(context=2048)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[edge.Model]:
    with edge.load(path, threads=1, context=2048) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(model: edge.Model) -> list[int]:
    """What a session without a break comes to."""
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=400)
    return session.tokens


def resumed(file: Path, model: edge.Model, **more: Any) -> edge.Session:
    session = edge.resume(file, model, **more)
    assert isinstance(session, edge.Session)
    return session


def same_pages(session: edge.Session, model: edge.Model) -> bool:
    """Whether what the cache holds gives the logits of a fresh one, bit for bit."""
    engine, tokens, known = model.engine, session.tokens, session._cache.length
    fresh = engine.cache(session._cache.when_full)
    while (i := fresh.length) < known:
        engine.run(fresh, tokens[i : min(known, i + fresh.room(engine.chunk))], logits="none")
    pair = [engine.run(cache, [5, 6, 7], logits="all") for cache in (fresh, session._cache)]
    session._cache.trim(known)
    fresh.close()
    return bool(np.array_equal(pair[0], pair[1]))


# ---- save ----


@pytest.mark.parametrize("n", [1, 20, 53, 54, 55, 56, 150])
def test_a_saved_session_goes_on_as_if_nothing_had_been(
    model: edge.Model, whole: list[int], tmp_path: Path, n: int
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=n)
    session.save(tmp_path / "s")
    again = resumed(tmp_path / "s", model)
    assert again.tokens == session.tokens == whole[: len(session.tokens)]
    assert again._cache.length == session._cache.length
    assert same_pages(again, model)
    done = again.generate("", max_tokens=20)
    assert again.tokens == whole[: len(session.tokens) + 20]
    assert done.usage.prompt_tokens - done.usage.cached_tokens == 1  # the last was not run before


def test_an_empty_session(model: edge.Model, tmp_path: Path) -> None:
    model.session(max_tokens=3, stop="x").save(tmp_path / "s")
    session = resumed(tmp_path / "s", model)
    assert session.tokens == [] and session.generate(PROMPT).usage.completion_tokens <= 3


def test_options_come_back(model: edge.Model, tmp_path: Path) -> None:
    sampling = edge.SamplingOptions(temperature=0.3, logit_bias={1: -float("inf"), 2: 0.5})
    session = model.session(max_tokens=7, stop=["a", "b"], logprobs=2, progress=print)
    session.generate([5, 6], sampling=sampling, max_tokens=1)
    session.save(tmp_path / "s")
    got, had = resumed(tmp_path / "s", model)._defaults, session._defaults
    assert got.sampling == sampling and got.progress is None
    assert (got.max_tokens, got.stop, got.logprobs) == (had.max_tokens, had.stop, had.logprobs)


def test_saving_in_the_middle_of_an_answer(
    model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    session = model.session(**options(model))
    stream = session.stream(PROMPT, max_tokens=100)
    for _ in range(70):
        next(stream)
    session.save(tmp_path / "s")
    assert resumed(tmp_path / "s", model).tokens == session.tokens
    stream.finish()
    assert session.tokens == whole[: len(session.tokens)]


def test_a_save_that_fails_leaves_file_and_session(
    model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=20)
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()
    session.generate("", max_tokens=20)
    with limited(2000), pytest.raises(edge.SessionFileError, match="cannot be written"):
        session.save(tmp_path / "s")
    with pytest.raises(edge.SessionFileError, match="No such file"):
        session.save(tmp_path / "none" / "s")
    assert (tmp_path / "s").read_bytes() == before and os.listdir(tmp_path) == ["s"]
    session.generate("", max_tokens=20)
    assert session.tokens == whole[: len(session.tokens)]
    session.close()


# ---- autosave ----


@pytest.mark.parametrize("every", [1, 5, 32, 1000])
def test_never_more_than_so_many_tokens_are_lost(
    model: edge.Model, whole: list[int], tmp_path: Path, every: int
) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s", every)
    for i, _ in enumerate(session.stream(PROMPT, max_tokens=150)):
        if i % 7 == 0:
            again = resumed(tmp_path / "s", model)
            assert again.tokens == whole[: len(again.tokens)]
            assert 0 <= len(session.tokens) - len(again.tokens) <= every
            assert again._cache.length > len(again.tokens) - 64 - every
            again.close()
    assert resumed(tmp_path / "s", model).tokens == session.tokens  # the end of a call counts
    session.close()


def test_a_long_prompt_is_saved_as_it_is_read(model: edge.Model, tmp_path: Path) -> None:
    prompt = random.Random(0).choices(range(256), k=1000)
    seen = list[int]()

    def progress(done: int, total: int) -> None:
        if done:
            session = resumed(tmp_path / "s", model)
            assert session.tokens == prompt
            seen.append(session._cache.length)

    session = model.session()
    session.autosave(tmp_path / "s")
    session.generate(prompt, max_tokens=2, progress=progress)
    assert seen == [0, 256, 512, 768]  # what a kill in the next chunk leaves
    session.close()


def test_a_clean_end_leaves_nothing_to_compute(model: edge.Model, tmp_path: Path) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s")
    session.generate(PROMPT, max_tokens=100)
    length = session._cache.length
    session.close()
    size = (tmp_path / "s").stat().st_size
    again = resumed(tmp_path / "s", model, autosave=32)
    assert again._cache.length == length and same_pages(again, model)
    again.close()
    assert (tmp_path / "s").stat().st_size == size  # nothing new, nothing written


def test_trims_and_branches_are_kept(model: edge.Model, tmp_path: Path) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s", 4)
    rng = random.Random(1)
    for _ in range(30):
        session.trim(rng.randrange(len(session.tokens) + 1))
        assert resumed(tmp_path / "s", model).tokens == session.tokens
        session.generate(rng.choices(range(256), k=rng.randrange(1, 90)), max_tokens=3)
        again = resumed(tmp_path / "s", model)
        assert again.tokens == session.tokens and same_pages(again, model)
        again.close()
        if rng.random() < 0.3:
            session.close()
            session = resumed(tmp_path / "s", model, autosave=4)
    session.reset()
    assert resumed(tmp_path / "s", model).tokens == []
    session.close()


def test_a_file_does_not_grow_for_ever(
    model: edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_LEAST_OBSOLETE", 10_000)
    session = model.session()
    session.autosave(tmp_path / "s", 8)
    for i in range(40):
        session.trim(min(len(session.tokens), 20))
        session.generate([i] * 150, max_tokens=1)
        assert (tmp_path / "s").stat().st_size < 3 * 150 * 300 + 10_000
        assert resumed(tmp_path / "s", model).tokens == session.tokens
    assert os.listdir(tmp_path) == ["s"]
    session.close()


def test_no_room_to_write_a_file_anew(
    model: edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_LEAST_OBSOLETE", 1)

    def full(*args: Any) -> None:
        raise edge.SessionFileError("full", path="s")

    session = model.session()
    session.autosave(tmp_path / "s", 8)
    monkeypatch.setattr(journal.SessionFile, "create", full)
    for i in range(10):
        session.trim(0)
        session.generate([i] * 100, max_tokens=1)
    assert resumed(tmp_path / "s", model).tokens == session.tokens
    session.close()


def test_a_full_disk_ends_the_file_not_the_session(
    model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s", 8)
    with limited(30_000), pytest.raises(edge.SessionFileError, match="cannot be written"):
        session.generate(PROMPT, max_tokens=300)
    n = len(session.tokens)
    again = resumed(tmp_path / "s", model)
    assert n - 8 <= len(again.tokens) <= n and again.tokens == whole[: len(again.tokens)]
    session.generate("", max_tokens=50)  # without the file
    assert session.tokens == whole[: n + 50]
    assert resumed(tmp_path / "s", model).tokens == again.tokens
    session.autosave(tmp_path / "s", 8)  # there is room again
    assert resumed(tmp_path / "s", model).tokens == session.tokens
    session.close()


def test_one_session_a_file(model: edge.Model, tmp_path: Path) -> None:
    session = model.session()
    session.autosave(tmp_path / "s")
    for attempt in (
        lambda: resumed(tmp_path / "s", model, autosave=32),
        lambda: model.session().autosave(tmp_path / "s"),
        lambda: model.session().save(tmp_path / "s"),
    ):
        with pytest.raises(edge.SessionFileError, match="another session writes to this file"):
            attempt()
    session.save(tmp_path / "s")  # its own
    session.autosave(tmp_path / "s", 16)
    session.autosave(tmp_path / "other")  # lets go of the first
    resumed(tmp_path / "s", model, autosave=32).close()
    session.close()
    resumed(tmp_path / "other", model, autosave=32).close()


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "8"])
def test_every_so_many_tokens(model: edge.Model, tmp_path: Path, every: Any) -> None:
    for attempt in (
        lambda: model.session().autosave(tmp_path / "s", every),
        lambda: edge.resume(tmp_path / "s", model, autosave=every),
    ):
        with pytest.raises(edge.InputError, match="whole number from 1"):
            attempt()


def test_a_model_closes_whatever_a_file_says(path: Path, tmp_path: Path) -> None:
    model = edge.load(path, threads=1)
    for name in ("a", "b"):
        session = model.session()
        session.autosave(tmp_path / name, 1000)
        next(session.stream([1, 2, 3]))
    with limited(100), pytest.raises(edge.SessionFileError):
        model.close()
    with pytest.raises(edge.InputError, match="closed"):
        model.engine.run(None, [1])  # type: ignore[arg-type]


# ---- damage ----


@pytest.fixture(scope="module")
def kept(model: edge.Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of some turns, trims and appends."""
    file = tmp_path_factory.mktemp("kept") / "s"
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=40)
    session.autosave(file, 16)
    session.generate("", max_tokens=150)
    data = file.read_bytes()
    session.close()
    return data


def check(file: Path, model: edge.Model, whole: list[int]) -> int | None:
    """Resume and go on as without a break; how many tokens there were. None: a typed error."""
    try:
        session = resumed(file, model)
    except edge.SessionFileError:
        return None
    n = len(session.tokens)
    assert session.tokens == whole[:n] and same_pages(session, model)
    session.generate("", max_tokens=3)
    assert session.tokens == whole[: n + 3]
    session.close()
    return n


def test_cut_anywhere(kept: bytes, model: edge.Model, whole: list[int], tmp_path: Path) -> None:
    rng, seen = random.Random(2), set()
    for n in [*rng.sample(range(len(kept)), 100), len(kept)]:
        (tmp_path / "s").write_bytes(kept[:n])
        seen.add(check(tmp_path / "s", model, whole))
    assert None in seen and len(seen) > 4


def test_bits_flipped_anywhere(
    kept: bytes, model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    rng, seen = random.Random(3), list[int | None]()
    for _ in range(100):
        data = bytearray(kept)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "s").write_bytes(data)
        seen.append(check(tmp_path / "s", model, whole))
    assert seen.count(None) > 60


def test_a_flip_in_a_saved_file_is_always_found(
    model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=130)
    session.save(tmp_path / "s")
    data, rng = bytearray((tmp_path / "s").read_bytes()), random.Random(4)
    for n in rng.sample(range(len(data)), 150):
        bit = 1 << rng.randrange(8)
        data[n] ^= bit
        (tmp_path / "s").write_bytes(data)
        assert check(tmp_path / "s", model, whole) is None, n
        data[n] ^= bit


def change(file: Path, **meta: Any) -> None:
    """Write a file anew with other facts in it."""
    old = SessionFile.open(file)
    c = old.contents
    parts = [Part.json(Kind.META, c.meta | meta), Part.json(Kind.STATE, c.state)]
    parts.append(Part.tokens(0, c.tokens.tolist()))
    n = len(c.pages)
    parts += [Part(Kind.PAGE, i, c.pages[i][1], bytes(p)) for i, p in enumerate(old.pages(n)) if p]
    old.close()
    SessionFile.create(file, parts).close()


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"fingerprint": "00", "model": "big.gguf"}, r"belongs to big\.gguf, the model here is"),
        ({"fingerprint": "00"}, "another state of"),
        ({"fingerprint": "00", "factors": "x"}, "load it with a context of 2048"),
        ({"kv": {"type": "q3"}}, "keys and values as q3, .* load it with --kv q3"),
        ({"kv": {"type": "f16", "n_layers": 9}}, "--kv f16"),
        ({"native_bf16": True}, "EDGE_NATIVE_BF16=1"),
        ({"defaults": {"reuse": 1, "nothing": 2}}, "does not hold what a session file holds"),
        ({"defaults": 5}, "does not hold what a session file holds"),
        ({"kv": None}, "does not hold what a session file holds"),
    ],
)
def test_another_model(model: edge.Model, tmp_path: Path, meta: dict[str, Any], match: str) -> None:
    session = model.session()
    session.generate([1, 2, 3], max_tokens=2)
    session.save(tmp_path / "s")
    change(tmp_path / "s")
    assert resumed(tmp_path / "s", model).tokens == session.tokens
    change(tmp_path / "s", **meta)
    with pytest.raises(edge.SessionFileError, match=match) as e:
        edge.resume(tmp_path / "s", model, autosave=8)
    assert str(tmp_path / "s") in str(e.value) and "\n" not in str(e.value)
    SessionFile.open(tmp_path / "s", write=True).close()  # its lock is free


def test_another_model_really(model: edge.Model, tiny_gguf: Make, tmp_path: Path) -> None:
    model.session().save(tmp_path / "s")
    with (
        edge.load(tiny_gguf(context=2048, seed=1), threads=1) as other,
        pytest.raises(edge.SessionFileError, match="belongs to"),
    ):
        edge.resume(tmp_path / "s", other)


def test_another_version(model: edge.Model, tmp_path: Path) -> None:
    model.session().save(tmp_path / "s")
    (tmp_path / "s").write_bytes(seal((tmp_path / "s").read_bytes(), version=7))
    with pytest.raises(edge.SessionFileError, match="version 7"):
        edge.resume(tmp_path / "s", model)


@pytest.mark.parametrize("autosave", [None, 16])
def test_pages_of_another_edge_are_computed_anew(
    model: edge.Model, whole: list[int], tmp_path: Path, autosave: int | None
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=150)
    session.save(tmp_path / "s")
    change(tmp_path / "s", edge="0.0.1")
    again = resumed(tmp_path / "s", model, autosave=autosave)
    assert (again.tokens, again._cache.length) == (session.tokens, 0)
    again.generate("", max_tokens=50)
    assert again.tokens == whole[: len(session.tokens) + 50]
    again.close()
    known = resumed(tmp_path / "s", model)._cache.length
    assert known == (0 if autosave is None else len(session.tokens) + 49)


def test_longrope_factors_are_part_of_a_session(tiny_gguf: Make, tmp_path: Path) -> None:
    phi = tiny_gguf("phi3", context=512, original_context=128)
    with edge.load(phi, threads=1, context=400) as long:
        session = long.session()
        session.generate([1, 2, 3], max_tokens=5)
        session.save(tmp_path / "s")
    with (
        edge.load(phi, threads=1, context=128) as short,
        pytest.raises(edge.SessionFileError, match=r"long.*128 chose .*short.*a context of 400"),
    ):
        edge.resume(tmp_path / "s", short)
    with edge.load(phi, threads=1, context=300) as same:
        assert resumed(tmp_path / "s", same).tokens == session.tokens


def test_a_context_that_is_too_small(model: edge.Model, path: Path, tmp_path: Path) -> None:
    session = model.session()
    session.generate([1] * 200, max_tokens=1)
    session.save(tmp_path / "s")
    with edge.load(path, threads=1, context=150) as small:
        match = r"201 tokens, 51 more than the context of 150: load it with a context of 2048"
        with pytest.raises(edge.ContextError, match=match) as e:
            edge.resume(tmp_path / "s", small)
        assert (e.value.needed, e.value.limit) == (201, 150)
    with edge.load(path, threads=1, context=201) as enough:
        assert resumed(tmp_path / "s", enough).generate("").finish_reason in ("context", "stop")


# ---- a window that slides ----


@pytest.fixture(scope="module")
def sliding(path: Path) -> Iterator[edge.Model]:
    with edge.load(path, threads=1, context=300) as loaded:
        yield loaded


def test_a_window_slides_on(sliding: edge.Model, tmp_path: Path) -> None:
    whole = sliding.session("slide", **options(sliding))
    whole.generate(PROMPT, max_tokens=700)
    session = sliding.session("slide", **options(sliding))
    session.autosave(tmp_path / "s", 16)
    for i, _ in enumerate(session.stream(PROMPT, max_tokens=600)):
        if i % 45 == 44:
            again = resumed(tmp_path / "s", sliding)
            n = len(again.tokens)
            assert n > len(session.tokens) - 17 and again._cache.length > n - 64 - 16
            again.generate("", max_tokens=20)
            assert again.tokens == whole.tokens[: n + 20]
            again.close()
    session.save(tmp_path / "saved")
    again = resumed(tmp_path / "saved", sliding)
    assert again._cache.length == session._cache.length
    pages = SessionFile.open(tmp_path / "saved").contents.pages
    assert len(pages) == 300 // 64  # what nobody sees again stays behind
    again.trim(500)
    session.trim(500)
    again.generate("", max_tokens=50)
    assert again.tokens == whole.tokens[:550]
    resumed(tmp_path / "s", sliding)


def test_a_trim_behind_the_window(sliding: edge.Model, tmp_path: Path) -> None:
    session = sliding.session("slide", **options(sliding))
    session.generate(PROMPT, max_tokens=500)
    session.autosave(tmp_path / "s", 16)
    session.trim(400)  # pages that it would see are gone
    again = resumed(tmp_path / "s", sliding)
    assert again._cache.length == 64
    done = [s.generate("", max_tokens=5).tokens for s in (session, again)]
    assert done[0] == done[1]
    session.close()


def test_a_window_of_another_width(sliding: edge.Model, model: edge.Model, tmp_path: Path) -> None:
    session = sliding.session("slide", **options(sliding))
    session.generate(PROMPT, max_tokens=100)
    session.save(tmp_path / "s")
    resumed(tmp_path / "s", model).close()  # it has not slid yet
    session.generate("", max_tokens=300)
    session.save(tmp_path / "s")
    with pytest.raises(edge.SessionFileError, match=r"slides in a context of 300.* context of 300"):
        edge.resume(tmp_path / "s", model)


def test_a_context_that_is_too_small_to_slide(
    sliding: edge.Model, path: Path, tmp_path: Path
) -> None:
    sliding.session("slide").save(tmp_path / "s")
    with (
        edge.load(path, threads=1, context=100) as small,
        pytest.raises(edge.InputError, match="100 tokens cannot slide"),
    ):
        edge.resume(tmp_path / "s", small)


def test_what_slid_away_leaves_the_file(
    sliding: edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_LEAST_OBSOLETE", 10_000)
    session = sliding.session("slide", **options(sliding))
    session.autosave(tmp_path / "s", 16)
    session.generate(PROMPT, max_tokens=1500)
    page_bytes = sliding.engine.kv.page_bytes
    assert (tmp_path / "s").stat().st_size < 12 * page_bytes  # of 24
    assert resumed(tmp_path / "s", sliding).tokens == session.tokens
    session.close()


# ---- chats ----


def test_a_chat_comes_back(model: edge.Model, tmp_path: Path) -> None:
    tools = [{"name": "clock", "parameters": {"zone": "str"}}]
    chat = model.chat("Be brief.", tools, max_tokens=12)
    chat.autosave(tmp_path / "s")
    chat.send("Hello")
    chat.send({"role": "user", "content": "again", "name": "me"})
    again = edge.resume(tmp_path / "s", model, autosave=None)
    assert isinstance(again, edge.Chat) and again.system == "Be brief."
    assert (again.messages, again.tools) == (chat.messages, tools)
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
    for question in ("Hello", "Again"):
        for i, _ in enumerate(chat.stream(question, max_tokens=30)):
            again = edge.resume(tmp_path / "s", model)  # as if killed here
            assert isinstance(again, edge.Chat)
            messages, n = chat.messages, len(chat.messages)
            assert again.messages[: n - 2] == messages[: n - 2]
            if i >= 4:
                assert again.messages[-2] == messages[-2]
                text = again.messages[-1]["content"].rstrip("\ufffd")
                assert text and messages[-1]["content"].startswith(text)
            again.close()
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


# ---- kill -9 ----


def kill_and_resume(path: Path, n_kills: int, tmp_path: Path, n_tokens: int) -> int:
    """Kill a process that goes on with a session again and again; how many tokens were lost."""
    rng, every, lost, before = random.Random(5), 8, 0, 0
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with edge.load(path, threads=1, context=2048) as model:
        session = model.session(**options(model))
        session.generate(PROMPT, max_tokens=n_tokens)
        whole, file = session.tokens, tmp_path / "0"
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env
        ) as parent:
            assert parent.stdin and parent.stdout
            for i in range(n_kills):
                print(file, every, n_tokens, file=parent.stdin, flush=True)
                child, said, moment = int(parent.stdout.readline()), 0, rng.randrange(-3, 30)
                if moment < 0:  # while it loads, resumes, saves for the first time
                    time.sleep(rng.random() * 0.1)
                    with suppress(ProcessLookupError):  # it was quick
                        os.kill(child, signal.SIGKILL)
                delay = rng.random() * 2e-3
                for k, line in enumerate(iter(parent.stdout.readline, "\n")):
                    said = int(line)
                    if k == moment:
                        time.sleep(delay)  # within the next token, or an append
                        os.kill(child, signal.SIGKILL)
                if not file.exists():
                    continue
                again = resumed(file, model)
                n = len(again.tokens)
                assert again.tokens == whole[:n] and n >= max(before, said - every), (i, n, said)
                lost += max(0, said - n)
                assert i % 10 or same_pages(again, model)
                again.generate("", max_tokens=4)
                assert again.tokens == whole[: n + 4]
                again.close()
                before = n
                if n > n_tokens - 60:
                    file, before = tmp_path / str(i + 1), 0
    return lost


def test_killed_at_200_random_moments(path: Path, tmp_path: Path) -> None:
    assert kill_and_resume(path, 200, tmp_path, 900) > 0


@pytest.mark.model
def test_a_real_model_killed_at_random_moments(smollm2: Path, tmp_path: Path) -> None:
    assert kill_and_resume(smollm2, 40, tmp_path, 300) > 0


# ---- edge-run chat --session ----


def test_the_program_keeps_a_conversation(path: Path, tmp_path: Path) -> None:
    from fake_model import assert_one_line, run

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


def test_the_program_tells_what_is_wrong_with_a_file(
    model: edge.Model, path: Path, tmp_path: Path
) -> None:
    from fake_model import assert_one_line, run

    model.session().save(tmp_path / "text")
    (tmp_path / "bad").write_bytes(b"EDGESESS")
    for name, match in [
        ("text", "holds a text, not a conversation"),
        ("bad", "damaged"),
        ("none/s", "cannot be written"),
    ]:
        done = run("chat", str(path), "-p", "x", "--session", str(tmp_path / name))
        assert_one_line(done.exit_code, done.stderr, match)
