"""Tokens and their cache in step, and a stream of any steps: without a session."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest
from fakes import FakeCache

from edge import check
from edge.errors import ContextError, InputError
from edge.native.cancel import Cancel
from edge.session.request import Request
from edge.session.results import Piece
from edge.session.sampler import SamplingOptions
from edge.session.stream import Stream
from edge.session.transcript import Transcript


def transcript(tokens: list[int], n_run: int, cache: FakeCache | None = None) -> Transcript:
    """One of these tokens, of which the first n_run were run."""
    held = Transcript(cache or FakeCache(limit=20), 20)
    held.append(tokens)
    held.cache.tokens.extend(tokens[:n_run])
    return held


@pytest.mark.parametrize(("n_tokens", "n_cached"), [(7, 4), (4, 4), (3, 3), (0, 0)])
def test_a_cut_keeps_the_cache_behind_the_tokens(n_tokens: int, n_cached: int) -> None:
    held = transcript([*range(6)], 4)
    held.cut(n_tokens)
    assert list(held.tokens) == [*range(min(n_tokens, 6))]
    assert list(held.cache.tokens) == [*range(n_cached)]


def test_a_cut_is_told_before_it_is_made() -> None:
    held, seen = transcript([*range(6)], 4), list[tuple[int, int, int]]()
    held.on_cut = lambda n: seen.append((n, len(held.tokens), held.cache.length))
    held.cut(2)
    assert seen == [(2, 6, 4)]


def test_a_cut_that_fails_leaves_the_tokens() -> None:
    class Broken(FakeCache):
        def trim(self, length: int) -> None:
            raise KeyboardInterrupt

    held = transcript([*range(6)], 4, Broken(limit=20))
    with pytest.raises(KeyboardInterrupt):
        held.cut(2)
    assert len(held.tokens) == 6 and held.cache.length == 4


@pytest.mark.parametrize("n_run", [0, 3, 6])
def test_the_last_token_is_always_run(n_run: int) -> None:
    held = transcript([*range(6)], n_run, FakeCache(20, shared=[*range(9)]))
    held.adopt()
    assert held.cache.length == 5 and list(held.next_chunk(4)) == [5]


def test_chunks_go_on_where_the_cache_ends() -> None:
    held = transcript([*range(9)], 2)
    assert list(held.next_chunk(4)) == [2, 3, 4, 5]
    assert held.common_prefix([0, 1, 2, 9]) == 3 and held.common_prefix([]) == 0


def test_a_fork_is_another_one() -> None:
    held = transcript([*range(6)], 4)
    twin = held.fork()
    twin.cut(1)
    assert len(held.tokens) == 6 and held.cache.length == 4 and len(twin.tokens) == 1


def test_what_fits() -> None:
    held = transcript([*range(6)], 4)
    assert (held.room(reuse=False), held.room(reuse=True)) == (14, 20)
    held.check_fits(14, None)
    held.check_fits(20, 6)
    with pytest.raises(ContextError, match="21 tokens are 1 more than the context of 20 holds"):
        held.check_fits(15, None)
    held.append([0] * 15)
    assert held.is_full and held.room(reuse=False) == 0


def test_a_stream_needs_no_session() -> None:
    log = list[str]()

    def steps(stream: Stream) -> Generator[Piece, None, None]:
        for token in stream.prompt:
            log.append(f"step {token}")
            yield Piece(str(token), token)
        stream.finish_reason = "stop"

    @contextmanager
    def hold(stream: Stream) -> Iterator[None]:
        log.append("hold")
        yield
        log.append("let go")

    request = Request(sampling=SamplingOptions().settled())
    stream = Stream(request, [1, 2], Cancel(), steps, hold)
    assert next(stream).token == 1 and log == ["hold", "step 1", "let go"]
    done = stream.finish()
    assert (done.text, done.tokens, done.finish_reason) == ("12", (1, 2), "stop")


def test_plain_copies() -> None:
    class Text(str):
        pass

    value = {Text("a"): (1, [Text("b")], None, True), "c": {"d": 0.5}}
    copy = check.plain("x", value)
    assert copy == {"a": [1, ["b"], None, True], "c": {"d": 0.5}}
    assert all(type(key) is str for key in copy) and type(copy["a"][1][0]) is str
    assert check.plain("x", value, str.upper)["A"][1] == ["B"]
    deep: list[object] = []
    for _ in range(65):
        deep = [deep]
    with pytest.raises(InputError, match="x is nested more than 64 levels deep"):
        check.plain("x", deep)
