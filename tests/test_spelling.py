"""A chat keeps the tokens of its answers, whatever tokens their text would encode to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import END, FakeTokenizer, fake_model, says
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE

import edge
from edge.session.overlap import common_text
from edge.tokenizer.decoder import StreamDecoder

WORDS = ["<s>", "<end>", "he", "h", "e", "l", "lo", " ", " h", "\n", "", "\u20ac", "\ufffd"]


def tokenizer(space_prefix: bool = False) -> Any:
    """Ids of WORDS, the first two control tokens, then of the three bytes of a character, and of
    one that belongs to none.
    """
    pieces = [word.encode() for word in WORDS] + [bytes([b]) for b in b"\xe2\x82\xac\xff"]

    def is_special(token: int) -> bool:
        return token < 2

    made = SimpleNamespace(
        token_bytes=lambda token: pieces[token],
        is_special=is_special,
        is_added=is_special,
        space_prefix=space_prefix,
    )
    made.decoder = lambda after=None: StreamDecoder(made, special=False, after=after)
    return made


def ids(*words: str) -> list[int]:
    return [WORDS.index(word) for word in words]


@pytest.mark.parametrize(
    ("held", "wanted", "same"),
    [
        ("he l", "he l", (2, 2)),
        ("h e l", "he l", (3, 2)),
        ("he l lo", "h e l", (2, 3)),
        ("h e", "he l", (2, 1)),
        ("h e l", "he lo", (2, 1)),
        ("l lo", "l l", (1, 1)),
        ("<s> h e <end>", "<s> he <end> l", (4, 3)),
        ("<s> h e <end>", "<s> he l", (3, 2)),
        ("<s> h", "<end> h", (0, 0)),
        ("h e", "h <end>", (1, 1)),
        ("", "he", (0, 0)),
    ],
)
def test_the_same_text(held: str, wanted: str, same: tuple[int, int]) -> None:
    assert common_text(tokenizer(), ids(*held.split()), ids(*wanted.split())) == same


def test_parts_of_a_character() -> None:
    euro = [len(WORDS) + i for i in range(3)]
    assert common_text(tokenizer(), [*euro, *ids("h", "e")], ids("\u20ac", "he")) == (5, 2)
    assert common_text(tokenizer(), euro[:2], ids("\u20ac")) == (0, 0)
    assert common_text(tokenizer(), [*ids("h"), *euro], [*ids("h"), *euro[:2], *ids("l")]) == (1, 1)
    # what looks the same ends inside a character
    assert common_text(tokenizer(), ids("\ufffd"), [*euro[:1], *euro[:1], *ids("he")]) == (0, 0)
    assert common_text(tokenizer(), ids("h", "\ufffd"), [*ids("h"), *euro[:1] * 2]) == (1, 1)


def test_bytes_that_are_no_text() -> None:
    """They are shown as U+FFFD, and that is what the template asks for."""
    bad, half = len(WORDS) + 3, len(WORDS)
    held = [*ids("<s>", "h"), bad, *ids("e"), half, *ids("<end>")]
    wanted = ids("<s>", "h", "\ufffd", "e", "\ufffd", "<end>", "l")
    assert common_text(tokenizer(), held, wanted) == (6, 6)
    assert common_text(tokenizer(), held[:-1], wanted) == (5, 5)
    assert common_text(tokenizer(), held[:-1], ids("<s>", "h", "\ufffd", "e", "<end>")) == (4, 4)


def test_a_space_that_encoding_put_there() -> None:
    held, wanted = ids("<s>", "he", " h"), ids("<s>", " h", "e", " h")
    assert common_text(tokenizer(space_prefix=True), held, wanted) == (3, 4)
    assert common_text(tokenizer(), held, wanted) == (1, 1)
    assert common_text(tokenizer(space_prefix=True), ids("he"), ids(" ", "h", "e")) == (1, 3)
    later = ids("<s>", "h", "e"), ids("<s>", "h", " ", "e")
    assert common_text(tokenizer(space_prefix=True), *later) == (2, 2)


@pytest.mark.parametrize(
    ("held", "wanted", "same"),
    [
        (["<s>", " h", "e", "\n", "<end>"], ["<s>", "he", "<end>", "l"], (5, 3)),
        (["<s>", "\n", "\n", "h"], ["<s>", "h", "<end>"], (4, 2)),
        (["<s>", "he"], ["<s>", " ", "he"], (1, 1)),  # what is wanted is not there
        (["h", "\n"], ["h", "l"], (1, 1)),
    ],
)
def test_whitespace_that_a_template_leaves_out(
    held: list[str], wanted: list[str], same: tuple[int, int]
) -> None:
    pair = ids(*held), ids(*wanted)
    assert common_text(tokenizer(), *pair, trimmed=True) == same
    assert common_text(tokenizer(), *pair)[0] <= same[0]


@given(st.lists(st.integers(0, 16), max_size=12), st.lists(st.integers(0, 16), max_size=12))
@example([12], [13, 13, 2])
def test_it_is_the_most(a: list[int], b: list[int]) -> None:
    plain = tokenizer()

    def text(tokens: list[int]) -> list[str]:
        """As the decoder has it, control tokens as such."""
        signs, decoder = list[str](), plain.decoder()
        for token in tokens:
            signs += [*decoder.push(token), *([f"<{token}>"] if token < 2 else [])]
        return [*signs, *decoder.flush()]

    n, m = common_text(plain, a, b)
    assert text(a[:n]) == text(b[:m])
    if max([*a, *b], default=0) >= len(WORDS):
        return  # a half character may end a shorter text
    assert len(text(a[:n])) == max(
        len(text(a[:i])) for i in range(len(a) + 1) for j in range(len(b) + 1)
        if text(a[:i]) == text(b[:j])
    )  # fmt: skip


# ---- chats ----


class Merging(FakeTokenizer):
    """`he` is one token, 260, when it is encoded; the model says `h`, `e`."""

    n_vocab = 261

    def encode(self, text: str, **options: Any) -> list[int]:
        out = list[int]()
        for token in super().encode(text, **options):
            if token == ord("e") and out and out[-1] == ord("h"):
                out[-1] = 260
            else:
                out.append(token)
        return out

    def is_special(self, token: int) -> bool:
        return 256 <= token < 260

    def decoder(self, *, after: int | None = None) -> Any:
        made = super().decoder(after=after)
        push = made.push
        made.push = lambda token: "he" if token == 260 else push(token)  # type: ignore[method-assign]
        return made


def test_sampled_tokens_stay() -> None:
    model, engine = fake_model(says("hehe", "one", "two"))
    model._tokenizer = Merging()
    chat = model.chat()
    chat.send("x")
    before = chat.session.tokens
    engine.runs.clear()
    done = chat.send("y")
    assert chat.session.tokens[: len(before)] == before and before[-5:] == [*b"hehe", END]
    assert done.usage.cached_tokens == len(before) - 1
    chat.messages[1]["content"] = "hehx"  # changed: what was said is not kept
    chat.send("z")
    assert chat.session.tokens[: len(before)] != before
    assert bytes(chat.session.tokens[5:9]) == b"hehx"


def test_a_stop_string_is_cut_off() -> None:
    model, _ = fake_model(says("he STOP", "one"))
    model._tokenizer = Merging()
    chat = model.chat(stop=" STOP")
    assert chat.send("x").text == "he"
    chat.send("y")
    assert chat.session.tokens[5:8] == [*b"he", END]


TRIMMING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")


@pytest.fixture(params=[CHAT_TEMPLATE, TRIMMING], ids=["as it is", "trimmed"])
def model(request: Any, tiny_gguf: Callable[..., Path]) -> Iterator[edge.Model]:
    extra = (("tokenizer.chat_template", request.param),)
    with edge.load(tiny_gguf(context=4000, extra=extra), context=256, threads=1) as model:
        yield model


def babble(model: edge.Model, letters: str, seed: int) -> edge.SamplingOptions:
    """Nothing but these letters, one by one: most texts of them encode to other tokens."""
    allowed = {model.tokenizer.encode(letter)[0] for letter in letters}
    bias = {t: float("-inf") for t in range(model.engine.n_vocab) if t not in allowed}
    return edge.SamplingOptions(temperature=1.0, seed=seed, logit_bias=bias)


def test_a_chat_that_slides_computes_what_is_new(model: edge.Model) -> None:
    """And its bits are those of a session with these tokens, whatever their text encodes to."""
    chat = model.chat("the world", when_full="slide")
    for turn in range(14):
        letters = "\n" if turn % 5 == 4 else "the world\n "
        sampling = babble(model, letters, turn)
        n_before = len(chat.session.tokens)
        done = chat.send(f"and {turn}?", max_tokens=30 + 7 * turn, sampling=sampling)
        computed = done.usage.prompt_tokens - done.usage.cached_tokens
        assert computed <= 64, (turn, computed)
        n_answer = len(done.tokens)
        assert n_answer == 30 + 7 * turn and len(chat.session.tokens) > n_before
    tokens = chat.session.tokens
    assert len(tokens) > 1000
    encoded = model.tokenizer.encode(
        model.template.render(chat.messages, add_generation_prompt=False), special=True
    )
    assert len(encoded) < len(tokens)  # the test is one
    engine, known = model.engine, chat.session.transcript.cache.length
    engine.pool.publish = lambda before, tokens, page: page  # type: ignore[attr-defined]
    fresh = engine.cache("slide")
    while (i := fresh.length) < known:
        n = fresh.room(engine.chunk)
        engine.run(fresh, tokens[i : min(known, i + n)], logits="none")
    mine, its = (
        engine.run(c, [5, 6, 7], logits="all") for c in (chat.session.transcript.cache, fresh)
    )
    assert np.array_equal(mine, its)
    fresh.close()
