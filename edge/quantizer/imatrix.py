"""The importance matrix: how strongly a text uses each input column of each matrix.

For each matrix, the squares of its input's elements are summed over the tokens of a text. Encoders
weigh the error of a weight by the mean square of its column. Files are those of llama.cpp's
`llama-imatrix`, in both of its forms:

GGUF, with general.type "imatrix", imatrix.datasets (the texts), imatrix.chunk_count and
imatrix.chunk_size (how many windows of how many tokens), and for each matrix NAME, all F32:

    NAME.in_sum2   (n, k)  the sums of squares; n: 1, or the experts of a stack
    NAME.counts    (n, 1)  the tokens that were summed
    NAME.in_sum    (n, k)  the sums, in newer files
    NAME.stats     (...)   figures of newer files, for people

The older form ".dat", numbers little-endian:

    i32 entries | entries: i32 length, name | i32 chunks | i32 n | n f32: mean squares times chunks
    i32 chunks | i32 length, name of the text                                  (may be missing)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import SEEK_END, PathLike, fspath
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge.disk.atomic import replacing, write_all
from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF, Tensor

__all__ = ["CONTEXT", "Importance", "InputSums"]

Floats = NDArray[np.float32]

#: Tokens of a window, where nothing else is said: that of `llama-imatrix`.
CONTEXT = 512

_ALIGNMENT = 32
_UINT32, _STRING, _ARRAY = 4, 8, 9  # value types of GGUF
#: What an expert that no token reached gets for its mean squares, as in llama.cpp.
_UNREACHED = 1.0


@dataclass
class InputSums:
    """What was summed of the inputs of a matrix, or of each matrix of a stack of experts.

    squares: (n, k) float32, sums of squares; counts: (n,) int64, how many tokens; n is 1 but for a
    stack. sums: (n, k), stats: of any shape: what a file says beside, None: nothing.
    """

    squares: Floats
    counts: NDArray[np.int64]
    sums: Floats | None = None
    stats: Floats | None = None


@dataclass
class Importance:
    """An importance matrix. inputs: weight name -> the sums of its input; datasets: names of the
    texts; chunk_count, chunk_size: windows, and tokens of each. path: the file that it was read of,
    "": none.
    """

    inputs: dict[str, InputSums]
    datasets: Sequence[str] = ()
    chunk_count: int = 0
    chunk_size: int = CONTEXT
    path: str = field(default="", compare=False)

    def mean(self, name: str, shape: Sequence[int]) -> Floats | None:
        """The mean squares of a weight's input columns, None: there are none.

        shape: of the weight, (n, k) or (n_experts, n, k). Returns (k,) or (n_experts, k) float32;
        an expert that no token reached has ones. Raises InputError when the sizes differ: the
        matrix is of another model.
        """
        sums = self.inputs.get(name)
        if sums is None:
            return None
        n = shape[0] if len(shape) == 3 else 1
        if sums.squares.size != n * shape[-1] or len(sums.counts) not in (1, n):
            raise InputError(
                f"{self._shown}: {name} has {sums.squares.size} columns, the model's has "
                f"{n * shape[-1]}: the importance matrix is of another model"
            )
        counts = np.broadcast_to(sums.counts, n).astype(np.float32)[:, None]
        rows = sums.squares.reshape(n, -1)
        mean: Floats = np.divide(rows, np.maximum(counts, 1), dtype=np.float32)
        mean[counts[:, 0] == 0] = _UNREACHED
        return mean if len(shape) == 3 else mean[0]

    def unreached(self) -> dict[str, list[int]]:
        """Weight name -> its experts that no token reached; no entry where there are none."""
        found = {name: np.flatnonzero(sums.counts == 0) for name, sums in self.inputs.items()}
        return {name: experts.tolist() for name, experts in found.items() if len(experts)}

    def require_of(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise InputError unless this is a matrix of the model with tensors of these shapes."""
        known = [name for name in self.inputs if name in shapes]
        if not known:
            raise InputError(
                f"{self._shown} names no tensor of the model: the importance matrix is of another "
                "model"
            )
        for name in known:
            self.mean(name, shapes[name])

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Importance:
        """Read a file of either form.

        Raises ModelFileError for a damaged file, and for numbers that no text can have caused: NaN,
        negative ones, a matrix of zeros (which would erase the weights).
        """
        path = fspath(path)
        try:
            with open(path, "rb") as file:
                is_gguf = file.read(4) == b"GGUF"
                importance = _read_gguf(path) if is_gguf else _OldFile(file, path).read()
        except (OSError, ValueError) as e:  # ValueError: a NUL in the path
            raise ModelFileError(
                f"cannot be read: {getattr(e, 'strerror', None) or e}", path=path
            ) from e
        if not importance.inputs:
            raise ModelFileError("there is no importance of any matrix in it", path=path)
        for name, sums in importance.inputs.items():
            _check(sums, path, name)
        return importance

    def write(self, path: str | PathLike[str]) -> None:
        """Write a GGUF file; one that is there is replaced. Raises ModelFileError."""
        path, tensors = Path(path), dict[str, Floats]()
        for name, sums in sorted(self.inputs.items()):
            tensors[f"{name}.in_sum2"] = sums.squares
            tensors[f"{name}.counts"] = sums.counts.astype(np.float32)[:, None]
            if sums.sums is not None:
                tensors[f"{name}.in_sum"] = sums.sums
            if sums.stats is not None:
                tensors[f"{name}.stats"] = sums.stats
        keys = [
            _string("general.type") + _u32(_STRING) + _string("imatrix"),
            _string("imatrix.datasets") + _u32(_ARRAY) + _strings(self.datasets),
            _string("imatrix.chunk_count") + _u32(_UINT32, self.chunk_count),
            _string("imatrix.chunk_size") + _u32(_UINT32, self.chunk_size),
        ]
        try:
            with replacing(path, f".{path.name}.", durable=True) as file:
                write_all(file, _header(keys, tensors))
                for data in tensors.values():
                    write_all(file, _padded(np.ascontiguousarray(data, "<f4").tobytes()))
        except OSError as e:
            raise ModelFileError(f"cannot be written: {e.strerror or e}", path=path) from e

    @property
    def _shown(self) -> str:
        return self.path or "the importance matrix"


def _check(sums: InputSums, path: str, name: str) -> None:
    """Raise ModelFileError for numbers that no text can have caused."""
    problem = ""
    if not np.isfinite(sums.squares).all():
        problem = "a sum of squares is NaN or infinite"
    elif (sums.squares < 0).any() or (sums.counts < 0).any():
        problem = "a sum of squares, or a count, is negative"
    else:
        rows = sums.squares.reshape(len(sums.counts), -1)
        if (~rows.any(axis=1) & (sums.counts > 0)).any():
            problem = "all sums of squares are zero, which would erase the weights"
    if problem:
        raise ModelFileError(f"{problem}: measure it again", path=path, field=f"entry {name}")


# ---- GGUF ----


def _read_gguf(path: str) -> Importance:
    with GGUF.open(path) as file:
        metadata, inputs = file.metadata, dict[str, InputSums]()
        for tensor in file.tensors.values():
            name, _, kind = tensor.name.rpartition(".")
            if kind != "in_sum2":
                continue
            counts = file.tensors.get(f"{name}.counts")
            if counts is None:
                raise ModelFileError("there are no counts of it", path=path, field=tensor.name)
            n = np.rint(_floats(counts).ravel())
            if not (np.abs(n) < 2**53).all():  # NaN fails too
                raise ModelFileError("a count is no number", path=path, field=counts.name)
            squares = _floats(tensor)
            if squares.size % n.size:
                raise ModelFileError(
                    f"{squares.size} sums for {n.size} counts", path=path, field=tensor.name
                )
            sums, stats = (file.tensors.get(f"{name}.{kind}") for kind in ("in_sum", "stats"))
            if sums is not None and math.prod(sums.shape) != squares.size:
                raise ModelFileError(
                    "as many sums as squares belong here", path=path, field=sums.name
                )
            inputs[name] = InputSums(
                squares.reshape(n.size, -1),
                n.astype(np.int64),
                None if sums is None else _floats(sums).reshape(n.size, -1),
                None if stats is None else _floats(stats),
            )
        datasets = metadata.get("imatrix.datasets", [])
        named = [str(name) for name in datasets] if isinstance(datasets, list) else []
        count, size = (metadata.get(f"imatrix.chunk_{key}") for key in ("count", "size"))
    count, size = count if type(count) is int else 0, size if type(size) is int else CONTEXT
    return Importance(inputs, named, count, size, path)


def _floats(tensor: Tensor) -> Floats:
    """A copy of an F32 tensor. Raises ModelFileError for another type."""
    if tensor.type != "F32":
        raise ModelFileError(
            f"it is of the type {tensor.type}, sums are F32", path=tensor.path, field=tensor.name
        )
    return np.frombuffer(tensor.data, "<f4").astype(np.float32).reshape(tensor.shape)


def _header(keys: Sequence[bytes], tensors: Mapping[str, Floats]) -> bytes:
    """A GGUF header for F32 tensors that follow one another."""
    infos, offset = [], 0
    for name, data in tensors.items():
        dims = struct.pack(f"<{data.ndim}Q", *reversed(data.shape))
        infos.append(_string(name) + _u32(data.ndim) + dims + struct.pack("<IQ", 0, offset))
        offset += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    return _padded(b"".join((start, *keys, *infos)))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _strings(texts: Iterable[str]) -> bytes:
    listed = [_string(text) for text in texts]
    return _u32(_STRING) + struct.pack("<Q", len(listed)) + b"".join(listed)


# ---- the older form ----


class _OldFile:
    """Reads a .dat file; each length is compared with what is left of the file."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file, self._path = file, path
        self._at, self._size = 0, file.seek(0, SEEK_END)
        file.seek(0)

    def read(self) -> Importance:
        inputs = dict[str, InputSums]()
        for _ in range(self._number("the number of entries")):
            name = self._text("a name")
            chunks = self._number(f"chunks of {name}")
            values = self._take(4 * self._number(f"length of {name}"), f"values of {name}")
            # sums over tokens, from means times chunks
            squares = np.frombuffer(values, "<f4").astype(np.float32) * np.float32(CONTEXT)
            inputs[name] = InputSums(squares[None], np.array([max(1, chunks) * CONTEXT]))
        chunks, datasets = 0, list[str]()
        if self._at < self._size:
            chunks = self._number("the number of chunks")
        if self._at < self._size:
            datasets = [self._text("the name of the text")]
        return Importance(inputs, datasets, chunks, path=self._path)

    def _take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self._size - self._at:
            raise self._error("no importance matrix, or a truncated one", what)
        self._at += n_bytes
        return self._file.read(n_bytes)

    def _number(self, what: str) -> int:
        (number,) = struct.unpack("<i", self._take(4, what))
        if number < 0:
            raise self._error(f"{number}: no importance matrix", what)
        return int(number)

    def _text(self, what: str) -> str:
        try:
            return self._take(self._number(what), what).decode()
        except UnicodeDecodeError:
            raise self._error("no importance matrix: its names are not UTF-8", what) from None

    def _error(self, message: str, what: str) -> ModelFileError:
        return ModelFileError(message, path=self._path, offset=self._at, field=what)
