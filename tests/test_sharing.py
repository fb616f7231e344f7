"""What sessions share, keep, and let go of: prompts computed once, forks, a window that slides."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import BOS, fake_model, ids, says

import edge
from edge import Model, SamplingOptions
from edge.errors import ContextError, InputError

GREEDY = SamplingOptions(temperature=0)
POSITIONS = 700
SYSTEM = "Answer in the words of the world and a hello. " * 8


@pytest.fixture
def model(tiny_gguf: Callable[..., Path]) -> Iterator[Model]:
    with edge.load(tiny_gguf(context=POSITIONS), context=256, threads=2) as model:
        yield model


def prompt(n: int, seed: int = 0) -> list[int]:
    return [(i * 7 + seed) % 250 for i in range(n)]


# ---- on a toy engine ----


def test_what_others_computed_is_not_computed_again():
    model, engine = fake_model()
    engine.shared += [BOS, *ids("abcdef")]
    done = model.session().generate("abcdxy", max_tokens=1)
    assert engine.runs == [ids("xy")] and done.usage.cached_tokens == 5
    engine.runs.clear()
    model.session().generate("abcdef", max_tokens=1)  # all but the last, which gives the logits
    assert engine.runs == [ids("f")]


def test_a_fork_goes_on_by_itself_with_the_same_options():
    model, _ = fake_model(says("hello"))
    session = model.session(max_tokens=2)
    assert session.generate("ab").text == "he"
    twin = session.fork()
    assert twin.generate("").text == "ll" == session.generate("").text
    twin.reset()
    assert session.tokens == [BOS, *ids("abhell")] and twin in model._sessions


def test_a_fork_of_a_stream_under_way():
    model, _ = fake_model(says("hello"))
    session = model.session()
    stream = session.stream("ab")
    next(stream)
    twin = session.fork()
    assert stream.finish().text == "hello" and twin.generate("").text == "ello"


@pytest.mark.parametrize(("n", "said"), [(-1, "n_tokens is -1"), (4, "holds 3 tokens")])
def test_keep_of_more_than_there_is(n, said):
    session = fake_model()[0].session()
    session.generate("a", max_tokens=1)
    with pytest.raises(InputError, match=said):
        session.keep(n)
    assert (session.keep(2), session.keep()) == (2, 2)  # the last token was not run


def test_sliding_goes_on_to_the_last_position():
    model, _ = fake_model(context=8)
    session = model.session(when_full="slide")
    done = session.generate("abcde")
    assert (done.finish_reason, len(session.tokens), session.n_context) == ("context", 100, 8)
    assert session.generate("").finish_reason == "context"
    with pytest.raises(ContextError, match="101 tokens are 2 more than the 99 positions") as e:
        session.stream("x")
    assert (e.value.needed, e.value.limit) == (101, 99)


def test_a_prompt_of_more_than_the_context_does_not_slide_by():
    session = fake_model(context=8)[0].session("slide")
    session.generate("abcde", max_tokens=10)
    with pytest.raises(ContextError, match="9 tokens are 1 more than a context of 8 takes at once"):
        session.generate("abcdefghi")
    session.generate("abcdefgh", max_tokens=1)
    reuse = [*session.tokens, *ids("abcdefgh")]
    session.generate(reuse, reuse=True, max_tokens=1)  # what it holds is not new
    with pytest.raises(ContextError, match="takes at once"):
        session.generate([1, *reuse], reuse=True)


# ---- on an engine ----


@pytest.mark.native
def test_a_prompt_that_sessions_share_is_computed_once(model: Model) -> None:
    first, second = model.session(sampling=GREEDY), model.session(sampling=GREEDY)
    one = first.generate(prompt(200), max_tokens=20)
    two = second.generate(prompt(200), max_tokens=20)
    assert (one.usage.cached_tokens, two.usage.cached_tokens) == (0, 192)
    assert one.tokens == two.tokens
    first.close()
    del second
    gc.collect()
    assert model.engine.pool.referenced == 0
    third = model.session().generate([*prompt(130), 9], max_tokens=1)
    assert third.usage.cached_tokens == 128


@pytest.mark.native
def test_the_same_answers_of_forks(model: Model) -> None:
    whole = model.session(sampling=GREEDY).generate(prompt(100), max_tokens=60).tokens
    session = model.session(sampling=GREEDY)
    session.generate(prompt(100), max_tokens=25)
    twin = session.fork()
    assert twin.generate("", max_tokens=35).tokens == whole[25:]
    assert session.generate("", max_tokens=35).tokens == whole[25:]
    session.trim(90)
    assert twin.tokens[90:] == [*prompt(100)[90:], *whole]


@pytest.mark.native
@pytest.mark.parametrize("cut", [0, 1, 40, 150, 300])
def test_sliding_sessions_go_on_as_if_nothing_had_been(model: Model, cut: int) -> None:
    bias = dict.fromkeys(model.tokenizer.eos_ids, -1e6)
    sampling = SamplingOptions(temperature=1, seed=3, logit_bias=bias)
    whole = model.session("slide", sampling=sampling).generate(prompt(90)).tokens
    assert len(whole) == POSITIONS - 90 + 1
    session = model.session("slide", sampling=sampling)
    done = session.generate(prompt(90), max_tokens=400)
    session.trim(490 - cut)
    rest = session.generate("")
    assert done.tokens == whole[:400] and rest.tokens == whole[400 - cut :]
    assert rest.finish_reason == "context"
    session.trim(100)
    assert session.generate("", max_tokens=5).tokens == whole[10:15]
    assert model.engine.pool.pages <= 8


@pytest.mark.native
def test_long_prompts_slide_in_the_memory_of_the_context(model: Model) -> None:
    session = model.session("slide", max_tokens=1)
    for seed in range(2):
        session.generate(prompt(250, seed))
        assert model.engine.pool.pages == model.engine.pool.planned == 4


@pytest.mark.native
def test_a_cancelled_prompt_in_a_sliding_session(model: Model) -> None:
    session = model.session("slide", sampling=GREEDY)
    session.generate(prompt(200), max_tokens=150)
    before = session.tokens

    def stop(done: int, total: int) -> None:
        if done:
            session.cancel()

    assert session.generate(prompt(200, 1), progress=stop).finish_reason == "cancelled"
    assert session.tokens == before
    twin = model.session("slide", sampling=GREEDY)
    twin.generate(prompt(200), max_tokens=150)
    assert session.generate("", max_tokens=9).tokens == twin.generate("", max_tokens=9).tokens


@pytest.mark.native
def test_chats_that_slide(model: Model) -> None:
    chat = model.chat(system="hello", when_full="slide", max_tokens=40, sampling=GREEDY)
    n = 0
    while n <= 400:
        chat.send("and the world " * 4)
        n = len(chat.session.tokens)
    assert chat.session.transcript.cache.length >= 400 and len(chat.messages) > 6


@pytest.mark.native
def test_a_chat_keeps_its_system_message_for_the_next_boot(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    answers, cached = [], []
    for question in ("hello", "the world", "hello"):
        options = {"context": 700, "prefix_cache": tmp_path}
        with edge.load(tiny_gguf(context=POSITIONS), **options) as model:
            chat = model.chat(system=SYSTEM, max_tokens=8, sampling=GREEDY)
            done = chat.send(question)
            answers.append(done.tokens)
            cached.append(done.usage.cached_tokens)
            text = f"<|im_start|>system\n{SYSTEM.strip()}<|im_end|>\n<|im_start|>"
            n_system = len(model.tokenizer.encode(text, special=True))
            assert chat.send("and").usage.cached_tokens > n_system
    n_pages = n_system // 64
    assert cached == [0, n_pages * 64, n_pages * 64] and n_pages >= 2
    assert answers[0] == answers[2]
    assert len(list(tmp_path.glob("*.page"))) == n_pages


@pytest.mark.native
def test_a_folder_that_cannot_be_is_refused_at_once(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="prompts cannot be kept there"):
        edge.load(tiny_gguf(), prefix_cache=tmp_path / "file")


@pytest.mark.native
def test_keeping_what_cannot_be_written_leaves_the_session(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    with edge.load(tiny_gguf(), prefix_cache=tmp_path / "folder") as model:
        session = model.session(sampling=GREEDY)
        first = session.generate(prompt(130), max_tokens=3)
        for path in (tmp_path / "folder").iterdir():
            path.unlink()
        (tmp_path / "folder").rmdir()
        with pytest.raises(InputError, match="cannot be kept"):
            session.keep()
        with edge.load(tiny_gguf()) as other, pytest.raises(InputError, match="prefix_cache"):
            other.session().keep()
        session.trim(130)
        assert session.generate("", max_tokens=3).tokens == first.tokens
