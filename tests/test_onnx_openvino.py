"""With OpenVINO, whose onnxruntime takes the place of the other: whole graphs or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnxgraphs import K, blocks, open_sessions, quantized

from edge.errors import InputError, UnsupportedError
from edge.onnx.providers.providers import choose
from edge.onnx.providers.sessions import explain

pytestmark = pytest.mark.openvino


@pytest.mark.parametrize("make", [blocks, quantized])
def test_a_graph_is_one_piece_on_its_cpu_device(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    graph, x = {"m": make(tmp_path / "m.onnx")}, {"x": np.ones((1, 1, K), np.float32)}
    target = choose("openvino:cpu", "openvino", threads=1)
    opened = open_sessions(graph, target, b"key")["m"]
    assert opened.partition.whole and opened.partition.pieces == 1
    assert explain({"m": opened})[0] == "runs on openvino on CPU"
    cpu = open_sessions(graph, choose("cpu", "cpu", threads=1))["m"]
    wanted = cpu.session.run(None, x)[0]
    np.testing.assert_allclose(opened.session.run(None, x)[0], wanted, atol=0.02)


def test_without_a_device_it_says_what_it_takes() -> None:
    target = choose("openvino", "openvino", threads=1)
    assert str(target) == "openvino on CPU (there is no NPU)"


@pytest.mark.parametrize("kind", ["npu", "gpu"])
def test_a_device_that_is_not_here_raises(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"finds no {kind.upper()} on this machine"):
        choose(f"openvino:{kind}", "openvino", threads=1)


def test_a_session_that_is_silently_on_the_cpu_is_caught(tmp_path: Path) -> None:
    """As if OpenVINO had named a device that it then cannot open."""
    target = dataclasses.replace(choose("openvino", "openvino", threads=1), device="NPU")
    with pytest.raises(UnsupportedError, match=r"0 of 2 nodes.*MatMulNBits \(1\)"):
        open_sessions({"m": blocks(tmp_path / "m.onnx")}, target)


def test_qnn_is_absent_beside_it() -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime-qnn"):
        choose("qnn", "qnn", threads=1, soc="sm8650")
    with pytest.raises(InputError, match="is for qnn"):
        choose("openvino", "openvino", threads=1, soc="sm8650")
