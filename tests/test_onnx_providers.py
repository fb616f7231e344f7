"""Providers of onnxruntime: what counts as here, and no session that runs in part on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnxgraphs import K, cut, open_sessions, quantized

from edge.cli import cli
from edge.errors import InputError, ModelFileError, UnsupportedError
from edge.onnx.export.export import Recipe
from edge.onnx.providers import providers
from edge.onnx.providers.partition import Partition
from edge.onnx.providers.providers import PROVIDERS, Availability, Target, choose
from edge.onnx.providers.sessions import OpenedGraph, explain

#: Providers that can be installed -> what names what to install.
PACKAGES = {"qnn": "onnxruntime-qnn", "openvino": "onnxruntime-openvino", "coreml": "macOS"}


def here(
    monkeypatch: pytest.MonkeyPatch, name: str, *devices: str, missing: str | None = None
) -> None:
    """As if the provider had these devices; none: as if it were not installed."""
    availability = Availability(
        "1.0", "2.0", devices, missing or (None if devices else "install it")
    )
    row = dataclasses.replace(PROVIDERS[name], look=lambda: availability)
    monkeypatch.setitem(PROVIDERS, name, row)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but onnxruntime's own CPU provider is installed."""
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)
    ort = providers.onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.usefixtures("bare")
def test_what_is_absent_names_what_to_install(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not here: .*{PACKAGES[name]}"):
        choose(name, name, threads=1, soc="sm8650" if name == "qnn" else None)


@pytest.mark.parametrize("name", ["rknpu", "hailo", "vitisai", "nnapi"])
def test_what_onnxruntime_cannot_reach_says_what_can(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not here: .*(RKLLM|HailoRT|AMD|qnn)"):
        choose(name, "qnn", threads=1)


@pytest.mark.parametrize("row", PROVIDERS.values(), ids=PROVIDERS.keys())
def test_rows_say_what_is_here_and_never_raise(row: providers.Provider) -> None:
    found = row.look()
    assert (found.missing is None) == bool(found.devices)
    assert found.missing is not None or found.version
    assert row.dialect in ("cpu", "npu")


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert all(row.look().missing for row in PROVIDERS.values())
    with pytest.raises(UnsupportedError, match='pip install "onnx>='):
        choose("cpu", "cpu", threads=1)


@pytest.mark.parametrize(
    ("ep", "soc", "what"),
    [
        ("gpu", None, "one of auto, cpu, qnn"),
        ("", None, "one of auto"),
        ("qnn", "sm1", "soc 'sm1': one of sm8550"),
        ("cpu", "sm8650", "is for qnn"),
    ],
)
def test_what_is_no_provider_and_no_soc(ep: str, soc: str | None, what: str) -> None:
    with pytest.raises(InputError, match=what):
        choose(ep, "cpu", threads=1, soc=soc)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"dialect": "npu", "socs": ("sm1",)}, "soc 'sm1': one of sm8550"),
        ({"dialect": "npu", "ep": "openvino", "socs": ("sm8650",)}, "this is made for openvino"),
        ({"dialect": "cpu", "socs": ("sm8650",)}, "for dialect npu alone"),
    ],
)
def test_what_is_exported_for_a_soc(recipe: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Recipe(**recipe)


@pytest.mark.usefixtures("bare")
def test_a_compiler_that_is_not_here_is_missed_before_the_export() -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime-qnn"):
        Recipe("npu", socs=("sm8650",))


def test_qnn_is_not_simulated_without_a_soc(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "qnn", "HTP")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(UnsupportedError, match=r"--soc .*sm8650"):
        choose("qnn", "qnn", threads=1)
    assert choose("qnn", "qnn", threads=1, soc="sm8650").soc == "sm8650"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert choose("qnn", "qnn", threads=1).soc is None


def test_an_npu_that_is_asked_for_is_an_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "openvino", "CPU")
    with pytest.raises(UnsupportedError, match=r"finds no NPU on this machine .*openvino:cpu"):
        choose("openvino:npu", "openvino", threads=1)
    target = choose("openvino", "openvino", threads=1)
    assert (target.device, target.why) == ("CPU", "there is no NPU")
    here(monkeypatch, "openvino", "NPU", "GPU", "CPU")
    assert choose("openvino", "openvino", threads=1).device == "NPU"
    assert choose("openvino:gpu", "openvino", threads=1).device == "GPU"


def test_auto_takes_the_one_it_was_made_for_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here(monkeypatch, "openvino", "NPU", "CPU")
    assert str(choose("auto", "openvino", threads=2)) == "openvino on NPU"
    here(monkeypatch, "openvino")
    target = choose("auto", "openvino", threads=2)
    assert target.provider.name == "cpu" and "install it" in str(target)
    with pytest.raises(UnsupportedError):
        choose(None, "openvino", threads=2)
    assert choose(None, "openvino", threads=2, fallback=True).provider.name == "cpu"


def test_devices_lists_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "openvino", "NPU", "CPU")
    here(monkeypatch, "qnn")
    lines = CliRunner().invoke(cli, ["devices"]).output
    assert "openvino  here     NPU, CPU: onnxruntime-openvino 1.0 (SDK 2.0)" in lines
    assert "qnn       missing  install it" in lines
    facts = json.loads(CliRunner().invoke(cli, ["devices", "--json"]).output)
    assert [row["name"] for row in facts["providers"]] == list(PROVIDERS)
    assert facts["socs"] == list(providers.SOCS)


# ---- sessions ----


def test_the_cpu_provider_runs_all(tmp_path: Path) -> None:
    target = choose("cpu", "cpu", threads=1)
    opened = open_sessions({"model": cut(tmp_path / "m.onnx")}, target)["model"]
    assert opened.session.run(None, {"x": np.ones((1, 1, K), np.float32)})[0].shape == (1, 1, 32)
    assert opened.partition.whole and opened.partition.multiply_adds == K * 32
    assert explain({"model": opened}) == [
        "runs on cpu on CPU",
        "model: cpu on CPU: 3 of 3 nodes, 100.0 % of the multiply-adds with weights, in 1 piece",
    ]
    beside = explain({"embedding": opened})  # that the tables are on the CPU is no news
    assert not any(line.startswith("runs on") for line in beside)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = quantized(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"QuantizeLinear", b"Quantizelinear"))
    with pytest.raises(ModelFileError, match="onnxruntime cannot load it"):
        open_sessions({"model": path}, choose("cpu", "cpu", threads=1))


def nodes(*operators: str) -> list[Any]:
    return [SimpleNamespace(name=op.lower(), op_type=op) for op in operators]


class Session:
    """onnxruntime's session of `cut`, on a provider that has all but the norm."""

    refuses = True  # when onnxruntime is told to
    is_strict = False

    def __init__(self, path: str, *, sess_options: Any, providers: Any) -> None:
        with contextlib.suppress(RuntimeError):  # there is no such entry
            sess_options.get_session_config_entry("session.disable_cpu_ep_fallback")
            self.is_strict = True
        if self.is_strict and self.refuses:
            raise ValueError("fallback to CPU EP has been explicitly disabled by the user")

    def get_providers(self) -> list[str]:
        return ["QNNExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=ep, get_nodes=lambda ops=ops: nodes(*ops))
            for ep, ops in (
                ("QNNExecutionProvider", ["MatMul"]),
                ("CPUExecutionProvider", ["SkipSimplifiedLayerNormalization"]),
                ("QNNExecutionProvider", ["Relu"]),
            )
        ]


class Silent(Session):
    """onnxruntime that does not do what it is told."""

    refuses = False

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


@pytest.fixture
def fake_qnn(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Session]], Target]:
    """A target whose sessions are of this class."""

    def make(kind: type[Session]) -> Target:
        monkeypatch.setattr(providers.onnxruntime(), "InferenceSession", kind)
        row = dataclasses.replace(PROVIDERS["qnn"], attach=lambda *_: None)
        return Target(row, "HTP", 1, soc="sm8650", made_for="qnn")

    return make


@pytest.mark.parametrize("kind", [Session, Silent])
def test_partly_on_the_cpu_names_the_operators(
    kind: type[Session], fake_qnn: Callable[[type[Session]], Target], tmp_path: Path
) -> None:
    with pytest.raises(
        UnsupportedError, match=r"SkipSimplifiedLayerNormalization \(1\).*--fallback"
    ):
        open_sessions({"model": cut(tmp_path / "m.onnx")}, fake_qnn(kind))


def test_fallback_opts_in_and_is_explained(
    fake_qnn: Callable[[type[Session]], Target], tmp_path: Path
) -> None:
    target = dataclasses.replace(fake_qnn(Session), fallback=True)
    opened = open_sessions({"model": cut(tmp_path / "m.onnx")}, target)
    share = "2 of 3 nodes, 100.0 % of the multiply-adds with weights, in 2 pieces"
    left = "on the CPU: SkipSimplifiedLayerNormalization (1)"
    assert explain(opened)[1] == f"model: qnn on HTP: {share}; {left}"


def test_a_model_of_another_provider_says_how_to_make_one(
    fake_qnn: Callable[[type[Session]], Target], tmp_path: Path
) -> None:
    target = dataclasses.replace(fake_qnn(Session), made_for="openvino")
    with pytest.raises(UnsupportedError, match=r"made for openvino: .*--dialect npu --ep qnn"):
        open_sessions({"model": cut(tmp_path / "m.onnx")}, target)


def test_the_embedding_is_looked_up_on_the_cpu(tmp_path: Path) -> None:
    target = Target(PROVIDERS["qnn"], "HTP", 1, soc="sm8650", made_for="qnn")
    opened = open_sessions({"embedding": cut(tmp_path / "m.onnx")}, target)
    assert opened["embedding"].target.provider.name == "cpu"


def test_multiply_adds_of_rewritten_nodes_are_not_claimed() -> None:
    graph: Any = SimpleNamespace(multiply_adds=lambda: {"matmul": 10, "other": 30})
    partition = Partition.of(object.__new__(Session), "QNNExecutionProvider", graph)
    assert (partition.multiply_adds, partition.multiply_adds_on_provider) == (40, 10)
    assert not partition.whole


def test_opened_says_where_a_compiled_graph_is(tmp_path: Path) -> None:
    target = choose("cpu", "cpu", threads=1)
    opened = OpenedGraph(None, Partition(1, 1, 1, 0, 0), target, source="compiled, from x")
    assert explain({"token": opened})[1:] == [
        "token: cpu on CPU: 1 of 1 nodes, in 1 piece",
        "token: compiled, from x",
    ]
