"""Weights as MatMulNBits holds them: what is in the file, for every type, and right products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import refmath
from native_plan import FLOAT_TYPES, TYPES
from test_refmath import SIZES, random_blocks
from tiny import quantise

from edge.errors import ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.files.tensor_types import TYPE_NUMBERS
from edge.graph.ops import Matmul
from edge.onnx.export import blocks
from edge.onnx.export.blocks import Blocks, Form, floats, form_of, slices
from edge.onnx.export.linear import BlockLinears
from edge.onnx.export.writer import DataFile, GraphWriter

pytestmark = [pytest.mark.native, pytest.mark.all_isas]  # packing is the same on all

CODED = [t for t in TYPES if t not in FLOAT_TYPES]
N, K = 96, 512


def write_model(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> GGUF:
    """A file of matrices: name -> (type, rows of bytes, or of floats)."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (kind, rows) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=TYPE_NUMBERS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF.open(path)


def normal(kind: str, n: int = N, k: int = K, seed: int = 0) -> tuple[str, np.ndarray]:
    """A matrix of normal numbers, as a tensor for `write_model`."""
    x = np.random.default_rng(seed).standard_normal((n, k)) / np.sqrt(k)
    return kind, quantise(x.astype(np.float32), kind)


def wild(kind: str, n: int, k: int) -> tuple[str, np.ndarray]:
    """A matrix of random bytes."""
    return kind, random_blocks(kind, n * k // SIZES[kind].block, seed=n + k).reshape(n, -1)


def dense(model: GGUF, name: str) -> np.ndarray:
    """The referee's values of a matrix."""
    tensor = model.tensors[name]
    return refmath.dequantise(tensor.type, tensor.data, tensor.shape)


def values(form: Form, b: Blocks) -> np.ndarray:
    """What blocks stand for, (n, k) float32, each operation rounded."""
    q = b.codes.astype(np.int32)
    if form.bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:2], -1)
    out = b.scales[..., None] * (q - (1 << form.bits - 1)).astype(np.float32)
    out = out if b.offsets is None else out + b.offsets[..., None]
    return out.reshape(len(out), -1)


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("n, k_blocks", [(1, 1), (17, 3), (33, 2)])
def test_blocks_are_what_is_in_the_file(tmp_path: Path, kind: str, n: int, k_blocks: int) -> None:
    k, form = k_blocks * SIZES[kind].block, form_of(kind)
    with write_model(tmp_path / "m.gguf", {"w": wild(kind, n, k)}) as model:
        got, want = blocks.blocks(model.tensors["w"], 0, n), dense(model, "w")
    assert form is not None and form.has_offset == (got.offsets is not None)
    assert got.codes.shape == (n, k // form.block, form.block * form.bits // 8)
    assert got.codes.dtype == np.uint8 and got.scales.dtype == np.float32
    if got.offsets is None:
        np.testing.assert_array_equal(values(form, got).view("u4"), want.view("u4"))
    else:  # two roundings more, of numbers no larger than these
        largest = np.abs(got.scales) * (1 << form.bits - 1) + np.abs(got.offsets)
        error = np.abs(values(form, got) - want).reshape(n, -1, form.block).max(axis=2)
        assert (error <= largest * 2.0**-22 + 1e-44).all()


def test_forms_are_the_least_that_hold_a_type() -> None:
    exact = {(t, f.bits, f.block) for t in CODED for f in [form_of(t)] if f and not f.has_offset}
    offset = {(t, f.bits, f.block) for t in CODED for f in [form_of(t)] if f and f.has_offset}
    assert exact == {
        *((t, 4, 32) for t in ("Q4_0", "TQ1_0", "TQ2_0")),
        ("Q2_0", 4, 64),
        ("Q2_0_128", 4, 128),
        ("Q1_0", 4, 128),
        ("Q3_K", 4, 16),
        *((t, 8, 32) for t in ("Q5_0", "Q8_0", "IQ2_XXS", "IQ3_XXS", "IQ4_NL", "IQ4_XS", "MXFP4")),
        *((t, 8, 16) for t in ("Q6_K", "IQ2_XS", "IQ2_S", "NVFP4")),
    }
    assert offset == {
        *((t, 4, 32) for t in ("Q4_1", "Q4_K", "IQ3_S", "IQ1_S")),
        *((t, 4, 16) for t in ("Q2_K", "IQ1_M")),
        *((t, 8, 32) for t in ("Q5_1", "Q5_K")),
    }


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_floats_have_no_form(kind: str) -> None:
    assert form_of(kind) is None


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1", "no such type"])
def test_types_that_edge_cannot_run_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        form_of(kind)


@pytest.mark.parametrize("kind", [t for t in CODED if (f := form_of(t)) and f.has_offset])
def test_codes_with_offsets_lie_around_the_zero_point(tmp_path: Path, kind: str) -> None:
    """Else the error of quantised activations would be larger than need be."""
    form = form_of(kind)
    assert form is not None
    with write_model(tmp_path / "m.gguf", {"w": wild(kind, 64, SIZES[kind].block)}) as model:
        codes = blocks.blocks(model.tensors["w"], 0, 64).codes
    q = values(form, Blocks(codes, np.ones(codes.shape[:2], np.float32), None))
    assert -0.5 <= (q.min() + q.max()) / 2 <= 0.5


@pytest.mark.parametrize("kind", TYPES)
def test_floats_are_what_is_in_the_file(tmp_path: Path, kind: str) -> None:
    with write_model(tmp_path / "m.gguf", {"w": wild(kind, 33, 512)}) as model:
        want = dense(model, "w")
        for first, n in ((0, 33), (16, 16), (7, 5)):
            got = floats(model.tensors["w"], first, n)
            np.testing.assert_array_equal(got.view("u4"), want[first : first + n].view("u4"))


def test_slices_cover_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_SLICE", 1 << 14)
    with write_model(tmp_path / "m.gguf", {"w": normal("Q4_K"), "v": normal("F32", 5, 7)}) as model:
        w, v = (model.tensors[name] for name in "wv")
        assert list(slices(w)) == [(0, 32), (32, 32), (64, 32)]
        assert list(slices(v)) == [(0, 5)]
        whole = blocks.blocks(w, 0, N)
        parts = [blocks.blocks(w, *s) for s in slices(w)]
    for a, *b in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(a, np.concatenate(b))


def test_damage_is_found(tmp_path: Path) -> None:
    kind, raw = normal("Q8_0")
    raw[70, 34 * 3 : 34 * 3 + 2] = 0, 0x7C  # an infinite scale
    with write_model(tmp_path / "m.gguf", {"w": (kind, raw)}) as model:
        tensor = model.tensors["w"]
        blocks.blocks(tensor, 0, 64)
        for read in (blocks.blocks, floats):
            with pytest.raises(ModelFileError, match="row 70, column 96 is NaN or infinite"):
                read(tensor, 64, 32)


# ---- products ------------------------------------------------------------------------------------


def product(*weights: str) -> Matmul:
    """The op of a graph."""
    return Matmul(("x",), "y", weights)


class Built:
    """A graph that was made of a model's weights, as onnxruntime runs it."""

    def __init__(self, model: GGUF, folder: Path) -> None:
        self.model, self.folder, self.graph = model, folder, GraphWriter("g", 21)
        self.data = DataFile(folder / "weights.data")
        self.linears = BlockLinears(model, self.data)

    def input(self, name: str, dtype: str, *shape: Any) -> str:
        return self.graph.input(name, getattr(self.graph.types, dtype), [1, *shape])

    def run(self, output: str, level: int | None = None, **inputs: np.ndarray) -> np.ndarray:
        """The output; level: another accuracy level of all products."""
        import onnx
        import onnxruntime as ort

        self.data.close()
        self.graph.rename(output, "out")
        self.graph.output("out", self.graph.types.FLOAT, [1, "n", "dim"])
        path = self.folder / "g.onnx"
        self.graph.save(path)
        if level is not None:
            proto = onnx.load(path, load_external_data=False)
            for attribute in (a for node in proto.graph.node for a in node.attribute):
                if attribute.name == "accuracy_level":
                    attribute.i = level
            onnx.save(proto, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self.session.run(["out"], inputs)[0]

    def ops(self) -> list[str]:
        """The nodes' kinds, in order."""
        return [node.op_type for node in self.graph._nodes]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Built]:
    """build(name=tensor, ...): of a model with these matrices."""
    return lambda **tensors: Built(write_model(tmp_path / "m.gguf", tensors), tmp_path)


def activations(m: int, k: int = K) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, m, k)).astype(np.float32)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """The error's norm by that of the result."""
    assert got.shape == want.shape and got.dtype == np.float32
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("level, bound", [(0, 1e-5), (None, 0.015)])  # None: 4, int8 activations
def test_product(build: Callable[..., Built], kind: str, level: int | None, bound: float) -> None:
    built = build(w=normal(kind))
    y = built.linears.apply(built.graph, built.input("x", "FLOAT", "n", K), product("w"))
    for m in (1, 5):
        x = activations(m)
        got = built.run(y, level, x=x) if m == 1 else built.session.run(["out"], {"x": x})[0]
        assert relative(got, x @ dense(built.model, "w").T) < bound


def test_weights_of_one_form_are_one_product(build: Callable[..., Built]) -> None:
    kinds = ("Q4_K", "Q4_1", "Q6_K", "F16", "F32", "Q4_0")
    built = build(**{kind: normal(kind, 32 + i, seed=i) for i, kind in enumerate(kinds)})
    x = activations(3)
    y = built.linears.apply(built.graph, built.input("x", "FLOAT", "n", K), product(*kinds))
    want = np.concatenate([x @ dense(built.model, kind).T for kind in kinds], axis=2)
    assert relative(built.run(y, 0, x=x), want) < 1e-5
    assert built.ops().count("MatMulNBits") == 3
    sizes = [dict(zip("KN", (a.i for a in node.attribute if a.name in "KN"), strict=True))
             for node in built.graph._nodes if node.op_type == "MatMulNBits"]  # fmt: skip
    assert [size["N"] for size in sizes] == [32 + 33, 34, 37]


@pytest.mark.parametrize("kind", TYPES)
def test_embedding_is_exact(build: Callable[..., Built], kind: str) -> None:
    built = build(w=normal(kind))
    ids = np.array([[0, 95, 7, 7, 1]])
    y = built.linears.embedding(built.graph, built.input("ids", "INT64", "n"), "w")
    got, want = built.run(y, ids=ids), dense(built.model, "w")[ids]
    assert got.shape == want.shape
    form = form_of(kind)
    if form is None or not form.has_offset:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q4_K", "F16"])
def test_a_tied_table_is_written_once(build: Callable[..., Built], kind: str) -> None:
    built = build(w=normal(kind))
    g, linears, path = built.graph, built.linears, built.data.path
    ids = np.array([[3, 1]])
    x = linears.embedding(g, built.input("ids", "INT64", "n"), "w")
    built.data._file.flush()
    size = path.stat().st_size
    y = linears.apply(g, x, product("w"))
    got, table = built.run(y, 0, ids=ids), dense(built.model, "w")
    assert relative(got, table[ids] @ table.T) < 1e-5
    assert path.stat().st_size == size


def test_graphs_share_a_weight(build: Callable[..., Built]) -> None:
    built, graphs = build(w=normal("Q4_K")), [GraphWriter(name, 21) for name in "ab"]
    for g in graphs:
        built.linears.apply(g, g.input("x", g.types.FLOAT, [1, 1, K]), product("w"))
    a, b = ([t.SerializeToString() for t in g._initializers.values()] for g in graphs)
    assert a == b


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16"])
def test_damaged_floats_are_refused(build: Callable[..., Built], kind: str) -> None:
    shape = (40, SIZES[kind].block_bytes * 64)
    raw = np.zeros(shape, np.uint8)
    raw[33, -2:] = 0xFF  # NaN
    built = build(w=(kind, raw))
    x = built.input("x", "FLOAT", "n", 64)
    with pytest.raises(ModelFileError, match="row 33, column 63 is NaN or infinite"):
        built.linears.apply(built.graph, x, product("w"))


def test_codes_are_written_slice_by_slice(
    build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bytes, of which the file's own pages are let go each time."""
    monkeypatch.setattr(blocks, "_SLICE", 1 << 14)
    built, forgotten = build(v=normal("Q4_K"), w=normal("Q4_1")), list[int]()
    monkeypatch.setattr(built.model, "forget", lambda: forgotten.append(1))
    y = built.linears.apply(built.graph, built.input("x", "FLOAT", "n", K), product("v", "w"))
    x = activations(2)
    want = np.concatenate([x @ dense(built.model, name).T for name in "vw"], axis=2)
    assert relative(built.run(y, 0, x=x), want) < 1e-5
    assert len(forgotten) == 6
