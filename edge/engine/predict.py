"""How fast a model will decode on this machine, before it is loaded.

A token reads all weights (but of experts only those that it uses) and the keys and values of the
tokens before it, and each operation must be handed to the threads:

    seconds = weights / rate[layout] + matrices * start + cache / (CACHE_SHARES[type] * read)
              + operations * OP_SECONDS

read, the bandwidth of memory, is measured on the machine itself, and so is what matmuls do: the
rate, the bytes of weights per second in each layout, and the start, the seconds until the first
weights of a matrix come. Most layouts are multiplied as fast as memory is read, compact ones wait
for the CPU. The lower quartile of many matmuls counts, each timed alone: other programs only ever
slow them down. The other constants were fitted to SmolLM2 and to a model of Phi-4-mini's shape, at
depths from 0 to 8,192 with one and two threads on an idle machine. Attention computes more per byte
than a matmul, so its types have lower shares; q4 has the lowest. What was measured is kept in the
cache folder, so that `--report` can tell after a run how wrong its prediction was.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from edge import native
from edge.device.cores import Cores, cpu_name
from edge.device.machine import Machine, buffer_bytes, largest_cache, written
from edge.disk.atomic import replacing
from edge.disk.room import cache_dir
from edge.engine.chain import Chain
from edge.engine.ops import Q8X2, PlanExpertMatmul, PlanGatedMatmul, PlanMatmul
from edge.engine.plan import Lowered
from edge.errors import EdgeError, UnsupportedError
from edge.kv.shape import KVLayout
from edge.native import ffi, lib
from edge.weights.packed import FORMS, describe_weight, supported_types

__all__ = [
    "Bandwidth",
    "Demand",
    "Planned",
    "Product",
    "demand_of",
    "product_of",
    "tokens_per_second",
]

OP_SECONDS = 1.1e-6
CACHE_SHARES = {"f16": 0.67, "q8": 0.59, "q4": 0.28}
SECONDS = 0.1  # that the rounds of one product take
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
SHAPE = (1024, 2048)  # of the matrices that are timed: a multiple of all blocks
SMALL, SMALL_TYPE = (512, 512), "Q8_0"  # of those whose start is timed

_VERSION = 2


class Product(NamedTuple):
    """A kind of matmul of one token. layout: of the weights; columns: of activations: 2 for the
    output head, whose input is quantised twice.
    """

    layout: str
    columns: int = 1

    def __str__(self) -> str:
        return f"{self.layout} x{self.columns}"


class Planned(Protocol):
    """What an Engine and a Description have in common."""

    @property
    def lowered(self) -> Lowered: ...
    @property
    def kv(self) -> KVLayout: ...
    @property
    def layouts(self) -> Mapping[str, str]: ...
    def weight_bytes(self, name: str) -> int: ...


@dataclass(frozen=True)
class Demand:
    """What a decoded token needs. products: the bytes of weights that it reads, by how they are
    multiplied; n_matrices: in how many pieces they lie; experts: how many of the bytes are of its
    experts; all_experts: bytes of all experts; n_ops: operations.
    """

    products: Mapping[Product, int]
    n_matrices: int
    experts: int
    all_experts: int
    n_ops: int
    kv: KVLayout

    @property
    def weights(self) -> int:
        """Bytes of all weights that a token reads."""
        return sum(self.products.values())

    def cache_bytes(self, depth: int) -> int:
        """Bytes of keys and values that a token behind `depth` others reads."""
        return self.kv.bytes(depth + 1)


def demand_of(model: Planned) -> Demand:
    """The demand of a loaded or described model."""
    lowered, layouts = model.lowered, model.layouts
    products, n_matrices, experts, all_experts = Counter[Product](), 0, 0, 0
    for op in lowered.ops:
        if isinstance(op, (PlanMatmul, PlanGatedMatmul)):
            columns = 2 if lowered.buffers[op.inputs[0]].kind == Q8X2 else 1
            n_matrices += len(op.weights)
            for name in op.weights:
                products[Product(layouts[name], columns)] += model.weight_bytes(name)
        elif isinstance(op, PlanExpertMatmul):
            n_matrices += len(op.weights) * op.n_used
            for name in op.weights:
                n_bytes = model.weight_bytes(name)
                used = n_bytes * op.n_used // op.n_experts
                products[Product(layouts[name])] += used
                experts, all_experts = experts + used, all_experts + n_bytes
    return Demand(products, n_matrices, experts, all_experts, len(lowered.ops), model.kv)


@dataclass(frozen=True)
class Bandwidth:
    """How fast this machine reads with this number of threads, in bytes per second. read: memory;
    start: seconds until a matmul has its first weights; rates: weights in matmuls, by product.
    """

    threads: int
    read: float
    start: float = 0.0
    rates: Mapping[Product, float] = field(default_factory=dict)

    @classmethod
    def now(cls, threads: int, products: Collection[Product]) -> Bandwidth:
        """Measure it. Raises MemoryBudgetError, UnsupportedError."""
        with Machine(threads, small=True) as machine:
            read = machine.read()
        return cls(threads, read, *_matmuls(threads, products))

    @classmethod
    def load(cls, threads: int) -> Bandwidth | None:
        """What was stored on this machine with `threads` threads; None: nothing."""
        stored = _stored().get(str(threads))
        if not isinstance(stored, dict):
            return None
        numbers = {name: value for name, value in stored.items() if _is_number(value)}
        read, start = numbers.pop("read", 0), numbers.pop("start", None)
        rates = {_product(name): rate for name, rate in numbers.items() if rate > 0}
        return cls(threads, read, start, rates) if read > 0 and start is not None else None

    def store(self) -> None:
        """Write it to the cache folder, beside products that were measured before. Raises OSError,
        UnsupportedError without a home folder.
        """
        before = Bandwidth.load(self.threads)
        rates = {**(before.rates if before else {}), **self.rates}
        row = {"read": self.read, "start": self.start}
        row |= {str(product): rate for product, rate in rates.items()}
        content = {"version": _VERSION, "machine": _machine()}
        content["threads"] = {**_stored(), str(self.threads): row}
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, ".machine-") as file:
            file.write(json.dumps(content).encode())

    def covers(self, demand: Demand) -> bool:
        """Whether all products of a demand were measured."""
        return demand.products.keys() <= self.rates.keys()

    def matrix_seconds(self, type_name: str, shape: tuple[int, int], form: str = "fast") -> float:
        """What the product of a matrix (n, k) of this type with one token takes, of which `rates`
        must have the layout: see `product_of`. Raises UnsupportedError for a type without a layout.
        """
        rate, weight = self.rates[product_of(type_name, form)], ffi.new("edge_weight *")
        describe_weight(type_name, shape, form, weight)
        return int(weight.n_bytes) / rate + self.start + OP_SECONDS


def product_of(type_name: str, form: str = "fast") -> Product:
    """The product of one token with weights of a type in a form. Raises UnsupportedError for a type
    without a layout.
    """
    if type_name not in supported_types():
        raise UnsupportedError(
            f"{type_name} has no layout", what=type_name, supported=supported_types()
        )
    weight = ffi.new("edge_weight *")
    describe_weight(type_name, SHAPE, form, weight)
    return Product(native.text(lib.edge_layout_name(weight.layout)))


def tokens_per_second(demand: Demand, depth: int, measured: Bandwidth) -> float:
    """Tokens per second when decoding behind `depth` tokens. `measured` must cover the demand."""
    seconds = sum(n_bytes / measured.rates[p] for p, n_bytes in demand.products.items())
    seconds += demand.n_matrices * measured.start
    seconds += demand.cache_bytes(depth) / (CACHE_SHARES[demand.kv.type] * measured.read)
    return 1 / (seconds + demand.n_ops * OP_SECONDS)


def _matmuls(threads: int, products: Collection[Product]) -> tuple[float, dict[Product, float]]:
    """The start of a matmul, and the bytes of weights per second of each product. They take turns,
    so that a machine whose speed changes does so for all.
    """
    large = product_of(SMALL_TYPE)
    with ExitStack() as opened:
        handle = native.new_threads(threads, Cores.now().cpus(threads))
        opened.callback(ffi.release, handle)
        block = opened.enter_context(_weights_block())
        small = opened.enter_context(Chain(block, SMALL_TYPE, SMALL))
        chains = {
            product: opened.enter_context(
                Chain(block, *_examples()[product.layout], tokens=product.columns)
            )
            for product in {large, *products}
        }
        seconds = _take_turns(handle, [(small, 1), *((c, p.columns) for p, c in chains.items())])
    first, *rest = seconds
    bytes_of = {product: chain.n_bytes / chain.n_layers for product, chain in chains.items()}
    took = dict(zip(chains, rest, strict=True))
    more = bytes_of[large] - small.n_bytes / small.n_layers
    start = max(0.0, took[large] - bytes_of[large] / more * max(0.0, took[large] - first))
    start = min(start, min(took.values()) / 2)
    return start, {product: bytes_of[product] / (took[product] - start) for product in products}


def _take_turns(threads: Any, chains: Collection[tuple[Chain, int]]) -> list[float]:
    """The seconds of a matmul of each chain with so many tokens: the lower quartile."""
    seconds: list[list[float]] = [[] for _ in chains]
    end = time.perf_counter() + SECONDS * len(chains)
    for i in range(MOST_ROUNDS):
        if i >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        for (chain, tokens), times in zip(chains, seconds, strict=True):
            times += chain.matmul_seconds(threads, tokens)
    return [sorted(times)[len(times) // 4] for times in seconds]


def _weights_block() -> mmap:
    """Memory to read as weights, in small pages: those of a packed file that is mapped are such.

    Raises MemoryBudgetError.
    """
    return written(buffer_bytes(largest_cache(), times=2), huge=False)


@cache
def _examples() -> dict[str, tuple[str, tuple[int, int], str]]:
    """Layout -> a type, a shape and a form that have it."""
    examples = dict[str, tuple[str, tuple[int, int], str]]()
    for form in FORMS:
        for name in supported_types():
            examples.setdefault(product_of(name, form).layout, (name, SHAPE, form))
    return examples


def _product(text: str) -> Product:
    """The product that `str` gave this text for."""
    layout, _, columns = text.rpartition(" x")
    return Product(layout, int(columns) if columns.isdecimal() else 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1e15


def _machine() -> str:
    """What the rates depend on."""
    isa = native.isa_index()
    bf16 = "+bf16" if native.native_bf16(isa) else ""
    return f"{cpu_name()}, {native.text(lib.edge_isa_name(isa))}{bf16}"


def _path() -> Path:
    return cache_dir() / "machine.json"


def _stored() -> dict[str, Any]:
    """Threads -> what was measured, as stored; {} unless `store` wrote the file on this machine."""
    try:
        content = json.loads(_path().read_bytes())
        if content["version"] == _VERSION and content["machine"] == _machine():
            return dict(content["threads"])
    except (EdgeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}
