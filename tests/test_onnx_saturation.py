"""Products of uint8 and int8: right on every CPU, or an error. Run on an emulated one, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxgraphs import quantized

from edge.errors import UnsupportedError
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import saturation
from edge.onnx.providers.providers import choose
from edge.onnx.providers.sessions import open_graph

K = 64


def dynamic(path: Path, *, shared: str = "", inside: bool = False) -> Path:
    """y = x @ w0 @ w1, each x quantised to uint8 as it comes. shared: what of both products is
    one tensor, `w` or `z`; inside: the second product is in a graph of an If.
    """
    rng = np.random.default_rng(0)
    tensors, steps = {"scale": np.float32(0.002)}, []
    for i in range(2):
        w, z = (name if name == shared else f"{name}{i}" for name in "wz")
        tensors.setdefault(w, rng.integers(-127, 128, (K, K)).astype(np.int8))
        tensors.setdefault(z, np.int8(0))
        x, y = ("x", "m") if i == 0 else ("m", "y")
        steps.append(product(x, w, z, f"{y}.inner" if inside and i else y))
    if inside:
        bodies = {
            f"{name}_branch": helper.make_graph(
                [*renamed(steps[1], name)], name, [], [value(f"{name}y.inner")]
            )
            for name in ("then", "else")
        }
        steps[1] = [helper.make_node("If", ["yes"], ["y"], **bodies)]
    graph = helper.make_graph(
        [*steps[0], *steps[1]],
        "small",
        [value("x"), *([helper.make_tensor_value_info("yes", TensorProto.BOOL, [])] * inside)],
        [value("y")],
        [numpy_helper.from_array(np.asarray(t), name) for name, t in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def value(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, K])


def product(x: str, w: str, z: str, y: str) -> list[Any]:
    """y = x @ w * scale."""
    q, s, zero, whole, both, floats = (f"{y}.{i}" for i in range(6))
    return [
        helper.make_node("DynamicQuantizeLinear", [x], [q, s, zero]),
        helper.make_node("MatMulInteger", [q, w, zero, z], [whole]),
        helper.make_node("Cast", [whole], [floats], to=TensorProto.FLOAT),
        helper.make_node("Mul", [s, "scale"], [both]),
        helper.make_node("Mul", [floats, both], [y]),
    ]


def renamed(nodes: list[Any], prefix: str) -> list[Any]:
    """The same nodes; what they make has other names."""
    made = {name for node in nodes for name in node.output}
    for_each = [helper.make_node(node.op_type, [], []) for node in nodes]
    for new, node in zip(for_each, nodes, strict=True):
        new.CopyFrom(node)
        new.input[:] = [prefix + name if name in made else name for name in node.input]
        new.output[:] = [prefix + name for name in node.output]
    return for_each


def run(path: Path, x: np.ndarray) -> np.ndarray:
    opened = open_graph(OnnxFile.read(path), choose("cpu", "cpu", threads=1))
    values = {"x": x, "yes": np.array(True)}
    names = [i.name for i in opened.session.get_inputs()]
    return opened.session.run(None, {name: values[name] for name in names})[0]


def exact(path: Path, x: np.ndarray) -> np.ndarray:
    """By numpy, with inputs in 8 bits as onnxruntime makes them."""
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for w in [tensors.get(f"w{i}", tensors.get("w")) for i in range(2)]:
        low, high = min(x.min(), 0), max(x.max(), 0)
        step = np.float32((high - low) / 255)
        zero = np.rint(-low / step)
        codes = np.clip(np.rint(x / step) + zero, 0, 255)
        x = ((codes - zero) @ w.astype(np.float64) * step * tensors["scale"]).astype(np.float32)
    return x


def test_products_are_exact(tmp_path: Path) -> None:
    path = dynamic(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((1, K)).astype(np.float32)
    np.testing.assert_allclose(run(path, x), exact(path, x), atol=1e-4)
    graph = OnnxFile.read(path)
    held_twice = 2 * K * K if saturation.saturates() else 0
    assert saturation.exact_bytes(graph) == held_twice


@pytest.mark.parametrize("shared", ["w", "z"])
def test_shared_tensors_are_exact_or_refused(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime 1.32.0 cannot make them exact."""
    path = dynamic(tmp_path / "m.onnx", shared=shared)
    monkeypatch.setattr(saturation, "saturates", lambda: False)
    assert run(path, np.ones((1, K), np.float32)).shape == (1, K)
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    try:
        found = run(path, np.ones((1, K), np.float32))
    except UnsupportedError as e:
        assert "no VNNI" in str(e) and "share a weight or a zero point" in str(e)
    else:
        np.testing.assert_allclose(found, exact(path, np.ones((1, K), np.float32)), atol=1e-4)


def test_products_inside_a_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dynamic(tmp_path / "m.onnx", inside=True)
    monkeypatch.setattr(saturation, "saturates", lambda: False)
    assert run(path, np.ones((1, K), np.float32)).shape == (1, K)
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    with pytest.raises(UnsupportedError, match="graphs inside the graph multiply"):
        run(path, np.ones((1, K), np.float32))


def test_weights_that_are_held_twice_are_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = OnnxFile.read(dynamic(tmp_path / "m.onnx"))
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    assert saturation.exact_bytes(graph) == 2 * K * K
    assert saturation.settings(graph) == {"session.x64quantprecision": "1"}


def test_our_own_int8_weights_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their activations are uint16."""
    monkeypatch.setattr(saturation, "saturates", lambda: True)
    graph = OnnxFile.read(quantized(tmp_path / "m.onnx"))
    assert saturation.exact_bytes(graph) == 0 and saturation.settings(graph) == {}
