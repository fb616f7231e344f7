"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny import Tiny, write_tiny

if TYPE_CHECKING:
    from fake_model import FakeModel

os.environ["EDGE_CACHE_SIZE"] = "0"  # tests that want packed files in a cache say so
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub; some ask a server of their own
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell's background job: tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_gguf(arch="llama", **options) -> path of a small model, see `tiny.Tiny`.

    Written once per session for each set of options: do not change the file, copy it.
    """
    folder, made = tmp_path_factory.mktemp("tiny"), dict[Tiny, Path]()

    def make(arch: str = "llama", **options: Any) -> Path:
        tiny = Tiny(arch, **options)
        if tiny not in made:
            made[tiny] = write_tiny(folder / f"{len(made)}.gguf", arch, **options)
        return made[tiny]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model, SmolLM2-135M-Instruct; fails with what to do when it was not pulled."""
    from edge.disk.pull import default_model

    return default_model()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[FakeModel]:
    """The models that were loaded, fakes all of them."""
    from fake_model import FakeModel

    import edge

    models: list[FakeModel] = []

    def load(path: str | None = None, **options: Any) -> FakeModel:
        models.append(FakeModel(path, **options))
        return models[-1]

    monkeypatch.setitem(edge.__dict__, "load", load)
    return models
