"""Writes ONNX files: graphs node by node, and weights piece by piece into a file beside them.

Only this file needs the package `onnx`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.errors import UnsupportedError
from edge.extras import install

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONTRIB", "DataFile", "GraphWriter", "StoredTensor", "onnx"]

#: The domain of onnxruntime's own operators.
CONTRIB = "com.microsoft"

_ALIGN = 4096  # so that a runtime can map a tensor
_IR_VERSION = 10  # the lowest version with everything that is written here


def onnx() -> Any:
    """The package onnx. Raises UnsupportedError if it is not installed."""
    try:
        import onnx as package
    except ImportError as e:
        raise UnsupportedError(
            f"exporting needs the package onnx: {install('onnx')} ({e})", what="export"
        ) from e
    return package


class StoredTensor(NamedTuple):
    """A tensor in a DataFile. dtype: an onnx TensorProto.DataType; shape: of the whole tensor."""

    file: str
    dtype: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class DataFile:
    """A file of tensors, each written piece by piece. Use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def add(self, dtype: int, shape: Sequence[int], pieces: Iterable[NDArray[Any]]) -> StoredTensor:
        """Write a tensor. pieces: its bytes in order, as arrays of any shape and type."""
        start = self._file.tell()
        start += -start % _ALIGN
        self._file.seek(start)
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).data)
        n_bytes = self._file.tell() - start
        return StoredTensor(self.path.name, dtype, tuple(shape), start, n_bytes)

    def close(self) -> None:
        """Flush the file to the disk, and close it."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class GraphWriter:
    """A graph under construction. Values are named by strings, as in `onnx`.

    name: of the graph. opset: of the standard operators.
    """

    def __init__(self, name: str, opset: int) -> None:
        self.name, self.opset = name, opset
        self.types = onnx().TensorProto
        self._helper = onnx().helper
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an input; a string in the shape is a dimension that varies."""
        self._inputs.append(self._helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare an output: the output of a node, see `named`."""
        self._outputs.append(self._helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def constant(self, value: NDArray[Any]) -> str:
        """A small tensor in the graph's own file; equal tensors are written once."""
        array = np.ascontiguousarray(value)
        key = (array.dtype.str, value.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            tensor = onnx().numpy_helper.from_array(array.reshape(value.shape), name)
            self._initializers[name] = tensor
            self._constants[key] = name
        return self._constants[key]

    def weight(self, name: str, stored: StoredTensor) -> str:
        """A tensor in a DataFile in the graph's folder. A name that exists already is not added."""
        if name not in self._initializers:
            tensor = self.types(name=name, data_type=stored.dtype, dims=stored.shape)
            tensor.data_location = self.types.EXTERNAL
            place = {"location": stored.file, "offset": stored.offset, "length": stored.n_bytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns its name."""
        return self.nodes(op, *inputs, n_outputs=1, domain=domain, **attributes)[0]

    def nodes(
        self, op: str, *inputs: str, n_outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with several outputs; returns their names. An input "" means no input."""
        name = f"{op}.{len(self._nodes)}"
        outputs = [f"{name}.{i}" if i else name for i in range(n_outputs)]
        return self.named(op, *inputs, outputs=outputs, domain=domain, **attributes)

    def named(
        self, op: str, *inputs: str, outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Append a node with given names of its outputs; returns the names. "" means no output."""
        name = f"{op}.{len(self._nodes)}"
        node = self._helper.make_node(op, inputs, outputs, name, domain=domain, **attributes)
        self._nodes.append(node)
        return outputs

    def rename(self, value: str, name: str) -> str:
        """Give a value the name of an output."""
        self._nodes.append(self._helper.make_node("Identity", [value], [name], f"Identity.{name}"))
        return name

    def save(self, path: Path) -> None:
        """Write the graph. Its DataFiles must be in the same folder.

        Nodes, inputs and weights that no output needs are left out.
        """
        nodes, used = self._needed()
        graph = self._helper.make_graph(
            nodes,
            self.name,
            [i for i in self._inputs if i.name in used],
            self._outputs,
            [tensor for name, tensor in self._initializers.items() if name in used],
        )
        domains = sorted({node.domain for node in nodes})
        versions = [self._helper.make_opsetid("", self.opset)]
        versions += [self._helper.make_opsetid(domain, 1) for domain in domains if domain]
        model = self._helper.make_model(graph, opset_imports=versions, producer_name="edge")
        model.ir_version = _IR_VERSION if self.opset < 23 else _IR_VERSION + 1
        with open(path, "wb") as file:
            file.write(model.SerializeToString(deterministic=True))
            file.flush()
            os.fsync(file.fileno())

    def _needed(self) -> tuple[list[Any], set[str]]:
        """The nodes that an output depends on, in order, and the names of all used values."""
        used = {output.name for output in self._outputs}
        nodes = []
        for node in reversed(self._nodes):
            if used & set(node.output):
                nodes.append(node)
                used |= set(node.input)
        return nodes[::-1], used
