"""What a session keeps of each token, when it slides and has no end."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import edge
from edge.engine.ledger import _HISTORY_TOKEN_BYTES

TOKENS = 1000


@pytest.mark.parametrize("logprobs", [0, 5])
def test_an_answer_without_end(tiny_gguf: Callable[..., Path], logprobs: int) -> None:
    path = tiny_gguf(n_layers=1, context=1 << 20)
    with edge.load(path, context=256, threads=1) as model:
        bias = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))
        sampling = edge.SamplingOptions(temperature=1.0, logit_bias=bias)
        session = model.session("slide", sampling=sampling, logprobs=logprobs)
        stream = session.stream("Hello world")

        def go_on() -> int:
            for _ in range(TOKENS):
                next(stream)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = go_on()
            grown = (go_on() - before) / TOKENS
        finally:
            tracemalloc.stop()
        assert len(session.tokens) > 2 * TOKENS
        # arrays have room for more, and a thousand tokens are few; lists were ten times as much
        assert grown < 4 * (_HISTORY_TOKEN_BYTES + 12 * (logprobs + 1) * bool(logprobs))
        done = stream.completion
        assert list(done.tokens) == session.tokens[-2 * TOKENS :]
        assert len(done.logprobs) == (2 * TOKENS if logprobs else 0)
        assert "".join(piece.text for piece in done.logprobs) == (done.text if logprobs else "")


def test_the_ledger_counts_it(tiny_gguf: Callable[..., Path]) -> None:
    with edge.load(tiny_gguf(context=2048), context=512, sessions=3) as model:
        parts = model.engine.ledger.parts
        assert parts["history"] == 3 * (2048 - 512) * _HISTORY_TOKEN_BYTES
