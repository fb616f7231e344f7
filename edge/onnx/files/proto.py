"""Reads the graph of an .onnx file without the package `onnx`, before onnxruntime opens the file.

A file is a protobuf message, ModelProto of onnx.proto. The reader skips what edge does not need.
Files come from strangers, so every length is checked against the message that encloses it, and
levels and counts have limits. A field that may occur once must occur once, because readers disagree
on the meaning of two.

    ModelProto -> GraphProto -> NodeProto -> AttributeProto -> GraphProto (of If and Loop) ...
                             -> TensorProto: a weight, or where in another file it lies
                             -> ValueInfoProto: an input or an output
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from edge.errors import ModelFileError, brief
from edge.onnx.files.protobuf import MOST_TEXT, ByteSpan, Wire, signed

__all__ = ["External", "OnnxFile", "OnnxNode", "OnnxTensor", "Value"]

_MOST_LEVELS = 16  # of graphs inside graphs
_MOST_DIMS = 16

#: TensorProto.DataType -> its name, and bits of an element; strings have no size.
_TYPES: dict[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    8: ("string", 0),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
    24: ("float8e8m0", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}

#: A node that multiplies by a weight -> the index of the input that is the weight.
_MATMULS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1}
#: Nodes that pass a weight on with the same number of elements.
_THROUGH = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")


class External(NamedTuple):
    """The place of a tensor's bytes: in the file `location`, relative to the model's folder."""

    location: str
    offset: int
    length: int


class OnnxTensor(NamedTuple):
    """A weight. dtype: numpy's name. external: None: the elements are in the .onnx file itself."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    n_bytes: int
    external: External | None


class Value(NamedTuple):
    """An input or an output.

    dtype: numpy's name, "": it is no tensor. dims: a dimension that varies has its name, or "" if
    it has none; None: the number of dimensions is unknown.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None


class OnnxNode(NamedTuple):
    """A node. attributes: only those that are numbers, texts (as bytes) or lists of integers."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass
class OnnxFile:
    """A model's graph.

    inputs: without those that have an initializer. initializers: of the outer graph. tensors: of
    the outer and all inner graphs. opsets: domain -> version.
    """

    path: Path
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    initializers: dict[str, OnnxTensor] = field(default_factory=dict)
    tensors: list[OnnxTensor] = field(default_factory=list)
    nodes: list[OnnxNode] = field(default_factory=list)
    inner_nodes: list[OnnxNode] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    producer: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> OnnxFile:
        """Read a file, and check that its external data lies in the file's folder and is complete.

        Raises ModelFileError.
        """
        model = cls(Path(os.fsdecode(path)))
        try:
            with open(model.path, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise ModelFileError("is empty", path=path)
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    _Reader(data, model).model()
        except (OSError, ValueError) as e:
            raise ModelFileError(f"cannot be read: {e}", path=path) from e
        model._check_files()
        return model

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, inside and outside the file."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def files(self) -> list[Path]:
        """The file, and the files of its external data."""
        places = {t.external.location for t in self.tensors if t.external}
        return [self.path, *(self.path.parent / place for place in sorted(places))]

    def multiply_adds(self) -> dict[str, int]:
        """Name of a node -> its multiplications with weights for one token.

        A node without a name has that of its first output. Nodes without such multiplications are
        left out.
        """
        elements = {name: prod(t.dims) for name, t in self.initializers.items()}
        counts = {}
        for node in self.nodes:
            if node.op in _THROUGH and node.inputs and node.outputs:
                if node.inputs[0] in elements:
                    elements[node.outputs[0]] = elements[node.inputs[0]]
                continue
            n = 0
            if node.op == "MatMulNBits":
                n = int(node.attributes.get("K", 0)) * int(node.attributes.get("N", 0))
            elif len(node.inputs) > (i := _MATMULS.get(node.op, len(node.inputs))):
                n = elements.get(node.inputs[i], 0)
            if n:
                counts[node.name or node.outputs[0]] = n
        return counts

    def _check_files(self) -> None:
        """Raise ModelFileError unless all files that the model names are its own, and complete."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.external is None:
                continue
            place, offset, length = tensor.external
            what = f"tensor {brief(tensor.name)}"
            if place not in sizes:
                sizes[place] = self._size_of(place, what)
            if offset + length > sizes[place]:
                raise ModelFileError(
                    f"lies in {brief(place)} up to byte {offset + length}, the file has "
                    f"{sizes[place]}: it is cut short or belongs to another model",
                    path=self.path,
                    field=what,
                )
        for node in (*self.nodes, *self.inner_nodes):
            binary = node.attributes.get("ep_cache_context")
            is_apart = node.op == "EPContext" and node.attributes.get("embed_mode", 1) == 0
            if is_apart and isinstance(binary, bytes):
                self._size_of(binary.decode("utf-8", "replace"), f"node {brief(node.name)}")

    def _size_of(self, place: str, what: str) -> int:
        """Bytes of a file in the model's folder. Raises ModelFileError."""

        def refuse(message: str) -> ModelFileError:
            return ModelFileError(
                f"its data are in {brief(place)}, {message}", path=self.path, field=what
            )

        parts = PureWindowsPath(place)  # it knows both kinds of slashes, and drives
        if not place or "\0" in place or place.startswith("*"):  # "*/...": onnxruntime's memory
            raise refuse("which is no file's name")
        if parts.anchor or ".." in parts.parts:
            raise refuse("outside the model's folder: move the file beside the model")
        file = self.path.parent / place
        real = os.path.realpath(file)
        # In a download cache the model's file is itself a link, and its data are beside the target.
        homes = {os.path.realpath(self.path.parent), os.path.dirname(os.path.realpath(self.path))}
        if not any(os.path.commonpath([home, real]) == home for home in homes):
            raise refuse("a link that leads outside the model's folder")
        if not os.path.isfile(real):
            raise refuse("which is missing: the model is several files, get all of them")
        return os.path.getsize(real)


class _Reader(Wire):
    """Reads one file into an OnnxFile."""

    def __init__(self, data: mmap.mmap, model: OnnxFile) -> None:
        super().__init__(data, model.path)
        self._model = model

    def model(self) -> None:
        """Read the whole file."""
        graph = None
        for number, value, at in self.fields(ByteSpan(0, len(self.data))):
            if number == 7:
                graph = self.once(graph, value, at, "graph")
            elif number == 2:
                self._model.producer = self.text(value, at)
            elif number == 8:
                self._opset(self.message(value, at))
            elif number == 14:
                key, text = self._entry(self.message(value, at))
                self._model.metadata[key] = text
            elif number == 25:  # functions: nodes made of nodes
                self._function(self.message(value, at))
        if graph is None:
            raise self.error(0, "holds no graph: it is no ONNX model")
        self._graph(graph, 0)
        for name in self._model.initializers:
            self._model.inputs.pop(name, None)  # old files list initializers as inputs, too

    def _graph(self, message: ByteSpan, level: int) -> None:
        """Read a graph; of an inner graph, only its tensors and nodes."""
        if level > _MOST_LEVELS:
            raise self.error(message[0], f"graphs inside graphs, more than {_MOST_LEVELS} levels")
        model, is_outer = self._model, level == 0
        for number, value, at in self.fields(message):
            if number == 1:
                node = self._node(self.message(value, at), level)
                (model.nodes if is_outer else model.inner_nodes).append(node)
            elif number == 5:
                tensor = self._tensor(self.message(value, at))
                if is_outer and tensor.name in model.initializers:
                    raise self.error(at, f"the weight {brief(tensor.name)} is there twice")
                if is_outer:
                    model.initializers[tensor.name] = tensor
            elif number == 15:
                self._sparse(self.message(value, at))
            elif number in (11, 12) and is_outer:
                declared = self._value(self.message(value, at))
                (model.inputs if number == 11 else model.outputs)[declared.name] = declared

    def _function(self, message: ByteSpan) -> None:
        for number, value, at in self.fields(message):
            if number == 7:
                self._model.inner_nodes.append(self._node(self.message(value, at), 1))
            elif number == 11:
                self._attribute(self.message(value, at), 1)

    def _node(self, message: ByteSpan, level: int) -> OnnxNode:
        inputs, outputs, attributes = list[str](), list[str](), dict[str, Any]()
        texts = {3: "", 4: "", 7: ""}
        for number, value, at in self.fields(message):
            if number in (1, 2):
                (inputs if number == 1 else outputs).append(self.text(value, at))
            elif number in texts:
                texts[number] = self.text(value, at)
            elif number == 5:
                name, attribute = self._attribute(self.message(value, at), level)
                if attribute is not None:
                    attributes[name] = attribute
        return OnnxNode(texts[4], texts[7], texts[3], tuple(inputs), tuple(outputs), attributes)

    def _attribute(self, message: ByteSpan, level: int) -> tuple[str, Any]:
        """The name and the value of an attribute; None for a value that edge does not need.

        Tensors and graphs in it are read.
        """
        name, result, numbers = "", None, list[int]()
        once: dict[int, ByteSpan] = {}
        for number, value, at in self.fields(message):
            if number == 1:
                name = self.text(value, at)
            elif number == 2 and isinstance(value, int):
                result = struct.unpack("<f", value.to_bytes(4, "little"))[0]
            elif number == 3:
                result = signed(self.number(value, at))
            elif number == 4:
                first, end = self.message(value, at)
                result = self.data[first:end] if end - first <= MOST_TEXT else None
            elif number == 8:
                numbers += self.integers(value)
            elif number in (5, 6, 22):
                once[number] = self.once(once.get(number), value, at, "value")
            elif number == 10:
                self._tensor(self.message(value, at))
            elif number == 11:
                self._graph(self.message(value, at), level + 1)
            elif number == 23:
                self._sparse(self.message(value, at))
        readers: dict[int, Callable[[ByteSpan], Any]] = {
            5: self._tensor,
            6: lambda m: self._graph(m, level + 1),
            22: self._sparse,
        }
        for number, inner in once.items():
            readers[number](inner)
        return name, tuple(numbers) if numbers else result

    def _sparse(self, message: ByteSpan) -> None:
        for number, value, at in self.fields(message):
            if number in (1, 2):
                self._tensor(self.message(value, at))

    def _tensor(self, message: ByteSpan) -> OnnxTensor:
        dims, kind, name, place = list[int](), 0, "", dict[str, str]()
        is_external = False
        for number, value, at in self.fields(message):
            if number == 1:
                dims += self.integers(value)
            elif number == 2:
                kind = self.number(value, at)
            elif number == 8:
                name = self.text(value, at)
            elif number == 13:
                key, text = self._entry(self.message(value, at))
                if key in place:
                    raise self.error(at, f"{brief(key)} of external data is there twice")
                place[key] = text
            elif number == 14:
                is_external = self.number(value, at) == 1
        start, what = message[0], f"tensor {brief(name)}"
        if kind not in _TYPES:
            raise self.error(start, f"{what} is of unknown type {kind}")
        if len(dims) > _MOST_DIMS or any(d < 0 for d in dims) or prod(dims) > 1 << 48:
            raise self.error(start, f"{what} has the shape {brief(dims)}")
        dtype, bits = _TYPES[kind]
        n_bytes = (prod(dims) * bits + 7) // 8
        external = self._external(place, n_bytes, what, start) if is_external or place else None
        tensor = OnnxTensor(name, dtype, tuple(dims), n_bytes, external)
        self._model.tensors.append(tensor)
        return tensor

    def _external(self, place: dict[str, str], n_bytes: int, what: str, at: int) -> External:
        def number(key: str, default: int) -> int:
            text = place.get(key, str(default))
            if not (text.isascii() and text.isdigit() and len(text) < 20):
                raise self.error(at, f"{what}: {key} of its external data is {brief(text)}")
            return int(text)

        offset, length = number("offset", 0), number("length", n_bytes)
        if length != n_bytes:
            raise self.error(at, f"{what}: {length} bytes of external data, it has {n_bytes}")
        return External(place.get("location", ""), offset, length)

    def _value(self, message: ByteSpan) -> Value:
        name, kind = "", None
        for number, value, at in self.fields(message):
            if number == 1:
                name = self.text(value, at)
            elif number == 2:
                kind = self.once(kind, value, at, "type")
        tensor = None if kind is None else self._only(kind, 1)
        if tensor is None:
            return Value(name, "", None)
        dtype, shape = "", None
        for number, value, at in self.fields(tensor):
            if number == 1:
                dtype = _TYPES.get(self.number(value, at), ("", 0))[0]
            elif number == 2:
                shape = self.once(shape, value, at, "shape")
        return Value(name, dtype, None if shape is None else self._dims(shape))

    def _dims(self, shape: ByteSpan) -> tuple[int | str, ...]:
        dims: list[int | str] = []
        for number, value, at in self.fields(shape):
            if number == 1:
                dim: int | str = ""
                for n, inner, where in self.fields(self.message(value, at)):
                    if n == 1:
                        dim = signed(self.number(inner, where))
                    elif n == 2:
                        dim = self.text(inner, where)
                dims.append(dim)
        return tuple(dims)

    def _only(self, message: ByteSpan, wanted: int) -> ByteSpan | None:
        """The message with this field number, which may occur once; None: it does not occur."""
        span = None
        for number, value, at in self.fields(message):
            if number == wanted:
                span = self.once(span, value, at, "type")
        return span

    def _opset(self, message: ByteSpan) -> None:
        domain, version = "", 0
        for number, value, at in self.fields(message):
            if number == 1:
                domain = self.text(value, at)
            elif number == 2:
                version = signed(self.number(value, at))
        self._model.opsets[domain] = version

    def _entry(self, message: ByteSpan) -> tuple[str, str]:
        """The key and the value of a StringStringEntryProto."""
        texts = {1: "", 2: ""}
        for number, value, at in self.fields(message):
            if number in texts:
                texts[number] = self.text(value, at)
        return texts[1], texts[2]
