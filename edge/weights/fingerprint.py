"""What tells one model from another, wherever and in whatever file it is."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from edge import native
from edge.graph import Graph
from edge.native import ffi, lib

if TYPE_CHECKING:
    from edge.files.gguf import Metadata
    from edge.weights.weights import Weights

__all__ = ["fingerprint"]

_VECTOR_BYTES = 1024  # of each vector's start


def fingerprint(metadata: Metadata, graph: Graph, weights: Weights) -> bytes:
    """32 bytes over the numbers of the architecture, the rotary embedding that is in use, names
    and shapes of the weights, and values from each: two rows of a matrix, a vector's start.

    The same for a file, one that was packed from it, both forms of its weights, and on every
    machine. A model that differs in other rows alone is taken for the same. The weights must be in
    memory.
    """
    out = blake2b(digest_size=32)
    _add(out, repr(_numbers(metadata)).encode())
    ropes = {repr(op.attrs["rope"]) for op in graph.ops if op.kind == "rope"}
    _add(out, repr(sorted(ropes)).encode())
    for name in sorted(weights.names):
        entry = weights.entries[weights.index[name]]
        _add(out, f"{name} {entry.n} {entry.k}".encode())
        if entry.layout == lib.EDGE_LAYOUT_VECTOR:
            _add(out, bytes(ffi.buffer(entry.data, min(entry.n_bytes, _VECTOR_BYTES))))
            continue
        row = ffi.new("float[]", entry.k)
        for i in sorted({entry.n // 2, entry.n - 1}):
            native.check(lib.edge_weight_unpack(ffi.addressof(entry), i, 1, row))
            _add(out, ffi.buffer(row))
    return out.digest()


def _numbers(metadata: Metadata) -> Mapping[str, Any]:
    """The architecture's keys that are no lists, in the order of their names."""
    prefix = f"{metadata['general.architecture']}."
    keys = sorted(key for key in metadata if key.startswith(prefix) and not metadata.is_array(key))
    return {key: metadata[key] for key in keys}


def _add(out: Any, data: Any) -> None:
    """With its length, so that no two lists of parts are one string of bytes."""
    out.update(struct.pack("<q", len(data)))
    out.update(data)
