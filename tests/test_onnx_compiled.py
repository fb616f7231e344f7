"""Compiled graphs in a cache: used when they are what was asked for, and never when not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onnxgraphs import context, open_sessions, quantized, read

from edge.cli import cli
from edge.disk import room
from edge.errors import ModelFileError, UnsupportedError
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import compiled, sessions
from edge.onnx.providers.partition import Partition
from edge.onnx.providers.providers import PROVIDERS, Availability, Target
from edge.onnx.providers.sessions import OpenedGraph

KEY = b"\x01\x02"


class Compiler:
    """A provider that writes plain files, as QNN would binaries. fails: an error for each graph
    that is to be kept.
    """

    def __init__(self) -> None:
        self.compiled = self.loaded = 0
        self.fails: Exception | None = None
        self.availability = Availability("2.7.0", "2.51.0", ("HTP",))
        self.row = dataclasses.replace(PROVIDERS["qnn"], look=lambda: self.availability)

    @property
    def target(self) -> Target:
        return Target(self.row, "HTP", 1, soc="sm8650", made_for="qnn")

    def open_graph(self, graph: OnnxFile, target: Target, config: dict[str, str]) -> OpenedGraph:
        path = graph.path
        if graph.nodes[0].op == "EPContext":
            self.loaded += 1
            return OpenedGraph(f"EPContext of {path.name}", Partition(1, 1, 1, 0, 0), target)
        self.compiled += 1
        if place := config.get("ep.context_file_path"):
            if self.fails:
                raise self.fails
            context(Path(place))
            Path(place).with_name(f"{path.stem}_qnn.bin").write_bytes(b"binary" * 1000)
        return OpenedGraph(f"EPContext of {path.name}", Partition(7, 7, 1, 2048, 2048), target)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(sessions, "open_graph", made.open_graph)
    monkeypatch.setattr(room, "_SCRATCH_SECONDS", 0)
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    return made


@pytest.fixture
def graphs(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "model"
    return {n: quantized(folder / f"{n}.onnx", r) for n, r in (("chunk", 8), ("token", 1))}


def entry() -> Path:
    """The one that is in the cache."""
    ((path, _, _),) = compiled.entries()
    return path


def test_the_second_start_compiles_nothing(compiler: Compiler, graphs: dict[str, Path]) -> None:
    first = open_sessions(graphs, compiler.target, KEY)
    assert (compiler.compiled, compiler.loaded) == (2, 0)
    second = open_sessions(graphs, compiler.target, KEY)
    assert (compiler.compiled, compiler.loaded) == (2, 2)
    for name in graphs:
        assert second[name].session == first[name].session
        assert second[name].partition == first[name].partition
    assert "compiled now" in first["token"].source and "before" in second["token"].source


def test_what_decides_makes_another_entry(compiler: Compiler, graphs: dict[str, Path]) -> None:
    target = compiler.target
    open_sessions(graphs, target, KEY)
    open_sessions(graphs, target, b"another model")
    open_sessions(graphs, dataclasses.replace(target, soc="sm8550"), KEY)
    open_sessions({**graphs, "chunk": quantized(graphs["chunk"], 16)}, target, KEY)
    compiler.availability = dataclasses.replace(compiler.availability, sdk="2.52.0")
    open_sessions(graphs, target, KEY)
    assert (compiler.compiled, compiler.loaded, len(compiled.entries())) == (10, 0, 5)


def test_a_cache_that_moves_to_another_device_is_not_used(
    compiler: Compiler, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = dataclasses.replace(compiler.target, soc=None)  # which QNN finds out
    for board, n_compiled in (("one", 2), ("other", 4), ("one", 4)):
        monkeypatch.setattr("edge.device.cores.cpu_name", lambda board=board: board)
        open_sessions(graphs, target, KEY)
        assert compiler.compiled == n_compiled


@pytest.mark.parametrize("name", ["token_qnn.bin", "token.onnx"])
@pytest.mark.parametrize("how", [lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], None])
def test_a_changed_file_is_refused(
    name: str, how: Callable[[bytes], bytes] | None, compiler: Compiler, graphs: dict[str, Path]
) -> None:
    open_sessions(graphs, compiler.target, KEY)
    file = entry() / name
    if how:
        file.write_bytes(how(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(ModelFileError, match=rf"{name}: .*`edge-run cache --clear`"):
        open_sessions(graphs, compiler.target, KEY)
    assert compiler.loaded == 0


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(path.read_text())
    edit(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(format=2),
        lambda m: m.update(files={"../token_qnn.bin": [1, "00"]}),
        lambda m: m.update(files=[]),
        lambda m: m["graphs"]["token"].update(file="/etc/passwd"),
        lambda m: m["graphs"]["token"].update(file="other.onnx"),
        lambda m: m["graphs"]["token"].update(nodes=-1),
        lambda m: m["graphs"].update(token=3),
        lambda m: m["files"].update({"token.onnx": 3}),
        lambda m: m.update(made_from=None, graphs=7),
    ],
)
def test_a_damaged_manifest_is_refused(
    edit: Callable[[dict[str, Any]], object], compiler: Compiler, graphs: dict[str, Path]
) -> None:
    open_sessions(graphs, compiler.target, KEY)
    change(entry() / "manifest.json", edit)
    with pytest.raises(ModelFileError, match=r"manifest\.json"):
        open_sessions(graphs, compiler.target, KEY)


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", "[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(
    text: str, compiler: Compiler, graphs: dict[str, Path]
) -> None:
    open_sessions(graphs, compiler.target, KEY)
    (entry() / "manifest.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"manifest\.json"):
        open_sessions(graphs, compiler.target, KEY)


def ahead(compiler: Compiler, graphs: dict[str, Path], *, share: bool) -> Path:
    """As if the graphs had been exported with --soc."""
    want = compiled.identity(read(graphs), compiler.target, KEY)
    path = graphs["token"].parent / "compiled" / "sm8650"
    compiled.compile_into(path, read(graphs), compiler.target, want, share)
    compiler.compiled = 0
    return path


@pytest.mark.parametrize(
    ("fact", "value", "says"),
    [
        ("sdk", "2.50.0", r"another version of its SDK \(2.50.0, here is 2.51.0\)"),
        ("soc", "sm8550", r"another SoC \(sm8550, here is sm8650\)"),
        ("model", "00", "another model: export the model anew"),
        ("shapes", {}, "graphs of other shapes"),
        ("package", None, "another version of its package"),
    ],
)
def test_what_was_compiled_ahead_for_something_else_is_refused(
    fact: str, value: Any, says: str, compiler: Compiler, graphs: dict[str, Path]
) -> None:
    path = ahead(compiler, graphs, share=False)
    change(path / "manifest.json", lambda m: m["made_from"].update({fact: value}))
    with pytest.raises(UnsupportedError, match=says):
        open_sessions(graphs, compiler.target, KEY)
    assert (compiler.compiled, compiler.loaded) == (0, 0)


def test_what_was_compiled_ahead_comes_first(compiler: Compiler, graphs: dict[str, Path]) -> None:
    open_sessions(graphs, compiler.target, KEY)
    path = ahead(compiler, graphs, share=False)
    opened = open_sessions(graphs, compiler.target, KEY)
    assert opened["token"].source == f"compiled before, in {path}"
    (path / "token_qnn.bin").unlink()
    with pytest.raises(ModelFileError, match="export the model anew with --soc"):
        open_sessions(graphs, compiler.target, KEY)


@pytest.mark.parametrize(("machine", "compiles"), [("x86_64", 2), ("aarch64", 0)])
def test_the_simulator_is_spared_two_graphs_in_one_binary(
    machine: str,
    compiles: int,
    compiler: Compiler,
    graphs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead(compiler, graphs, share=True)
    monkeypatch.setattr("platform.machine", lambda: machine)
    open_sessions(graphs, compiler.target, KEY)
    assert compiler.compiled == compiles


# ---- whole or not there ----


def test_an_interrupted_compile_leaves_nothing(
    compiler: Compiler, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compiled, "_seal", stop)
        open_sessions(graphs, compiler.target, KEY)
    assert [path.name for path in compiled.folder().iterdir()] == [".lock"]
    left = compiled.folder() / ".compile-killed"
    left.mkdir()
    open_sessions(graphs, compiler.target, KEY)
    assert not left.exists() and entry().is_dir()


@pytest.mark.parametrize("error", [OSError("no space"), UnsupportedError("write", what="qnn")])
def test_a_disk_that_refuses_costs_only_the_cache(
    error: Exception, compiler: Compiler, graphs: dict[str, Path]
) -> None:
    compiler.fails = error
    opened = open_sessions(graphs, compiler.target, KEY)
    assert opened.keys() == graphs.keys() and not compiled.entries()
    assert opened["token"].source == ""


def test_a_cache_that_is_off_or_a_file(
    compiler: Compiler, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_CACHE_SIZE", "0")
    open_sessions(graphs, compiler.target, KEY)
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "file"))
    open_sessions(graphs, compiler.target, KEY)
    assert (compiler.compiled, compiled.entries()) == (4, [])


def test_with_fallback_nothing_is_kept(compiler: Compiler, graphs: dict[str, Path]) -> None:
    target = dataclasses.replace(compiler.target, fallback=True)
    open_sessions(graphs, target, KEY)
    assert not compiled.entries()


def test_two_at_once_compile_once(compiler: Compiler, graphs: dict[str, Path]) -> None:
    pytest.importorskip("fcntl")
    threads = [
        threading.Thread(target=open_sessions, args=(graphs, compiler.target, KEY))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (compiler.compiled, compiler.loaded) == (2, 6)


def test_where_locks_do_not_work_the_first_wins(
    compiler: Compiler, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def nobody_waits(path: Path) -> Iterator[bool]:
        if compiler.compiled == 0:  # another process is faster
            compiler.compiled = 1
            open_sessions(graphs, compiler.target, KEY)
        yield False

    monkeypatch.setattr("edge.disk.atomic.only_one", nobody_waits)
    opened = open_sessions(graphs, compiler.target, KEY)
    assert opened.keys() == graphs.keys() and len(compiled.entries()) == 1


# ---- edge-run cache ----


def test_the_least_recently_used_makes_room(
    compiler: Compiler, graphs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in (b"1", b"2"):
        open_sessions(graphs, compiler.target, key)
    open_sessions(graphs, compiler.target, b"1")  # used again
    (newest, n_bytes, _), (oldest, _, _) = compiled.entries()
    monkeypatch.setenv("EDGE_CACHE_SIZE", str(2 * n_bytes))
    open_sessions(graphs, compiler.target, b"3")
    assert newest.is_dir() and not oldest.exists() and len(compiled.entries()) == 2


def test_the_cache_command_lists_and_clears(compiler: Compiler, graphs: dict[str, Path]) -> None:
    open_sessions(graphs, compiler.target, KEY)
    listed = CliRunner().invoke(cli, ["cache"]).output
    assert f"compiled: {entry().name}  " in listed
    facts = json.loads(CliRunner().invoke(cli, ["cache", "--json"]).output)
    assert facts["compiled"][0]["folder"] == entry().name
    removed = json.loads(CliRunner().invoke(cli, ["cache", "--clear", "--json"]).output)
    assert removed["removed"] == facts["compiled"][0]["bytes"] and not compiled.entries()
