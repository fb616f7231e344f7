"""What an .onnx file says of itself, read without the package `onnx`, before onnxruntime opens it.

A file is a protobuf message, ModelProto of onnx.proto. Here is read what edge asks for; the rest is
passed over by its length. The file is a stranger's: every length is checked against what encloses
it, levels and counts have limits, and a field that may stand once stands once, since readers
disagree on what two of them mean.

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
from edge.onnx.files.protobuf import MOST_TEXT, Wire, signed

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

#: Nodes that multiply by a weight, and which of their inputs it is.
_MATMULS = {"MatMul": 1, "Gemm": 1, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1}
#: Nodes that a weight may come through, with as many elements.
_THROUGH = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")


class External(NamedTuple):
    """Where a tensor's bytes lie: in the file `location`, relative to the model's folder."""

    location: str
    offset: int
    length: int


class OnnxTensor(NamedTuple):
    """A weight. dtype: as numpy calls it; n_bytes: of its elements; external: None: in the file."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    n_bytes: int
    external: External | None


class Value(NamedTuple):
    """An input or an output. dtype: as numpy calls it, "" for what is no tensor. dims: a name, or
    "" where even that is missing, for a dimension that varies; None: not even how many there are.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None


class OnnxNode(NamedTuple):
    """A node. attributes: those that are numbers, texts (as bytes) or lists of integers."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass
class OnnxFile:
    """A model's graph. inputs: without those that initializers fill; initializers: of the graph
    itself; tensors: these, and all others of any graph inside; opsets: domain -> version.
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
        """Read a file, and check that its external data may be read: that it lies in the file's
        folder, and is all there. Raises ModelFileError.
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
        """Bytes of all tensors, wherever they lie."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def files(self) -> list[Path]:
        """The file and those that its tensors lie in."""
        places = {t.external.location for t in self.tensors if t.external}
        return [self.path, *(self.path.parent / place for place in sorted(places))]

    def multiply_adds(self) -> dict[str, int]:
        """Multiplications with weights that a node does for one token, by the node's name (where
        it has none, its first output's): of those nodes that do any.
        """
        elements = {name: prod(t.dims) for name, t in self.initializers.items()}
        found = {}
        for node in self.nodes:
            if node.op in _THROUGH and node.inputs and node.outputs:
                if node.inputs[0] in elements:
                    elements[node.outputs[0]] = elements[node.inputs[0]]
                continue
            n = 0
            if node.op == "MatMulNBits":
                n = int(node.attributes.get("K", 0)) * int(node.attributes.get("N", 0))
            elif len(node.inputs) > (at := _MATMULS.get(node.op, len(node.inputs))):
                n = elements.get(node.inputs[at], 0)
            if n:
                found[node.name or node.outputs[0]] = n
        return found

    def _check_files(self) -> None:
        """Raise ModelFileError unless all that the model would open is its own."""
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
        """Bytes of a file beside the model's."""

        def refuse(message: str) -> ModelFileError:
            return ModelFileError(
                f"its data are in {brief(place)}, {message}", path=self.path, field=what
            )

        parts = PureWindowsPath(place)  # which knows both kinds of slashes, and drives
        if not place or "\0" in place or place.startswith("*"):  # "*/...": onnxruntime's memory
            raise refuse("which is no file's name")
        if parts.anchor or ".." in parts.parts:
            raise refuse("outside the model's folder: move the file beside the model")
        file = self.path.parent / place
        real = os.path.realpath(file)
        # where downloads are kept once and linked to, the model's own file is such a link too
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
        """The whole file."""
        graph = None
        for number, value, at in self.fields((0, len(self.data))):
            if number == 7:
                graph = self.once(graph, value, at, "graph")
            elif number == 2:
                self._model.producer = self.text(value, at)
            elif number == 8:
                self._opset(self.message(value, at))
            elif number == 14:
                key, text = self._entry(self.message(value, at))
                self._model.metadata[key] = text
            elif number == 25:  # functions: nodes of other nodes
                self._function(self.message(value, at))
        if graph is None:
            raise self.error(0, "holds no graph: it is no ONNX model")
        self._graph(graph, 0)
        for name in self._model.initializers:
            self._model.inputs.pop(name, None)  # old files list them there, too

    def _graph(self, message: tuple[int, int], level: int) -> None:
        """A graph; of one inside another only the tensors and nodes are looked at."""
        if level > _MOST_LEVELS:
            raise self.error(message[0], f"graphs inside graphs, more than {_MOST_LEVELS} levels")
        model, outer = self._model, level == 0
        for number, value, at in self.fields(message):
            if number == 1:
                node = self._node(self.message(value, at), level)
                (model.nodes if outer else model.inner_nodes).append(node)
            elif number == 5:
                tensor = self._tensor(self.message(value, at))
                if outer and tensor.name in model.initializers:
                    raise self.error(at, f"the weight {brief(tensor.name)} is there twice")
                if outer:
                    model.initializers[tensor.name] = tensor
            elif number == 15:
                self._sparse(self.message(value, at))
            elif number in (11, 12) and outer:
                found = self._value(self.message(value, at))
                (model.inputs if number == 11 else model.outputs)[found.name] = found

    def _function(self, message: tuple[int, int]) -> None:
        for number, value, at in self.fields(message):
            if number == 7:
                self._model.inner_nodes.append(self._node(self.message(value, at), 1))
            elif number == 11:
                self._attribute(self.message(value, at), 1)

    def _node(self, message: tuple[int, int], level: int) -> OnnxNode:
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

    def _attribute(self, message: tuple[int, int], level: int) -> tuple[str, Any]:
        """Its name and its value, None for what nobody asks for. Tensors and graphs in it are
        looked at.
        """
        name, result, numbers = "", None, list[int]()
        once: dict[int, tuple[int, int]] = {}
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
        looks: dict[int, Callable[[tuple[int, int]], Any]] = {
            5: self._tensor,
            6: lambda m: self._graph(m, level + 1),
            22: self._sparse,
        }
        for number, inner in once.items():
            looks[number](inner)
        return name, tuple(numbers) if numbers else result

    def _sparse(self, message: tuple[int, int]) -> None:
        for number, value, at in self.fields(message):
            if number in (1, 2):
                self._tensor(self.message(value, at))

    def _tensor(self, message: tuple[int, int]) -> OnnxTensor:
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

    def _value(self, message: tuple[int, int]) -> Value:
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

    def _dims(self, shape: tuple[int, int]) -> tuple[int | str, ...]:
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

    def _only(self, message: tuple[int, int], wanted: int) -> tuple[int, int] | None:
        """The one message with this number, if there is one."""
        found = None
        for number, value, at in self.fields(message):
            if number == wanted:
                found = self.once(found, value, at, "type")
        return found

    def _opset(self, message: tuple[int, int]) -> None:
        domain, version = "", 0
        for number, value, at in self.fields(message):
            if number == 1:
                domain = self.text(value, at)
            elif number == 2:
                version = signed(self.number(value, at))
        self._model.opsets[domain] = version

    def _entry(self, message: tuple[int, int]) -> tuple[str, str]:
        """A StringStringEntryProto."""
        texts = {1: "", 2: ""}
        for number, value, at in self.fields(message):
            if number in texts:
                texts[number] = self.text(value, at)
        return texts[1], texts[2]
