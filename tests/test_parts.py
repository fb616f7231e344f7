"""Models that run part by part: the same bits as in one piece, and the memory of one part."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from arches import arch_of
from arches.common import Tiny
from fake_model import ROOT

import edge
from edge.engine.describe import pack
from edge.engine.parts import ModelInParts
from edge.engine.states import WindowPiece
from edge.errors import CancelledError, InputError
from edge.files.tensor_types import TENSOR_TYPES, TYPE_NUMBERS
from edge.loading import NativeOptions
from edge.native.cancel import Cancel

TOKENS = list(range(40))
WINDOWS = [
    [
        WindowPiece(TOKENS[:10], False),
        WindowPiece(TOKENS[10:26], True),
        WindowPiece(TOKENS[26:], True),
    ],
    [WindowPiece(TOKENS[5:15], False), WindowPiece(TOKENS[15:31], True)],
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_sparse(path: Path, **options: Any) -> Path:
    """A model of zeros, which take no room on the disk."""
    t = Tiny(**options)
    writer = gguf.GGUFWriter(path, t.arch)
    for key, value in tiny.metadata(t).items():
        tiny._add(writer, key, value)
    tiny._add_vocabulary(writer, t)
    n_data = 0
    for name, shape in arch_of(t.arch).tensors(t).items():
        number = TYPE_NUMBERS[str(t.type) if len(shape) > 1 else "F32"]
        _, block, block_bytes = TENSOR_TYPES[number]
        n_bytes = int(np.prod(shape)) // block * block_bytes
        kind = gguf.GGMLQuantizationType(number)
        size = shape if block == 1 else (*shape[:-1], shape[-1] // block * block_bytes)
        dtype = np.dtype(np.float32 if block == 1 else np.uint8)
        writer.add_tensor_info(name, size, dtype, n_bytes, raw_dtype=kind)
        n_data += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + n_data)
    return path


@pytest.mark.parametrize("type_name", ["F32", "Q4_0"])
@pytest.mark.parametrize("arch", ["llama", "gemma3n", "phi3", "qwen2moe"])
def test_bits_are_those_of_the_model_in_one_piece(
    tiny_gguf: Callable[..., Path], arch: str, type_name: str
) -> None:
    """gemma3n has layers that read the keys of others, qwen2moe has experts."""
    path = tiny_gguf(arch, type=type_name, n_layers=4)
    counted: list[int] = []
    with ModelInParts(path, NativeOptions(context=64)) as model:
        found = list(model.run(WINDOWS, counted.append))
        assert model.n_parts > 2
        assert sum(counted) == model.n_parts * (40 + 26)
    expected = []
    with edge.load(path, context=64) as whole:
        cache = whole.engine.cache()
        for window in WINDOWS:
            cache.trim(0)
            for piece in window:
                wanted = "all" if piece.is_scored else "none"
                expected.append(whole.engine.run(cache, piece.tokens, logits=wanted))
        cache.close()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_cancel(tiny_gguf: Callable[..., Path], cache: Path) -> None:
    cancel = Cancel()
    with ModelInParts(tiny_gguf(), NativeOptions(context=64)) as model:
        rows = model.run(WINDOWS, lambda n: cancel.set(), cancel)
        with pytest.raises(CancelledError):
            next(rows)
    assert [*cache.iterdir()] == []


def test_packed_files_have_no_parts(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    pack(tiny_gguf(), target := tmp_path / "packed.gguf")
    with pytest.raises(InputError, match="is packed: a model runs in parts from its source"):
        ModelInParts(target, NativeOptions())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_memory_is_that_of_a_part(tmp_path: Path) -> None:
    """A base of 118 MB and a file of 63 MB, in a process that may have 125 MB."""
    shape = {"n_layers": 8, "dim": 512, "n_heads": 8, "n_kv_heads": 8, "ffn": 4096}
    base = write_sparse(tmp_path / "base.gguf", type="BF16", **shape)
    file = write_sparse(tmp_path / "file.gguf", type="Q8_0", **shape)
    (text := tmp_path / "text.txt").write_text("the world and a hello " * 20, encoding="utf-8")
    args = ["compare", str(base), str(file), "-f", str(text), "-c", "16", "--chunks", "2"]
    args += ["--memory", "125MB", "--threads", "1", "--no-speed", "--json"]
    code = (
        f"import sys; sys.argv[1:] = {args}\n"
        "from edge.cli import main\nfrom edge.device import memory\n"
        "try: main()\nfinally: print(memory.peak())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    facts, peak = done.stdout.splitlines()
    assert [f["fits"] for f in json.loads(facts)["files"]] == [False, False]
    assert base.stat().st_size > 115e6 and int(peak) < 125e6
