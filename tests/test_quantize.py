"""Quantising: what is written, from which sources, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import arches
import gguf
import libgguf
import numpy as np
import pytest
from arches.common import Tiny
from tiny import add_tensor, tensors, write_split, write_tiny

import edge
from edge.errors import EdgeWarning, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.quantizer import job, source, writer
from edge.quantizer.imatrix import Importance, InputSums

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

WIDE: dict[str, Any] = {"dim": 256, "ffn": 256, "n_layers": 1, "head_dim": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("quantize") / "model.gguf", type="F16", **WIDE)


def importance_of(weights: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """A random importance of all matrices in layers, written to path: name -> (k,)."""
    rng, squares = np.random.default_rng(1), {}
    for name, w in weights.items():
        if w.ndim == 2 and name.startswith("blk."):
            squares[name] = rng.uniform(0.1, 2, w.shape[-1]).astype(np.float32)
    inputs = {name: InputSums(row[None], np.array([1])) for name, row in squares.items()}
    Importance(inputs, ["a text"], 3).write(path)
    return squares


def blocks(path: Path, name: str) -> bytes:
    with GGUF.open(path) as gguf_file:
        return bytes(gguf_file.tensors[name].data)


def encoded(w: np.ndarray, type_name: str, importance: np.ndarray | None = None) -> bytes:
    """The referee's blocks."""
    rows = np.ascontiguousarray(w.astype(np.float16).astype(np.float32))
    kind = int(gguf.GGMLQuantizationType[type_name])
    return libgguf.quantize_rows(
        rows, kind, *([] if importance is None else [importance])
    ).tobytes()


@pytest.mark.parametrize("type_name", ["Q4_0", "Q6_K", "IQ4_XS"])
def test_blocks_are_those_of_the_referee(type_name: str, model: Path, tmp_path: Path) -> None:
    weights = tensors(Tiny(**WIDE))
    squares = importance_of(weights, tmp_path / "matrix.gguf")
    for importance in (None, tmp_path / "matrix.gguf"):
        result = edge.quantize(model, tmp_path / "out.gguf", type=type_name, importance=importance)
        assert result.types == {type_name: 8, "F32": 3}
        for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
            of_name = squares.get(name) if importance else None
            assert blocks(tmp_path / "out.gguf", name) == encoded(weights[name], type_name, of_name)
        assert blocks(tmp_path / "out.gguf", "output_norm.weight") == blocks(
            model, "output_norm.weight"
        )


@pytest.mark.parametrize("arch", ["gemma3n", "gpt_oss", "phi3", "qwen2moe", "starcoder2"])
def test_architectures_load_again(arch: str, tmp_path: Path) -> None:
    case = next(c for c in arches.CASES.values() if c.model.arch == arch.replace("_", "-"))
    path = write_tiny(tmp_path / "model.gguf", **vars(case.model))
    edge.quantize(path, tmp_path / "out.gguf", type="Q8_0")
    with edge.load(tmp_path / "out.gguf") as loaded:
        assert loaded.session().generate("the world", max_tokens=2).tokens


def test_files_say_what_was_done(model: Path, tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.gguf"
    importance_of(tensors(Tiny(**WIDE)), matrix)
    result = edge.quantize(model, tmp_path / "out.gguf", recipe="Q4_K_M", importance=matrix)
    with GGUF.open(tmp_path / "out.gguf") as out, GGUF.open(model) as before:
        keys = dict(out.metadata)
        assert {k: v for k, v in keys.items() if k in before.metadata} == dict(before.metadata)
    new = {key: keys[key] for key in keys if "quanti" in key or key == "general.file_type"}
    assert new == {
        "general.file_type": 15,
        "general.quantization_version": 2,
        "edge.quantize.version": edge.__version__,
        "edge.quantize.recipe": "Q4_K_M",
        "edge.quantize.rounding": "nearest",
        "edge.quantize.importance": hashlib.sha256(matrix.read_bytes()).hexdigest(),
        "quantize.imatrix.file": "matrix.gguf",
        "quantize.imatrix.dataset": "a text",
        "quantize.imatrix.entries_count": 7,
        "quantize.imatrix.chunks_count": 3,
    }
    assert result.bytes == os.path.getsize(tmp_path / "out.gguf")
    assert result.tensors["blk.0.attn_v.weight"] == "Q6_K"


def test_shards_become_one_file(tmp_path: Path) -> None:
    whole = write_tiny(tmp_path / "whole.gguf")
    shard = write_split(tmp_path / "split.gguf")[1]
    for path, out in ((whole, "a.gguf"), (shard, "b.gguf")):
        edge.quantize(path, tmp_path / out, type="Q8_0")
    with GGUF.open(tmp_path / "a.gguf") as a, GGUF.open(tmp_path / "b.gguf") as b:
        assert dict(a.metadata) == dict(b.metadata)
        assert {n: bytes(t.data) for n, t in a.tensors.items()} == {
            n: bytes(t.data) for n, t in b.tensors.items()
        }


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_floats_are_rounded_to_the_nearest(type_name: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", type="F32")
    edge.quantize(path, tmp_path / "out.gguf", type=type_name)
    w = tensors(Tiny())["blk.0.attn_q.weight"]
    expected = gguf.quants.quantize(w, gguf.GGMLQuantizationType[type_name]).tobytes()
    assert blocks(tmp_path / "out.gguf", "blk.0.attn_q.weight") == expected


def test_a_quantised_source_is_warned_of(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", type="Q4_1")
    with pytest.warns(EdgeWarning, match=r"quantised already, to 5\.00 bits a weight \(15 in Q4_1"):
        edge.quantize(path, tmp_path / "out.gguf", type="Q8_0")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EdgeWarning)
        edge.quantize(path, tmp_path / "same.gguf", type="Q4_1")
    name = "blk.0.attn_q.weight"
    assert blocks(tmp_path / "same.gguf", name) == blocks(path, name)


def test_slices_cover_stacks_of_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in arches.CASES.values() if c.model.arch == "qwen3moe")
    path = write_tiny(tmp_path / "model.gguf", **vars(case.model))
    edge.quantize(path, tmp_path / "whole.gguf", type="Q8_0")
    monkeypatch.setattr(source, "_SLICE", 100)
    edge.quantize(path, tmp_path / "sliced.gguf", type="Q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "sliced.gguf").read_bytes()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    path, n, k = tmp_path / "model.gguf", 8192, 2048
    sparse = gguf.GGUFWriter(path, "llama")
    sparse.add_tensor_info("output.weight", (n, k), np.dtype("f4"), 4 * n * k)
    sparse.write_header_to_file()
    sparse.write_kv_data_to_file()
    sparse.write_ti_data_to_file()
    sparse.close()
    os.truncate(path, path.stat().st_size + 32 + 4 * n * k)
    tracemalloc.start()
    edge.quantize(path, tmp_path / "out.gguf", type="Q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20 < (4 * n * k) // 2


# ---- a run that is cut ----


class Cut(Exception):
    pass


def cut_after(n: int) -> Any:
    """A progress that raises at its nth call."""
    calls = iter(range(n))

    def progress(done: int, total: int) -> None:
        if next(calls, None) is None:
            raise Cut

    return progress


def test_a_cut_run_goes_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(Cut):
        edge.quantize(model, out, type="Q8_0", progress=cut_after(7))
    assert not out.exists()
    result = edge.quantize(model, out, type="Q8_0")
    assert 1 <= result.n_continued < len(result.tensors)
    edge.quantize(model, tmp_path / "other.gguf", type="Q8_0")
    assert out.read_bytes() == (tmp_path / "other.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.gguf", "out.gguf"]


def test_other_settings_begin_anew(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Cut):
        edge.quantize(model, tmp_path / "out.gguf", type="Q8_0", progress=cut_after(7))
    assert edge.quantize(model, tmp_path / "out.gguf", type="Q5_0").n_continued == 0


def test_a_journal_that_was_cut_is_read_as_far_as_it_goes(model: Path, tmp_path: Path) -> None:
    out, journal = tmp_path / "out.gguf", tmp_path / ".out.gguf.journal"
    with pytest.raises(Cut):
        edge.quantize(model, out, type="Q8_0", progress=cut_after(9))
    journal.write_bytes(journal.read_bytes()[:-5])
    edge.quantize(model, out, type="Q8_0")
    edge.quantize(model, tmp_path / "other.gguf", type="Q8_0")
    assert out.read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_a_full_disk_says_what_is_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(file: Any, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "write_all", write_nothing)
    with pytest.raises(ModelFileError, match=r"No space left.*takes 0\.\d MiB: make room"):
        edge.quantize(model, tmp_path / "out.gguf", type="Q8_0")


def test_two_writers_of_one_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"

    def second(done: int, total: int) -> None:
        edge.quantize(model, out, type="Q8_0")

    with pytest.raises(InputError, match="another process is writing it"):
        edge.quantize(model, out, type="Q8_0", progress=second)


# ---- bad input ----


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    writer_ = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    w = np.ones((8, 64), np.float32)
    w[5, 33] = np.nan
    add_tensor(writer_, "blk.0.attn_q.weight", w, "F32")
    writer_.write_header_to_file()
    writer_.write_kv_data_to_file()
    writer_.write_tensors_to_file()
    writer_.close()
    for type_name in ("Q4_0", "F32"):
        with pytest.raises(ModelFileError, match=r"attn_q.weight: row 5, column 33: .* NaN"):
            edge.quantize(tmp_path / "model.gguf", tmp_path / "out.gguf", type=type_name)


def test_the_model_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(model)
    for path in (model, tmp_path / "link.gguf"):
        with pytest.raises(InputError, match="is the model itself"):
            edge.quantize(model, path, type="Q8_0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say one of these: the type of all matrices"),
        ({"type": "Q8_0", "recipe": "Q4_0"}, "say one of these"),
        ({"type": "Q8_0", "rounding": "up"}, "rounding 'up': one of"),
        ({"typ": "Q8_0"}, "no option 'typ'"),
        ({"type": "IQ2_XS"}, "needs an importance matrix: make one with `edge-run imatrix`"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        edge.quantize(model, tmp_path / "out.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_an_importance_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    matrix, out = tmp_path / "matrix.gguf", tmp_path / "out.gguf"
    for name, k, message in (
        ("blk.0.attn_x.weight", 256, "names no tensor of the model"),
        ("blk.0.attn_q.weight", 64, "has 64 columns, the model's has 256"),
    ):
        Importance({name: InputSums(np.ones((1, k), np.float32), np.array([1]))}).write(matrix)
        with pytest.raises(InputError, match=message):
            edge.quantize(model, out, type="Q8_0", importance=matrix)


def test_matrices_without_importance(model: Path, tmp_path: Path) -> None:
    matrix, out = tmp_path / "matrix.gguf", tmp_path / "out.gguf"
    sums = InputSums(np.ones((1, 256), np.float32), np.array([1]))
    Importance({"blk.0.attn_q.weight": sums}).write(matrix)
    with pytest.warns(EdgeWarning, match=r"no importance of blk.0.attn_k.weight, .* and 3 more"):
        edge.quantize(model, out, type="Q4_K", importance=matrix)
    with pytest.raises(InputError, match="which IQ2_XS needs"):
        edge.quantize(model, out, type="IQ2_XS", importance=matrix)


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    case = next(c for c in arches.CASES.values() if c.model.arch == "qwen3moe")
    path = write_tiny(tmp_path / "model.gguf", **vars(case.model))
    weights, name = tensors(case.model), "blk.0.ffn_up_exps.weight"
    n, _, k = weights[name].shape
    counts = np.array([0, *[3] * (n - 1)])
    squares = np.random.default_rng(1).uniform(0.1, 9, (n, k)).astype(np.float32)
    Importance({name: InputSums(squares, counts)}).write(tmp_path / "matrix.gguf")
    with (
        pytest.warns(EdgeWarning, match=f"{name}: no token .* reached experts 0: all"),
        pytest.warns(EdgeWarning, match="has no importance of blk"),
    ):
        edge.quantize(path, tmp_path / "out.gguf", type="Q4_0", importance=tmp_path / "matrix.gguf")
    rows = [np.ones(k, np.float32), *(squares[1:] / np.float32(3))]
    kind = int(gguf.GGMLQuantizationType.Q4_0)
    expected = [libgguf.quantize_rows(w, kind, r) for w, r in zip(weights[name], rows, strict=True)]
    assert blocks(tmp_path / "out.gguf", name) == b"".join(part.tobytes() for part in expected)


def test_explaining_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = job.explain(model, recipe="Q4_K_M")
    assert result.path == ""
    assert result.bytes == edge.quantize(model, tmp_path / "out.gguf", recipe="Q4_K_M").bytes
    (tmp_path / "same.toml").write_text(result.recipe, encoding="utf-8")
    assert job.explain(model, recipe=tmp_path / "same.toml").tensors == result.tensors


def test_a_packed_file_is_refused(model: Path, tmp_path: Path) -> None:
    from edge.engine.describe import pack

    pack(model, tmp_path / "packed.gguf")
    with pytest.raises(InputError, match="is packed: quantise the model"):
        edge.quantize(tmp_path / "packed.gguf", tmp_path / "out.gguf", type="Q8_0")


def test_a_type_that_cannot_be_decoded_is_refused(model: Path, tmp_path: Path) -> None:
    raw = model.read_bytes()
    old, new = b"attn_q.weight", (1).to_bytes(4, "little")
    at = raw.index(old) + len(old) + 4 + 16  # behind the number of dimensions, and these
    assert raw[at : at + 4] == new
    path = tmp_path / "model.gguf"
    path.write_bytes(raw[:at] + (25).to_bytes(4, "little") + raw[at + 4 :])  # I16: 2 bytes, too
    with pytest.raises(UnsupportedError, match=r"attn_q.weight: the type I16 cannot be read"):
        edge.quantize(path, tmp_path / "out.gguf", type="Q8_0")
