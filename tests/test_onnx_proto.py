"""The reader of .onnx files: what it finds is what `onnx` finds; damage is one typed error."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from optimum import edit, to_external, write_optimum

from edge.errors import ModelFileError
from edge.onnx.files.proto import OnnxFile

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def graph(tiny_gguf: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged decoder, with graphs inside it. Do not change it."""
    folder = tmp_path_factory.mktemp("proto") / "model"
    write_optimum(tiny_gguf(), folder, merged=True)
    return folder / "onnx" / "decoder_model_merged.onnx"


def small(path: Path, **external: str) -> Path:
    """y = x W of 4 x 4; external: what external_data of W says."""
    w = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    if external:
        w.ClearField("raw_data")
        w.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            w.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(n, 1, ["n", 4]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    made = helper.make_graph([node], "g", values[:1], values[1:], [w])
    path.write_bytes(helper.make_model(made).SerializeToString())
    return path


def test_finds_what_onnx_finds(graph: Path) -> None:
    model, found = onnx.load(graph), OnnxFile.read(graph)
    assert [n.op_type for n in model.graph.node] == [n.op for n in found.nodes]
    assert [list(n.input) for n in model.graph.node] == [list(n.inputs) for n in found.nodes]
    assert {t.name: tuple(t.dims) for t in model.graph.initializer} == {
        name: t.dims for name, t in found.initializers.items()
    }
    assert [i.name for i in model.graph.input] == list(found.inputs)
    assert found.inputs["past_key_values.0.key"].dims == (1, 2, "past", 16)
    assert found.inputs["past_key_values.0.key"].dtype == "float32"
    assert found.opsets == {"": 18} and found.producer == "edge"
    assert {n.op for n in found.inner_nodes} == {"Constant"}


def test_attributes(graph: Path) -> None:
    nodes = {node.op: node.attributes for node in OnnxFile.read(graph).nodes}
    assert nodes["Transpose"]["perm"] == (0, 2, 1, 3)
    assert nodes["Softmax"]["axis"] == -1


def test_metadata_and_kinds_of_attributes(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        helper.set_model_props(model, {"key": "value"})
        more = helper.make_node("Custom", ["x"], [], domain="ours", f=1.5, s="text", i=-3, l=[1, 2])
        model.graph.node.append(more)

    found = OnnxFile.read(edit(small(tmp_path / "m.onnx"), change))
    assert found.metadata == {"key": "value"}
    assert found.nodes[1].domain == "ours"
    assert found.nodes[1].attributes == {"f": 1.5, "s": b"text", "i": -3, "l": (1, 2)}


def test_initializers_are_no_inputs(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 4]))

    assert list(OnnxFile.read(edit(small(tmp_path / "m.onnx"), change)).inputs) == ["x"]


def test_multiply_adds(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "scale"], ["w2"]),
            helper.make_node("Gemm", ["y", "w2"], ["z"]),
            helper.make_node("MatMulNBits", ["y", "q"], ["v"], "bits", domain="d", K=64, N=32),
            helper.make_node("MatMul", ["y", "z"], ["two values"]),
        ]
        model.graph.node.extend(nodes)

    found = OnnxFile.read(edit(small(tmp_path / "m.onnx"), change))
    assert found.multiply_adds() == {"product": 16, "z": 16, "bits": 2048}


def test_weights_in_another_file(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph.read_bytes())
    before = OnnxFile.read(path)
    after = OnnxFile.read(to_external(path))
    assert after.files == [path, tmp_path / "model.onnx_data"]
    assert after.weight_bytes == before.weight_bytes
    assert any(t.external for t in after.initializers.values())


@pytest.mark.parametrize(
    ("external", "message"),
    [
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "../data"}, "outside the model's folder"),
        ({"location": "sub/../../data"}, "outside the model's folder"),
        ({"location": "C:\\data"}, "outside the model's folder"),
        ({"location": "..\\data"}, "outside the model's folder"),
        ({"location": ""}, "no file's name"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "no file's name"),
        ({"location": "data\0"}, "no file's name"),
        ({"location": "absent"}, "missing"),
        ({"location": "."}, "missing"),
        ({"location": "link"}, "leads outside"),
        ({"location": "folder/data"}, "leads outside"),
        ({"location": "data", "offset": "1"}, "cut short"),
        ({"location": "data", "offset": "-1"}, "offset of its external data is '-1'"),
        ({"location": "data", "offset": "9" * 30}, "offset of its external data"),
        ({"location": "data", "length": "8"}, "8 bytes of external data, it has 64"),
        ({"location": "data", "length": "x"}, "length of its external data is 'x'"),
    ],
)
def test_external_data_that_may_not_be_read(
    tmp_path: Path, external: dict[str, str], message: str
) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    for file in (folder / "data", outside / "data"):
        file.write_bytes(bytes(64))
    (folder / "link").symlink_to(outside / "data")
    (folder / "folder").symlink_to(outside)
    with pytest.raises(ModelFileError, match=message):
        OnnxFile.read(small(folder / "m.onnx", **external))


def test_a_download_that_is_kept_once_and_linked_to(tmp_path: Path) -> None:
    store, folder = tmp_path / "blobs", tmp_path / "snapshots" / "onnx"
    store.mkdir()
    folder.mkdir(parents=True)
    (store / "123").write_bytes(bytes(64))
    (folder / "data").symlink_to(store / "123")
    (folder / "m.onnx").symlink_to(small(store / "456", location="data"))
    assert OnnxFile.read(folder / "m.onnx").weight_bytes == 64


@pytest.mark.parametrize("where", ["branch", "constant", "sparse", "function"])
def test_external_data_anywhere_is_looked_at(tmp_path: Path, where: str) -> None:
    tensor = TensorProto(name="t", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")

    def change(model: Any) -> None:
        if where == "branch":
            inner = helper.make_graph([], "inner", [], [], [tensor])
            model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner))
        elif where == "constant":
            model.graph.node.append(helper.make_node("Constant", [], ["z"], value=tensor))
        elif where == "sparse":
            model.graph.sparse_initializer.add().values.CopyFrom(tensor)
        else:
            node = helper.make_node("Constant", [], ["z"], value=tensor)
            model.functions.add(name="f", domain="d").node.append(node)

    with pytest.raises(ModelFileError, match="outside the model's folder"):
        OnnxFile.read(edit(small(tmp_path / "m.onnx"), change))


def test_a_compiled_graph_beside_which_its_binary_must_lie(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        place = {"embed_mode": 0, "ep_cache_context": "../other.bin"}
        model.graph.node.append(helper.make_node("EPContext", ["x"], ["z"], **place))

    with pytest.raises(ModelFileError, match="outside the model's folder"):
        OnnxFile.read(edit(small(tmp_path / "m.onnx"), change))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def nested(levels: int) -> bytes:
    """A graph in an attribute of a node of a graph ..."""
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x08\x0a", "holds no graph"),
        (b"GGUF" + bytes(40), "no ONNX model"),
        (b"\x80" * 40, "does not end"),
        (field(7, b"")[:1], "does not end"),
        (field(7, b"") * 2, "a second graph"),
        (b"\x3a\x7f", "127 bytes where 0 are left"),
        (b"\x38\x01", "a number where a message belongs"),
        (nested(40), "more than 16 levels"),
        (nested(3000), "more than 16 levels"),
        (field(7, field(5, b"\x10\x63")), "unknown type 99"),
        (field(7, field(5, b"\x10\x01\x08" + varint(2**64 - 1))), "has the shape"),
        (field(7, field(5, b"\x10\x01" + (b"\x08" + varint(1 << 60)) * 9)), "has the shape"),
        (field(7, field(5, b"\x10\x01" + b"\x08\x01" * 17)), "has the shape"),
        (field(7, field(1, field(3, b"\xff"))), "not UTF-8"),
        (field(7, field(1, field(3, bytes(1 << 17)))), "a name of 131072 bytes"),
        (field(7, field(5, field(8, b"w") + b"\x10\x01") * 2), "there twice"),
    ],
)
def test_damage_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (path := tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        OnnxFile.read(path)


def test_counts_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.onnx.files.protobuf._MOST_FIELDS", 50)
    (path := tmp_path / "m.onnx").write_bytes(field(7, field(5, field(1, b"\x01" * 60))))
    with pytest.raises(ModelFileError, match="more than 50 fields"):
        OnnxFile.read(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelFileError, match="cannot be read"):
            OnnxFile.read(path)


def check(path: Path, content: bytes) -> None:
    """Read it: either well, or ModelFileError."""
    path.write_bytes(content)
    try:
        OnnxFile.read(path).multiply_adds()
    except ModelFileError as e:
        assert "\n" not in str(e)


def test_truncations(graph: Path, tmp_path: Path) -> None:
    whole, rng = graph.read_bytes(), random.Random(0)
    for n in [*range(100), *(rng.randrange(len(whole)) for _ in range(50))]:
        check(tmp_path / "m.onnx", whole[:n])


def test_flips(graph: Path, tmp_path: Path) -> None:
    """Of the small file's every byte, and of some of a real one's."""
    rng = random.Random(1)
    little = small(tmp_path / "m.onnx", location="data").read_bytes()
    for i in range(len(little)):
        for value in (0, 0x80, 0xFF, little[i] ^ 1 << rng.randrange(8)):
            check(tmp_path / "m.onnx", little[:i] + bytes([value]) + little[i + 1 :])
    whole = bytearray(graph.read_bytes())
    for _ in range(50):
        damaged = whole.copy()
        for _ in range(4):
            damaged[rng.randrange(len(whole))] = rng.randrange(256)
        check(tmp_path / "m.onnx", bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.onnx"
    check(path, content)
    check(path, field(7, content))
    check(path, field(7, field(5, content) + field(1, content)))


def test_numbers_of_all_widths_are_passed_over(tmp_path: Path) -> None:
    extra = varint(900 << 3 | 1) + struct.pack("<d", 1) + varint(900 << 3 | 5) + bytes(4)
    path = small(tmp_path / "m.onnx")
    path.write_bytes(extra + path.read_bytes() + extra)
    assert list(OnnxFile.read(path).inputs) == ["x"]
    assert os.path.getsize(path) > 24
