"""On the simulator of Qualcomm's HTP: whole graphs or an error, and compiled graphs that are kept.

One SoC for all: the simulator keeps the first of a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxgraphs import K, blocks, cut, open_sessions, quantized
from onnxrun import write_npu

from edge.errors import InputError, ModelFileError, UnsupportedError
from edge.onnx.export.ahead import compile_for
from edge.onnx.export.export import Recipe
from edge.onnx.export.export import export as write
from edge.onnx.providers import compiled
from edge.onnx.providers.providers import SOCS, Target, choose
from edge.onnx.providers.sessions import explain
from edge.onnx.run.engine import OnnxEngine

pytestmark = pytest.mark.htp

SOC, KEY = "sm8650", b"a model"


@pytest.fixture
def target() -> Target:
    return choose("qnn", "qnn", threads=1, soc=SOC)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")


@pytest.fixture
def graphs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "model"
    return {n: quantized(folder / f"{n}.onnx", r) for n, r in (("chunk", 8), ("token", 1))}


def run(session: Any) -> np.ndarray:
    x = np.linspace(-1, 1, K, dtype=np.float32).reshape(1, 1, K)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize(("make", "most"), [(quantized, 0.005), (blocks, 0.02)])
def test_a_graph_is_one_piece(
    make: Callable[[Path], Path], most: float, tmp_path: Path, target: Target
) -> None:
    """Blocks, too, when the SoC is known."""
    path = make(tmp_path / "m.onnx")
    htp = open_sessions({"m": path}, target)["m"]
    assert htp.partition.whole and htp.partition.pieces == 1
    cpu = open_sessions({"m": path}, choose("cpu", "cpu", threads=1))["m"]
    np.testing.assert_allclose(run(htp.session), run(cpu.session), atol=most)


def test_what_htp_does_not_have_is_named(tmp_path: Path, target: Target) -> None:
    graph = {"m": cut(tmp_path / "m.onnx")}
    with pytest.raises(UnsupportedError, match=r"of 3 nodes.*SkipSimplifiedLayerNormalization"):
        open_sessions(graph, target)
    opened = open_sessions(graph, dataclasses.replace(target, fallback=True))
    assert "on the CPU: SkipSimplifiedLayerNormalization (1)" in explain(opened)[1]


def test_a_back_end_that_is_missing_is_no_silent_cpu(tmp_path: Path, target: Target) -> None:
    import onnxruntime as ort

    def attach(ort: Any, options: Any, target: Target) -> None:
        devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
        options.add_provider_for_devices(devices[:1], {"backend_type": "cpu"})

    path = quantized(tmp_path / "m.onnx")
    target = dataclasses.replace(
        target, provider=dataclasses.replace(target.provider, attach=attach)
    )
    with pytest.raises(UnsupportedError, match=r"0 of 7 nodes.*MatMul \(1\)"):
        open_sessions({"m": path}, target)
    silent = open_sessions({"m": path}, dataclasses.replace(target, fallback=True))["m"]
    assert silent.partition.on_provider == 0 and ort.__version__


def test_another_soc_needs_another_process(tmp_path: Path, target: Target) -> None:
    graph = {"m": quantized(tmp_path / "m.onnx")}
    open_sessions(graph, target)
    with pytest.raises(UnsupportedError, match=f"simulates {SOC} already"):
        open_sessions(graph, choose("qnn", "qnn", threads=1, soc="sm8750"))


def test_the_second_start_compiles_nothing(graphs: dict[str, Path], target: Target) -> None:
    first = open_sessions(graphs, target, KEY)
    ((entry, _, _),) = compiled.entries()
    files = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    second = open_sessions(graphs, target, KEY)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == files
    np.testing.assert_array_equal(run(first["token"].session), run(second["token"].session))
    assert second["token"].partition == first["token"].partition
    assert "compiled before" in second["chunk"].source


def test_a_changed_binary_never_reaches_qnn(graphs: dict[str, Path], target: Target) -> None:
    open_sessions(graphs, target, KEY)
    ((entry, _, _),) = compiled.entries()
    binary = entry / "token_qnn.bin"
    data = bytearray(binary.read_bytes())
    data[len(data) // 2] ^= 1
    binary.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"token_qnn.bin: was changed"):
        open_sessions(graphs, target, KEY)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"v2.51.0", b"v2.50.0", r"is of SDK 2\.50\.0\.\d+, here is 2\.51\.0"),
        (b":75:57:", b":73:43:", "is for the SoC 43"),
        (b'source"\x14QNN', b'source"\x14XNN', "is for XNNExecutionProvider"),
    ],
)
def test_a_foreign_compiled_graph_that_came_alone(
    old: bytes, new: bytes, says: str, graphs: dict[str, Path], target: Target
) -> None:
    open_sessions(graphs, target, KEY)
    ((entry, _, _),) = compiled.entries()
    path = entry / "token.onnx"
    assert path.read_bytes().count(old)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UnsupportedError, match=says):
        open_sessions({"token": path}, target)
    with pytest.raises(UnsupportedError, match=r"is for .NNExecutionProvider"):
        open_sessions({"token": path}, choose("cpu", "cpu", threads=1))


def test_standard_output_stays_the_answers(tmp_path: Path) -> None:
    path = quantized(tmp_path / "m.onnx")
    code = (
        "from edge.onnx.files.proto import *; from edge.onnx.providers.providers import *\n"
        "from edge.onnx.providers.sessions import *\n"
        f"target = choose('qnn', 'qnn', threads=1, soc={SOC!r})\n"
        f"open_graph(OnnxFile.read({str(path)!r}), target); print('answer')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "answer\n")


# ---- ahead of time ----


@pytest.fixture
def export(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model of dialect npu."""
    path = tiny_gguf("llama", ffn=512, vocab=512)
    return write_npu(path, tmp_path / "export", provider="qnn", weights="float16", chunk=8)


def test_weights_are_shared_and_other_sdks_refused(export: Path, target: Target) -> None:
    place = compile_for(export, "sm8750")  # this process simulates another one
    assert place == export / "compiled" / "sm8750"
    shared = (place / "chunk_qnn.bin").stat().st_size
    assert sorted(path.suffix for path in place.iterdir()) == [".bin", ".json", ".onnx", ".onnx"]
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["shared"] and manifest["made_from"]["soc"] == "sm8750"
    assert manifest["graphs"]["token"]["pieces"] == 1

    graphs = {name: export / f"{name}.onnx" for name in ("chunk", "token")}
    open_sessions(graphs, target, KEY)
    ((entry, _, _),) = compiled.entries()
    apart = sum(path.stat().st_size for path in entry.glob("*.bin"))
    assert shared < 0.75 * apart

    os.rename(place, place.with_name(SOC))
    with pytest.raises(UnsupportedError, match="compiled for another"):
        open_sessions(graphs, target, KEY)


def test_what_cannot_be_compiled_says_why(tmp_path: Path, export: Path) -> None:
    with pytest.raises(InputError, match="soc 'sm1': one of sm8550"):
        compile_for(export, "sm1")
    (export / "token.onnx").write_bytes(b"no graph")
    with pytest.raises(UnsupportedError, match=r"cannot be compiled for sm8650: .*token\.onnx"):
        compile_for(export, SOC)
    assert not list((export / "compiled").glob("*"))


def test_an_export_may_hold_compiled_graphs(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe("npu", context=128, socs=("sm8550", "sm8850"))
    for force in (False, True):
        facts = write(tiny_gguf("llama"), tmp_path / "model", recipe, force=force)
    for soc in ("sm8550", "sm8850"):
        assert facts["files"][f"compiled/{soc}/chunk_qnn.bin"] > 0
    OnnxEngine.load(tmp_path / "model", ep="cpu").close()


@pytest.mark.parametrize("soc", SOCS)
def test_every_soc_has_its_compiler(soc: str, export: Path) -> None:
    manifest = json.loads((compile_for(export, soc) / "manifest.json").read_text())
    assert manifest["made_from"]["soc"] == soc
    binary = (export / "compiled" / soc / "token.onnx").read_bytes()
    assert f":{SOCS[soc].htp_arch}:{SOCS[soc].soc_model}:".encode() in binary


def test_a_session_on_htp_says_what_one_on_the_cpu_says(export: Path) -> None:
    compile_for(export, SOC)
    said = []
    for options in ({"ep": "cpu"}, {"ep": "qnn", "soc": SOC}, {"ep": "auto", "soc": SOC}):
        engine = OnnxEngine.load(export, **options)
        cache = engine.cache()
        engine.run(cache, range(8), logits="none")
        said.append(engine.run(cache, [8]))
        engine.close()
    np.testing.assert_allclose(said[1], said[0], atol=0.03)
    np.testing.assert_array_equal(said[1], said[2])
