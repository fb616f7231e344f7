"""The model of these tests, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sessions import PROMPT, options, unshared

import edge


@pytest.fixture(scope="module")
def path(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf(context=2048)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[edge.Model]:
    with edge.load(path, threads=1, context=2048) as loaded:
        yield unshared(loaded)


@pytest.fixture(scope="module")
def whole(model: edge.Model) -> list[int]:
    """What a session without a break comes to."""
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=400)
    return session.tokens
