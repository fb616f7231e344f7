"""Sessions that survive: saved and resumed, the same tokens as without a break."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sessions import PROMPT, limited, options, resumed, same_pages, unshared

import edge
from edge.session import journal
from edge.session.file import SessionFile

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
    assert again.transcript.cache.length == session.transcript.cache.length
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
    got, had = resumed(tmp_path / "s", model).defaults, session.defaults
    assert got.sampling == sampling.settled() and got.progress is None
    assert (got.max_tokens, got.stop, got.logprobs) == (had.max_tokens, had.stop, had.logprobs)


def test_a_random_seed_is_in_the_file(model: edge.Model, tmp_path: Path) -> None:
    bias = dict.fromkeys(model.tokenizer.eos_ids, -float("inf"))
    sampling = edge.SamplingOptions(seed=None, temperature=2.0, top_k=0, logit_bias=bias)
    session = model.session(sampling=sampling)
    stream = session.stream(PROMPT, max_tokens=40)
    for _ in range(10):
        next(stream)
    session.save(tmp_path / "s")
    rest = stream.finish()
    done = resumed(tmp_path / "s", model).generate("", max_tokens=30)
    assert done.tokens == rest.tokens[10:] and done.seed == rest.seed is not None
    others = {session.stream("", max_tokens=1).request.sampling.seed for _ in range(5)}
    assert len(others) == 5 and rest.seed not in others  # each call has its own
    greedy = edge.SamplingOptions(temperature=0, seed=5)
    assert session.generate("", sampling=greedy, max_tokens=1).seed is None


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
            assert again.transcript.cache.length > len(again.tokens) - 64 - every
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
            seen.append(session.transcript.cache.length)

    session = model.session()
    session.autosave(tmp_path / "s")
    session.generate(prompt, max_tokens=2, progress=progress)
    assert seen == [0, 256, 512, 768]  # what a kill in the next chunk leaves
    session.close()


def test_a_clean_end_leaves_nothing_to_compute(model: edge.Model, tmp_path: Path) -> None:
    session = model.session(**options(model))
    session.autosave(tmp_path / "s")
    session.generate(PROMPT, max_tokens=100)
    length = session.transcript.cache.length
    session.close()
    size = (tmp_path / "s").stat().st_size
    again = resumed(tmp_path / "s", model, autosave=32)
    assert again.transcript.cache.length == length and same_pages(again, model)
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


# ---- a window that slides ----


@pytest.fixture(scope="module")
def sliding(path: Path) -> Iterator[edge.Model]:
    with edge.load(path, threads=1, context=300) as loaded:
        yield unshared(loaded)


def test_a_window_slides_on(sliding: edge.Model, tmp_path: Path) -> None:
    whole = sliding.session("slide", **options(sliding))
    whole.generate(PROMPT, max_tokens=700)
    session = sliding.session("slide", **options(sliding))
    session.autosave(tmp_path / "s", 16)
    for i, _ in enumerate(session.stream(PROMPT, max_tokens=600)):
        if i % 45 == 44:
            again = resumed(tmp_path / "s", sliding)
            n = len(again.tokens)
            assert n > len(session.tokens) - 17 and again.transcript.cache.length > n - 64 - 16
            again.generate("", max_tokens=20)
            assert again.tokens == whole.tokens[: n + 20]
            again.close()
    session.save(tmp_path / "saved")
    again = resumed(tmp_path / "saved", sliding)
    assert again.transcript.cache.length == session.transcript.cache.length
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
    assert again.transcript.cache.length == 64
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


# ---- a context that is full ----


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("autosave", [None, 8])
def test_a_session_that_filled_its_context(
    tiny_gguf: Any, tmp_path: Path, slides: bool, autosave: int | None
) -> None:
    """The last token was sampled and never run: it is one more than the context holds."""
    context, most = (256, 300) if slides else (96, 96)
    with edge.load(tiny_gguf(context=300), threads=1, context=context) as model:
        session = model.session("slide" if slides else "stop", **options(model))
        if autosave:
            session.autosave(tmp_path / "s", autosave)
        assert session.generate(PROMPT, max_tokens=500).finish_reason == "context"
        assert len(session.tokens) == most + 1
        if not autosave:
            session.save(tmp_path / "s")
        session.close()
        for _ in range(2):
            with resumed(tmp_path / "s", model, autosave=autosave) as again:
                assert again.tokens == session.tokens
                assert again.transcript.cache.length == most
                done = again.generate("")
                assert (done.tokens, done.finish_reason) == ((), "context")
                with pytest.raises(edge.ContextError, match=f"more than the .*{most}"):
                    again.generate("x")
        with resumed(tmp_path / "s", model) as again:
            again.trim(most - 10)
            again.generate("", max_tokens=11)
            assert again.tokens == session.tokens


@pytest.mark.parametrize("context", [64, 65, 96])
def test_a_full_session_in_a_smaller_context(
    model: edge.Model, whole: list[int], path: Path, tmp_path: Path, context: int
) -> None:
    """What was run of it may be one token too much: then that is not run any more."""
    session = model.session(**options(model))
    session.generate(whole[: context + 1], max_tokens=0)
    session.save(tmp_path / "s")
    with edge.load(path, threads=1, context=context) as small:
        again = resumed(tmp_path / "s", small)
        assert (len(again.tokens), again.transcript.cache.length) == (context + 1, context)
        assert again.generate("").finish_reason == "context"
        again.trim(context - 4)
        again.generate("", max_tokens=9)
        assert again.tokens == whole[: context + 1]
