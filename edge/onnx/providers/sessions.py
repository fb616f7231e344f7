"""Sessions of onnxruntime, each with the part of the graph that its provider really runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import context, saturation
from edge.onnx.providers.partition import Partition
from edge.onnx.providers.providers import Target, is_simulated, onnxruntime

__all__ = ["ON_CPU", "OpenedGraph", "explain", "open_graph"]

#: The graph that always runs on the CPU: it looks up rows of tables by token and position.
ON_CPU = "embedding"
_REFUSED = "fallback to CPU EP has been explicitly disabled"
_SHARED = "Attempt to replace the existing tensor"  # of 1.25.1 to 1.32.0, when weights become uint8
_BAD_FILE = ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NoSuchFile")


@dataclass(frozen=True)
class OpenedGraph:
    """A session of onnxruntime that is ready to run.

    source: says where the compiled graph was read or written, "": there is no compiled graph.
    """

    session: Any
    partition: Partition
    target: Target
    source: str = ""


def open_graph(
    graph: OnnxFile, target: Target, config: Mapping[str, str] | None = None
) -> OpenedGraph:
    """A session of one graph. config: more entries of the session's configuration.

    Raises ModelFileError for a damaged graph, UnsupportedError if the provider would not run all
    of it, and for a graph compiled for another provider, SDK or SoC.
    """
    path = graph.path
    context.require(graph, target)
    config = {**saturation.settings(graph), **(config or {})}
    if target.provider.name == "cpu":
        return OpenedGraph(_session(path, target, config), Partition.of_cpu(graph), target)
    strict = {} if target.fallback else {"session.disable_cpu_ep_fallback": "1"}
    try:
        session = _session(path, target, {**config, **strict})
    except _PartlyOnCpu:
        session = _session(path, target, {})  # open it again, to find the operators
        raise _partly(path, target, Partition.of(session, target.provider.ep, graph)) from None
    partition = Partition.of(session, target.provider.ep, graph)
    is_used = target.provider.ep in session.get_providers()
    if not target.fallback and not (is_used and partition.whole):
        raise _partly(path, target, partition)
    return OpenedGraph(session, partition, target)


class _PartlyOnCpu(Exception):
    """onnxruntime would give a part of the graph to the CPU."""


def _session(path: Path, target: Target, config: Mapping[str, str]) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.log_severity_level = 4  # the exception has the text of an error, too
    entries = {"session.record_ep_graph_assignment_info": "1", **config}
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        with _spared_stdout():
            providers = target.provider.attach(ort, options, target)
            return ort.InferenceSession(os.fspath(path), sess_options=options, providers=providers)
    except EdgeError:
        raise
    except Exception as e:  # onnxruntime's exceptions have no common base class
        message = " ".join(str(e).split())
        if _REFUSED in message:
            raise _PartlyOnCpu from e
        if _SHARED in message:
            raise saturation.inexact(path, "several nodes share a weight or a zero point") from e
        if target.provider.name == "cpu" or type(e).__name__ in _BAD_FILE:
            raise ModelFileError(
                f"onnxruntime cannot load it: {message}{_hint(target)}", path=path
            ) from e
        raise UnsupportedError(
            f"{path}: {target} cannot run it: {message}{_hint(target)}", what=target.provider.name
        ) from e


def _partly(path: Path, target: Target, partition: Partition) -> UnsupportedError:
    """The error for a graph that the provider runs only in part; it names the operators."""
    return UnsupportedError(
        f"{path}: {target} would not run all of it: {partition}{_hint(target)}; or allow it: "
        "--fallback",
        what=partition.left or target.provider.name,
    )


def _hint(target: Target) -> str:
    """The advice of a message about a model that was made for another provider."""
    name = target.provider.name
    if name == target.made_for.partition(":")[0]:
        return ""
    dialect = target.provider.dialect
    return (
        f"; it was made for {target.made_for}: `edge-run export --dialect {dialect} --ep {name}` "
        f"makes one for {name}"
    )


@contextlib.contextmanager
def _spared_stdout() -> Iterator[None]:
    """In the block, drop standard output: QNN's simulator writes a line into the user's output."""
    if not is_simulated() or sys.platform != "linux":
        yield
        return
    c, saved = ctypes.CDLL(None), -1
    with contextlib.suppress(OSError):
        c.fflush(None)
        saved = os.dup(1)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        if saved >= 0:
            c.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)


def explain(opened: Mapping[str, OpenedGraph]) -> list[str]:
    """Lines for people: the provider of each graph, and how much of the graph it runs."""
    targets = dict.fromkeys(str(graph.target) for name, graph in opened.items() if name != ON_CPU)
    lines = [f"runs on {target}" for target in targets]
    for name, graph in opened.items():
        place = f"{graph.target.provider.name} on {graph.target.device}"
        lines.append(f"{name}: {place}: {graph.partition}")
        if graph.source:
            lines.append(f"{name}: {graph.source}")
    if any(graph.target.provider.name == "coreml" for graph in opened.values()):
        lines.append("Core ML may run parts of that on the CPU itself, and does not tell")
    return lines
