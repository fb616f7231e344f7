"""What a quantised file may take: so many bytes, bits, so much memory when it runs, or time.

Memory is that of the whole process with the default context, as `edge-run plan` counts it. Time is
that of a decoded token behind no others, as `edge.engine.predict` predicts it for this machine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from edge.engine.describe import Description, describe
from edge.engine.ops import PlanExpertMatmul, PlanGatedMatmul, PlanMatmul
from edge.engine.predict import CACHE_SHARES, OP_SECONDS, Bandwidth, Product, product_of
from edge.errors import InputError
from edge.native import ffi
from edge.quantizer.allocate import Allowance
from edge.quantizer.types import ModelTensors, fitting, n_bytes
from edge.sizes import show
from edge.weights.model_file import RawModel
from edge.weights.packed import describe_weight, packed_shape

__all__ = ["Costs", "SizeTarget"]

#: Bytes of the keys that a quantised file has more than its source, at most.
_MORE_HEADER = 16384


@dataclass(frozen=True)
class SizeTarget:
    """What is asked for; one of size (bytes of the file), bits (for each weight on average) and
    memory (bytes of the process) is given. min_speed: tokens per second; None: any.
    """

    size: int | None = None
    bits: float | None = None
    memory: int | None = None
    min_speed: float | None = None


class Costs:
    """What the types of a model's matrices cost, as a target counts it.

    allowance: for all matrices together. Raises InputError for a target that even the smallest of
    some types are above; what `describe` raises.
    """

    def __init__(
        self, file: RawModel, target: SizeTarget, types: Collection[str], threads: int
    ) -> None:
        self._target, self._description = target, describe(file)
        model = ModelTensors.of(file)
        self._shapes = {t.name: t.shape for t in model.matrices}
        self._speed: Bandwidth | None = None
        if target.min_speed is not None:
            kinds = {fitting(kind, shape[-1]) for kind in types for shape in self._shapes.values()}
            products = {product_of(kind) for kind in kinds}
            heads = {Product(product.layout, 2) for product in products}
            self._speed = Bandwidth.now(threads, products | heads)
        self._products = _products(self._description)
        self.allowance = self._limits(file, types)

    def n_bytes(self, name: str, type_name: str) -> int:
        """What a matrix takes of the bytes of the allowance."""
        if self._target.memory is None:
            return n_bytes(type_name, self._shapes[name])
        return _packed_bytes(name, type_name, self._shapes[name])

    def seconds(self, name: str, type_name: str) -> float:
        """What a matrix takes of a token's time."""
        if self._speed is None or name not in self._products:
            return 0.0
        columns, share = self._products[name]
        rate = self._speed.rates[Product(product_of(type_name).layout, columns)]
        packed = _packed_bytes(name, type_name, self._shapes[name])
        return share * packed / rate + self._speed.start

    def _limits(self, file: RawModel, types: Collection[str]) -> Allowance:
        target, others = self._target, self._others(file)
        if target.bits is not None:
            n_weights = sum(math.prod(t.shape) for t in file.tensors.values())
            asked, unit = int(target.bits * n_weights / 8), 8 / n_weights
        else:
            asked, unit = (target.size or target.memory or 0), 0.0
        least = others + sum(
            min(self.n_bytes(name, fitting(kind, shape[-1])) for kind in types)
            for name, shape in self._shapes.items()
        )
        if least > asked:
            wanted, smallest = show(asked), show(least)
            if unit:
                wanted, smallest = f"{target.bits:.4g} bits", f"{least * unit:.4g} bits"
            raise InputError(
                f"{wanted} cannot be reached: with the smallest types it is {smallest}"
            )
        return Allowance(asked - others, self._seconds())

    def _others(self, file: RawModel) -> int:
        """Bytes of what are no matrices."""
        tensors = file.tensors.values()
        others = sum(t.n_bytes for t in tensors if t.name not in self._shapes)
        if self._target.bits is not None:
            return others
        if self._target.size is not None:
            header = len(file.headers()[0]) + _MORE_HEADER
            return others + header + file.alignment * len(tensors)
        ledger = self._description.ledger
        matrices = sum(
            _packed_bytes(name, file.tensors[name].type, shape)
            for name, shape in self._shapes.items()
            if name in self._description.graph.weights
        )
        return ledger.needed - matrices

    def _seconds(self) -> float | None:
        """The time that matrices have of a token; None: any. Raises InputError: none is left."""
        if self._target.min_speed is None or self._speed is None:
            return None
        description = self._description
        n_matrices = sum(isinstance(op, _MATMULS) for op in description.lowered.ops)
        others = OP_SECONDS * (len(description.lowered.ops) - n_matrices)
        share = CACHE_SHARES[description.kv.type]
        others += description.kv.bytes(1) / (share * self._speed.read)
        left = 1 / self._target.min_speed - others
        if left <= 0:
            raise InputError(
                f"{self._target.min_speed:.4g} tokens/s cannot be reached: without any matrix "
                f"it is {1 / others:.4g}"
            )
        return left


_MATMULS = (PlanMatmul, PlanGatedMatmul, PlanExpertMatmul)


def _products(description: Description) -> Mapping[str, tuple[int, float]]:
    """Matrix -> the columns of its product with a token, and the share of it that a token reads."""
    found = dict[str, tuple[int, float]]()
    head = description.lowered.ops[-1]
    for op in description.lowered.ops:
        if isinstance(op, _MATMULS):
            share = op.n_used / op.n_experts if isinstance(op, PlanExpertMatmul) else 1.0
            columns = 2 if op is head else 1
            found |= dict.fromkeys(op.weights, (columns, share))
    return found


def _packed_bytes(name: str, type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a matrix in memory."""
    weight = ffi.new("edge_weight *")
    describe_weight(type_name, packed_shape(name, shape), "fast", weight)
    return int(weight.n_bytes)
