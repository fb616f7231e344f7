"""Matrix products with weights that keep the values of the file: MatMulNBits.

w = scale * (q - zero) + offset, see `blocks`. The offsets' part of a product is computed from the
sums of the activations' blocks:

    y = MatMulNBits(x) + ReduceSum(x by blocks) @ C        C: (k / block, n), the offsets

onnxruntime runs this nearly as fast as MatMulNBits alone. Zero points that are floats would be 70
times slower. Milliseconds of a processor core, k 2048, n 4096, accuracy level 4, onnxruntime 1.32:

                          block 16           block 32
    bits, tokens          1       64         1       64
    4                     0.10    4.2        0.09    3.9
    4 with offsets        0.12    4.6        0.10    4.1
    8                     0.12    3.5        0.12    3.4
    8 with offsets        0.14    3.9        0.11    3.8
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.files.gguf import GGUF, Tensor
from edge.graph.ops import Matmul
from edge.onnx.export.blocks import Form, blocks, floats, form_of, slices
from edge.onnx.export.writer import CONTRIB, DataFile, GraphWriter, StoredTensor, onnx

__all__ = ["BlockLinears"]

#: This level quantises activations to int8 in blocks; lower levels are up to 200 times slower.
_ACCURACY_LEVEL = 4


class _Matrix(NamedTuple):
    """The stored parts of some weights, stacked by rows. n: rows of all; k: shared dimension."""

    name: str
    n: int
    k: int
    form: Form
    codes: StoredTensor  # (n, k / block, block * bits / 8)
    scales: StoredTensor  # (n, k / block)
    offsets: StoredTensor | None  # (k / block, n)


class BlockLinears:
    """Writes products and embeddings into graphs, and their weights into a DataFile.

    A weight is written at its first use. Later uses refer to it, even in other graphs.
    """

    def __init__(self, model: GGUF, data: DataFile) -> None:
        self._model, self._data = model, data
        self._matrices: dict[tuple[str, ...], _Matrix] = {}
        self._floats: dict[str, StoredTensor] = {}

    def apply(self, g: GraphWriter, x: str, op: Matmul) -> str:
        """x (1, n, k) @ W.T for each W, outputs side by side: (1, n, sum of rows).

        Neighbouring weights of one form are one product.
        Raises ModelFileError for NaN or infinity in a weight, UnsupportedError for a type that
        edge cannot run, OSError.
        """
        outputs = []
        for form, names in groupby(op.weights, lambda name: form_of(self._tensor(name).type)):
            if form is None:
                outputs += [self._product_of_floats(g, x, name) for name in names]
            else:
                outputs.append(self._product(g, x, self._matrix(tuple(names), form)))
        return outputs[0] if len(outputs) == 1 else g.node("Concat", *outputs, axis=2)

    def embedding(self, g: GraphWriter, ids: str, weight: str) -> str:
        """Rows of a table by ids, int64 (1, n) -> float32 (1, n, k). Raises what `apply` raises."""
        form = form_of(self._tensor(weight).type)
        if form is None:
            rows = g.node("Gather", self._float_weight(g, weight), ids)
            return g.node("Cast", rows, to=g.types.FLOAT)
        m = self._matrix((weight,), form)
        row_bytes = m.k * form.bits // 8
        codes = g.weight(f"{m.name}.rows", m.codes._replace(shape=(m.n, row_bytes)))
        scales = g.weight(f"{m.name}.scales", m.scales)
        attributes = {"bits": form.bits, "block_size": form.block}
        x = g.node("GatherBlockQuantized", codes, ids, scales, domain=CONTRIB, **attributes)
        if m.offsets is None:
            return x
        columns = g.node("Gather", g.weight(f"{m.name}.offsets", m.offsets), ids, axis=1)
        offsets = g.node("Transpose", columns, perm=[1, 2, 0])  # (k / block, 1, n) before
        offsets = g.node("Unsqueeze", offsets, g.constant(np.array([3])))
        x = g.node("Add", _by_blocks(g, x, m), offsets)
        return g.node("Reshape", x, g.constant(np.array([0, 0, m.k])))

    def _product(self, g: GraphWriter, x: str, m: _Matrix) -> str:
        y = g.node(
            "MatMulNBits",
            x,
            g.weight(f"{m.name}.codes", m.codes),
            g.weight(f"{m.name}.scales", m.scales),
            domain=CONTRIB,
            K=m.k,
            N=m.n,
            bits=m.form.bits,
            block_size=m.form.block,
            accuracy_level=_ACCURACY_LEVEL,
        )
        if m.offsets is None:
            return y
        sums = g.node("ReduceSum", _by_blocks(g, x, m), g.constant(np.array([3])), keepdims=0)
        correction = g.node("MatMul", sums, g.weight(f"{m.name}.offsets", m.offsets))
        return g.node("Add", y, correction)

    def _product_of_floats(self, g: GraphWriter, x: str, name: str) -> str:
        """A product with a matrix of floats: onnxruntime casts and transposes it at load."""
        w = g.node("Cast", self._float_weight(g, name), to=g.types.FLOAT)
        return g.node("MatMul", x, g.node("Transpose", w, perm=[1, 0]))

    def _matrix(self, names: tuple[str, ...], form: Form) -> _Matrix:
        """The stored parts of weights of one form, stacked by rows; writes them at first use."""
        if names in self._matrices:
            return self._matrices[names]
        types = onnx().TensorProto
        tensors = [self._tensor(name) for name in names]
        n, k = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
        n_blocks = k // form.block
        scales = np.empty((n, n_blocks), np.float32)
        offsets = np.empty((n_blocks, n), np.float32) if form.has_offset else None
        shape = (n, n_blocks, form.block * form.bits // 8)
        codes = self._data.add(types.UINT8, shape, self._codes(tensors, scales, offsets))
        matrix = _Matrix(
            "+".join(names),
            n,
            k,
            form,
            codes,
            self._data.add(types.FLOAT, scales.shape, [scales]),
            None if offsets is None else self._data.add(types.FLOAT, offsets.shape, [offsets]),
        )
        return self._matrices.setdefault(names, matrix)

    def _codes(
        self,
        tensors: list[Tensor],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32] | None,
    ) -> Iterator[NDArray[np.uint8]]:
        """The codes of tensors, slice by slice; fills scales and offsets meanwhile."""
        row = 0
        for tensor in tensors:
            for first, n in slices(tensor):
                part = blocks(tensor, first, n)
                scales[row : row + n] = part.scales
                if offsets is not None and part.offsets is not None:
                    offsets[:, row : row + n] = part.offsets.T
                yield part.codes
                self._model.forget()
                row += n

    def _float_weight(self, g: GraphWriter, name: str) -> str:
        """A matrix of floats, unchanged from the file."""
        tensor = self._tensor(name)
        if name not in self._floats:
            dtype = getattr(onnx().TensorProto, _FLOATS[tensor.type])
            self._floats[name] = self._data.add(dtype, tensor.shape, self._rows(tensor))
        return g.weight(name, self._floats[name])

    def _rows(self, tensor: Tensor) -> Iterator[NDArray[np.uint8]]:
        data = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
        for first, n in slices(tensor):
            floats(tensor, first, n)  # raises for NaN and infinity
            yield data[first : first + n]
            self._model.forget()

    def _tensor(self, name: str) -> Tensor:
        return self._model.tensors[name]


_FLOATS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}


def _by_blocks(g: GraphWriter, x: str, m: _Matrix) -> str:
    """x (1, n, k) -> (1, n, k / block, block)."""
    return g.node("Reshape", x, g.constant(np.array([0, 0, m.k // m.form.block, m.form.block])))
