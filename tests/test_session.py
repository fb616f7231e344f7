"""Sessions on a toy engine: what comes out, and what is left behind whatever happens."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import pytest
from fakes import BOS, END, FakeTokenizer, cancel_at, fake_model, ids, says
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import ContextError, InputError, ModelFileError
from edge.session.sampler import SamplingOptions
from edge.session.session import Session
from edge.session.stops import StopFilter

GREEDY = SamplingOptions(temperature=0)


def consistent(session: Session) -> bool:
    """The cache holds the first of the session's tokens, all or all but the last."""
    held = session.transcript.cache.tokens
    return held == session.tokens[: len(held)] and len(session.tokens) - len(held) in (0, 1)


# ---- text ----


def test_answer_streams_until_the_end_token():
    model, _ = fake_model(says("hello"))
    session = model.session()
    stream = session.stream("ab")
    assert [(p.text, p.token) for p in stream] == [(c, ord(c)) for c in "hello"]
    assert stream.finish_reason == "stop"
    assert session.tokens == [BOS, *ids("abhello"), END]
    assert consistent(session)


def test_generate_returns_the_whole():
    model, _ = fake_model(says("hello"))
    done = model.session().generate("ab")
    assert (done.text, done.tokens, done.finish_reason) == ("hello", tuple(b"hello"), "stop")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 5)
    assert done.usage.decode_steps == 5 and done.usage.decode_tokens_per_second > 0


def test_characters_come_whole():
    model, _ = fake_model(says("a\u20ac\U0001f600z"))
    pieces = [p.text for p in model.session().stream("ab")]
    assert pieces == ["a", "", "", "\u20ac", "", "", "", "\U0001f600", "z"]


def test_half_a_character_at_the_end_is_replaced():
    model, _ = fake_model(says("\u20ac"))
    pieces = list(model.session().stream("ab", max_tokens=2))
    assert [(p.text, p.token is None) for p in pieces] == [
        ("", False),
        ("", False),
        ("\ufffd", True),
    ]


@pytest.mark.parametrize("stop", ["END", ["zz", "END"], ("ENDLESS", "END"), "END!"])
def test_stop_string_spans_tokens_and_stays_out(stop):
    model, _ = fake_model(says("one ENEND! two"))
    done = model.session().generate("ab", stop=stop)
    assert (done.text, done.finish_reason) == ("one EN", "stop")


def test_half_a_stop_string_comes_out_at_the_end():
    model, _ = fake_model(says("wait EN"))
    pieces = [p.text for p in model.session().stream("ab", stop="END")]
    assert pieces == ["w", "a", "i", "t", " ", "", "", "EN"]


@given(
    st.lists(st.tuples(st.text("abc", max_size=4), st.booleans()), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_filter_equals_a_search_of_the_whole_text(pieces, stops):
    whole = "".join(text for text, _ in pieces)
    shown = "".join(text if not hidden else "\0" * len(text) for text, hidden in pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole]
    filter_ = StopFilter(stops)
    out = "".join(filter_.push(text, hidden=hidden) for text, hidden in pieces) + filter_.flush()
    assert out == (shown[: min(ends)[1]] if ends else shown).replace("\0", "")
    assert filter_.stopped == bool(ends)


@pytest.mark.parametrize("stop", ["<user>", "<user>t", "e<user>", "<user", "user>two", "wo"])
def test_stop_strings_are_looked_for_in_hidden_tokens(stop):
    model, _ = fake_model(says("one<user>two"))
    done = model.session().generate("ab", stop=stop)
    assert done.text == {"e<user>": "on", "wo": "onet"}.get(stop, "one")
    assert done.finish_reason == "stop"


def test_max_tokens_and_going_on_is_the_same_as_not_stopping():
    model, _ = fake_model()
    whole = model.session(max_tokens=9).generate("ab")
    session = model.session()
    parts = [session.generate("ab", max_tokens=4), session.generate("", max_tokens=5)]
    assert [part.finish_reason for part in parts] == ["length", "length"]
    assert "".join(part.text for part in parts) == whole.text


def test_no_tokens_wanted_reads_the_prompt_only():
    model, engine = fake_model(says("hello"))
    session = model.session()
    assert session.generate("ab", max_tokens=0).finish_reason == "length"
    assert session.transcript.cache.length == 3
    assert session.generate("").text == "hello"
    assert engine.runs[1] == [ord("b")]  # the last token once more


def test_context_full_ends_the_answer():
    model, _ = fake_model(context=8)
    session = model.session()
    done = session.generate("abcde")
    assert (done.finish_reason, len(done.tokens)) == ("context", 3)
    done = session.generate("")  # nothing more can come: that is no mistake
    assert (done.text, done.finish_reason, done.usage.prompt_tokens) == ("", "context", 9)
    with pytest.raises(ContextError, match="10 tokens are 2 more than the context of 8"):
        session.stream("x")


@pytest.mark.parametrize(("n", "fits"), [(63, True), (64, False)])
def test_prompt_longer_than_the_context_says_by_how_much(n, fits):
    model, _ = fake_model()
    session = model.session()
    if fits:
        assert len(session.generate("x" * n).tokens) == 1
    else:
        with pytest.raises(ContextError, match="65 tokens are 1 more") as e:
            session.generate("x" * n)
        assert (e.value.needed, e.value.limit, session.tokens) == (65, 64, [])


def test_empty_prompt_needs_a_beginning():
    model, _ = fake_model()
    assert model.session().generate("", max_tokens=1).usage.prompt_tokens == 1  # <s>
    model._tokenizer = FakeTokenizer(add_bos=False)
    with pytest.raises(InputError, match="empty"):
        model.session().generate("")
    with pytest.raises(InputError, match="empty"):
        model.session().generate([])


@pytest.mark.parametrize("prompt", [[1, 260], [-1], ["a"], [1.5], None, "\ud800"])
def test_prompts_that_cannot_be_are_refused(prompt):
    with pytest.raises(InputError):
        fake_model()[0].session().stream(prompt)


def test_control_tokens_only_where_allowed():
    model, engine = fake_model()
    model.session().generate("<end>", max_tokens=0)
    assert engine.runs == [[BOS, *ids("<en")], ids("d>")]
    model.session(special=True).generate("<end>", max_tokens=0)
    assert engine.runs[2:] == [[BOS, END]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"max_tokens": 1.5},
        {"logprobs": -1},
        {"logprobs": True},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"sampling": 0.7},
        {"progress": 3},
        {"tempreature": 1},
    ],
)
def test_bad_options_are_refused_at_the_call(options):
    session = fake_model()[0].session()
    with pytest.raises(InputError):
        session.stream("ab", **options)


def test_logprobs_are_the_models_own():
    model, engine = fake_model()
    pieces = list(model.session().stream("ab", max_tokens=3, logprobs=2))
    logits = engine.logits([BOS, *ids("ab")])[0].astype(np.float64)
    want = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert pieces[0].logprob == pytest.approx(want[pieces[0].token], abs=1e-5)
    assert [t.token for t in pieces[0].top] == np.argsort(-want)[:2].tolist()
    assert fake_model()[0].session().generate("ab", max_tokens=1).logprobs == ()


# ---- prompts in chunks ----


def test_prompt_goes_in_chunks_with_progress():
    model, engine = fake_model()
    seen = []
    model.session().generate("abcdefgh", max_tokens=0, progress=lambda *p: seen.append(p))
    assert [len(run) for run in engine.runs] == [4, 4, 1]
    assert seen == [(0, 9), (4, 9), (8, 9), (9, 9)]


def test_reuse_keeps_the_common_start():
    model, engine = fake_model()
    session = model.session()
    session.generate("abcdef", max_tokens=0)
    engine.runs.clear()
    done = session.generate([BOS, *ids("abcxy")], reuse=True, max_tokens=1)
    assert engine.runs == [ids("xy")]
    assert (done.usage.prompt_tokens, done.usage.cached_tokens) == (6, 4)
    fresh = model.session().generate("abcxy", max_tokens=1)
    assert fresh.text == done.text


def test_reuse_of_the_very_same_prompt_runs_one_token():
    model, engine = fake_model()
    session = model.session(reuse=True)
    first = session.generate("abcdef", max_tokens=5)
    engine.runs.clear()
    assert session.generate("abcdef", max_tokens=5).text == first.text
    assert engine.runs[0] == ids("f")


def test_trim_and_reset_keep_prefix():
    model, _ = fake_model()
    session = model.session()
    session.generate("abcdef", max_tokens=3)
    session.trim(3)
    assert session.tokens == [BOS, *ids("ab")] and consistent(session)
    assert (
        session.generate("", max_tokens=4).text == model.session().generate("ab", max_tokens=4).text
    )
    session.reset()
    assert session.tokens == session.transcript.cache.tokens == []
    with pytest.raises(InputError, match="cannot keep 1"):
        session.trim(1)


# ---- cancel, leave, fail ----


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("n_run", [1, 2, 3])
def test_cancel_in_the_prompt_takes_it_back(n_run, reuse):
    model, engine = fake_model()
    session = model.session()
    session.generate("a", max_tokens=1)
    before = session.tokens
    cancel_at(engine, session, n_run)
    prompt = before + ids("bcdefghij") if reuse else "bcdefghij"
    done = session.generate(prompt, reuse=reuse)
    assert (done.text, done.finish_reason) == ("", "cancelled")
    assert consistent(session)
    assert session.tokens[:3] == before and (reuse or len(session.tokens) == 3)
    engine.on_run = lambda: None
    again = session.generate(prompt, reuse=reuse, max_tokens=5)
    assert again.text == model.session().generate([*before, *ids("bcdefghij")], max_tokens=5).text


def test_cancel_in_the_answer_keeps_what_came():
    model, engine = fake_model(says("hello world"))
    session = model.session()
    cancel_at(engine, session, 4)  # one for the prompt
    done = session.generate("ab", stop="lox")
    assert (done.text, done.finish_reason) == ("hel", "cancelled")
    assert session.tokens == [BOS, *ids("abhel")] and consistent(session)
    engine.on_run = lambda: None
    assert session.generate("").text == "lo world"


def test_cancel_between_pieces_and_before_the_first():
    model, _ = fake_model(says("hello"))
    session = model.session()
    stream = session.stream("ab")
    assert next(stream).text == "h"
    session.cancel()
    assert list(stream) == [] and stream.finish_reason == "cancelled"
    stream = session.stream("x")
    session.cancel()
    assert list(stream) == [] and session.tokens == [BOS, *ids("abh")]
    session.cancel()  # nothing to cancel: no effect on the next call
    assert session.generate("").finish_reason == "stop"


def test_cancel_from_another_thread():
    model, engine = fake_model(lambda tokens: 65, context=100_000)
    engine.seconds = 0.001
    session = model.session()
    timer = threading.Timer(0.05, session.cancel)
    timer.start()
    done = session.generate("ab", sampling=GREEDY)
    timer.join()
    assert done.finish_reason == "cancelled" and set(done.text) == {"A"}
    assert consistent(session)


def test_leaving_a_stream_early_leaves_the_session_usable():
    model, _ = fake_model(says("hello"))
    session = model.session()
    for piece in session.stream("ab"):
        if piece.text == "e":
            break
    assert session.tokens == [BOS, *ids("abhe")] and consistent(session)
    assert session.generate("").text == "llo"


def test_a_closed_stream_is_cancelled():
    session = fake_model(says("hello"))[0].session()
    with session.stream("ab") as stream:
        next(stream)
    assert stream.finish_reason == "cancelled" and stream.text == "h" and list(stream) == []


def test_an_overtaken_stream_refuses_to_go_on():
    session = fake_model(says("hello"))[0].session()
    old = session.stream("ab")
    next(old)
    session.generate("", max_tokens=1)
    with pytest.raises(InputError, match="taken over"):
        next(old)
    assert session.tokens == [BOS, *ids("abhe")]


@pytest.mark.parametrize(
    "error", [ModelFileError("NaN", path="m"), KeyboardInterrupt(), ValueError()]
)
@pytest.mark.parametrize("n_run", [1, 2, 4])
def test_errors_leave_the_session_consistent(error, n_run):
    model, engine = fake_model(says("hello"))
    session = model.session()
    calls = iter(range(n_run))

    def fail() -> None:
        if next(calls, None) == n_run - 1:
            raise error

    engine.on_run = fail
    stream = session.stream("ab")
    with pytest.raises(type(error)):
        list(stream)
    assert stream.finish_reason is None and consistent(session)
    assert session.tokens == ([BOS, *ids("abhello")][: 2 + n_run] if n_run > 1 else [])
    assert session.generate("" if n_run > 1 else "ab").text == "hello"[max(n_run - 1, 0) :]


def test_a_failing_progress_takes_the_prompt_back():
    session = fake_model()[0].session()
    with pytest.raises(ZeroDivisionError):
        session.generate("abcdefgh", progress=lambda done, total: 1 // (4 - done))
    assert session.tokens == session.transcript.cache.tokens == []


# ---- threads ----


def test_two_sessions_in_two_threads_do_not_mix():
    model, _ = fake_model()
    want = [model.session().generate(p, max_tokens=20).text for p in "ab"]
    got = ["", ""]

    def run(i: int) -> None:
        got[i] = model.session().generate("ab"[i], max_tokens=20).text

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_one_session_in_two_threads_is_refused():
    model, engine = fake_model(says("hello"))
    session = model.session()
    errors: list[Exception] = []

    def other() -> None:
        for call in (lambda: session.generate("x"), session.reset, lambda: next(stream)):
            try:
                call()
            except InputError as e:
                errors.append(e)

    def within() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    engine.on_run = within
    stream = session.stream("ab", max_tokens=2)
    assert stream.finish().text == "he"
    assert len(errors) == 6 and "in use" in str(errors[0])


def test_a_session_is_not_used_from_its_own_progress():
    session = fake_model()[0].session()
    with pytest.raises(InputError, match="in use"):
        session.generate("ab", progress=lambda done, total: session.reset())
    with pytest.raises(InputError, match="own call"):
        session.generate("ab", progress=lambda done, total: session.close())
    assert session.tokens == []


# ---- models ----


def test_a_closed_model_refuses_everything():
    model, engine = fake_model(says("hello"))
    with model:
        session, chat = model.session(), model.chat()
        stream = session.stream("ab")
        next(stream)
    assert engine.closed and session.transcript.cache.closed
    calls = (
        model.session, model.chat, model.info, lambda: model.tokenizer, lambda: next(stream),
        lambda: session.generate("a"), lambda: chat.send("a"), session.reset,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match="closed"):
            call()
    model.close()


def test_closing_a_model_cancels_what_runs():
    model, engine = fake_model(lambda tokens: 65, context=100_000)
    engine.seconds = 0.001
    timer = threading.Timer(0.05, model.close)
    timer.start()
    stream = model.session().stream("ab", sampling=GREEDY)
    with suppress(InputError):  # it ends as cancelled, or finds the model closed
        stream.finish()
    timer.join()
    assert engine.closed
