"""Damaged models, loaded and run: a result or a typed error, never a crash, a hang or a bug."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz_gguf import NUMBERS

from edge.engine.engine import Engine
from edge.errors import EdgeError, NativeError
from edge.files.gguf import GGUF

pytestmark = pytest.mark.native

#: Floats that overflow, divide by zero or are none.
FLOATS = [0.0, -1.0, 1e-45, 1e-30, 3e38, float("inf"), float("nan")]

NEW = st.one_of(
    st.integers(0, 7).map(lambda bit: ("flip", bytes([1 << bit]))),
    st.binary(min_size=1, max_size=4).map(lambda new: ("put", new)),
    st.sampled_from(NUMBERS).map(lambda n: ("put", struct.pack("<Q", n))),
    st.integers(0, 300).map(lambda n: ("put", struct.pack("<I", n))),
    st.sampled_from(FLOATS).map(lambda x: ("put", struct.pack("<f", x))),
    st.sampled_from([b"\xff\x7f", b"\x00\x7c", b"\xff\xff\xff\xff"]).map(lambda b: ("put", b)),
    st.just(("cut", b"")),
)
EDIT = st.tuples(
    st.sampled_from(["values", "metadata", "tensor infos", "data", "anywhere"]),
    st.floats(0, 1, exclude_max=True),  # where in there
    NEW,
)
Edit = tuple[str, float, tuple[str, bytes]]


class Original:
    """A whole model and where its parts lie."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        with GGUF.open(path) as file:
            data = min(t.offset for t in file.tensors.values())
            first = next(iter(file.tensors)).encode()
            names = [key.encode() for key in file.metadata]
        tokens, infos = self.content.index(b"tokenizer.ggml"), self.content.index(first)
        #: Where each part's bytes lie; values: those of the numbers that the graph is built from.
        self.parts: dict[str, Sequence[int]] = {
            "values": [at for at in map(self.value, names) if at < tokens],
            "metadata": range(tokens),
            "tensor infos": range(infos, data),
            "data": range(data, len(self.content)),
            "anywhere": range(len(self.content)),
        }

    def value(self, key: bytes) -> int:
        """Where a key's value begins: after its length, the key, and its type."""
        return self.content.index(struct.pack("<Q", len(key)) + key) + len(key) + 12

    def damaged(self, edits: list[Edit]) -> bytes:
        """A copy with edits."""
        copy = bytearray(self.content)
        for part, where, (what, new) in edits:
            at = self.parts[part][int(where * len(self.parts[part]))]
            if what == "cut":
                del copy[at:]
            elif what == "put":
                copy[at : at + len(new)] = new
            elif at < len(copy):
                copy[at] ^= new[0]
        return bytes(copy)


@pytest.fixture(scope="module")
def originals(tiny_gguf: Callable[..., Path]) -> list[Original]:
    small = {"n_layers": 1, "dim": 32, "n_heads": 2, "n_kv_heads": 1, "ffn": 32}
    return [
        Original(tiny_gguf(type="Q4_0", rope_freqs=True, **small)),
        Original(tiny_gguf("phi3", original_context=64, n_rot=8, window=4, **small)),
        Original(tiny_gguf(type=lambda name: ("Q4_1", "F16", "Q8_0")[len(name) % 3], **small)),
    ]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    path.touch()
    return path


def test_damaged_models_run_or_are_refused(originals: list[Original], path: Path) -> None:
    """More than 2,000 of them; both ends are seen often, else the damage would tell nothing."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=2100,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(which=st.integers(0, 2), edits=st.lists(EDIT, min_size=1, max_size=3))
    def damaged(which: int, edits: list[Edit]) -> None:
        with path.open("r+b") as file:  # some file systems are slow to make a file anew
            file.write(originals[which].damaged(edits))
            file.truncate()
        outcomes[outcome(path)] += 1

    damaged()
    assert outcomes["ran"] > 200 and outcomes.total() - outcomes["ran"] > 500, outcomes


def outcome(path: Path) -> str:
    """How loading a file and running it ended: "ran", or the error's type."""
    try:
        load_and_run(path)
    except EdgeError as error:
        assert not isinstance(error, NativeError), error
        assert "\n" not in str(error).removeprefix(str(path))
        return type(error).__name__
    return "ran"


def load_and_run(path: Path) -> None:
    """Three tokens, in two calls."""
    engine = Engine.load(path, threads=1)
    try:
        cache = engine.cache()
        logits = engine.run(cache, [0, 1], logits="all")
        logits = np.concatenate([logits, engine.run(cache, [2])])
        assert logits.shape == (3, engine.n_vocab) and np.isfinite(logits).all()
    finally:
        engine.close()
