"""Execution providers of onnxruntime: which there are, what each needs, and what it really runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge.errors import InputError, ModelFileError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["PROVIDERS", "Opened", "Partition", "Provider", "Target", "choose", "onnxruntime"]


def onnxruntime() -> Any:
    """The package. Raises UnsupportedError where it is not installed."""
    try:
        import onnxruntime as package
    except ImportError as e:
        raise UnsupportedError(
            f'an ONNX model needs the package onnxruntime: pip install "edge-run[onnx]" ({e})',
            what="onnxruntime",
        ) from e
    return package


@dataclass(frozen=True)
class Provider:
    """A row: name: what --ep calls it; ep: what onnxruntime calls it."""

    name: str
    ep: str


PROVIDERS = {p.name: p for p in (Provider("cpu", "CPUExecutionProvider"),)}


@dataclass(frozen=True)
class Target:
    """What a model is to run on. fallback: the CPU may take what the provider does not."""

    provider: Provider
    threads: int
    fallback: bool = False
    soc: str | None = None


@dataclass(frozen=True)
class Partition:
    """How much of a graph the provider runs."""

    nodes: int
    on_provider: int


@dataclass(frozen=True)
class Opened:
    """A session of onnxruntime that is ready to run."""

    session: Any
    partition: Partition


def choose(
    ep: str | None,
    made_for: str,
    *,
    threads: int,
    fallback: bool = False,
    soc: str | None = None,
) -> Target:
    """The provider to run a model on.

    ep: a name of PROVIDERS, "auto", or None: the one that the model was made for. made_for: that
    one. Raises InputError for a name that there is not, UnsupportedError for one that is not here.
    """
    name = made_for if ep in (None, "auto") else ep
    if name not in PROVIDERS:
        raise InputError(f"ep {ep!r}: one of auto, {', '.join(PROVIDERS)}")
    return Target(PROVIDERS[name], threads, fallback, soc)


def open_sessions(
    graphs: Mapping[str, Path], target: Target, key: bytes | None = None
) -> dict[str, Opened]:
    """Sessions of the graphs of one model, by their names.

    key: what tells the model from others, for the cache of compiled graphs; None: it is not kept.
    Raises ModelFileError for a graph that is none, UnsupportedError when the provider would not
    run all of it.
    """
    ort, opened = onnxruntime(), {}
    for name, path in graphs.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(
                os.fspath(path), sess_options=options, providers=[target.provider.ep]
            )
        except Exception as e:  # onnxruntime's own have no common root
            message = " ".join(str(e).split())
            raise ModelFileError(f"onnxruntime cannot load it: {message}", path=path) from e
        opened[name] = Opened(session, Partition(0, 0))
    return opened
