"""How fast a model will decode on this machine, before it is loaded.

A token reads all weights (but of experts only those that it uses) and the keys and values of the
tokens before it, and each operation must be handed to the threads:

    seconds = weights / (WEIGHTS_SHARE * bandwidth) + cache / (CACHE_SHARES[type] * bandwidth)
              + operations * OP_SECONDS

The bandwidth is measured on the machine itself. The constants were fitted to SmolLM2 and to a model
of Phi-4-mini's shape, at depths from 0 to 8,192 with one and two threads on an idle machine; they
are 4 % off on average, 23 % at most. Attention computes more per byte than a matmul, so its types
have lower shares; q4 has the lowest. The last measurement is kept in the cache folder, so that
`--report` can tell after a run how wrong its prediction was.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge.device.cores import cpu_name
from edge.device.machine import Machine
from edge.disk.atomic import replacing
from edge.disk.room import cache_dir
from edge.engine.ops import PlanExpertMatmul, PlanGatedMatmul, PlanMatmul
from edge.engine.plan import Lowered
from edge.errors import EdgeError
from edge.kv.shape import KVLayout

__all__ = ["Bandwidth", "Demand", "Planned", "demand_of", "tokens_per_second"]

WEIGHTS_SHARE, OP_SECONDS = 0.89, 1.1e-6
CACHE_SHARES = {"f16": 0.67, "q8": 0.59, "q4": 0.28}

_VERSION = 1


class Planned(Protocol):
    """What an Engine and a Description have in common."""

    @property
    def lowered(self) -> Lowered: ...
    @property
    def kv(self) -> KVLayout: ...
    def weight_bytes(self, name: str) -> int: ...


@dataclass(frozen=True)
class Demand:
    """What a decoded token needs. weights: bytes of weights that it reads; experts: how many of
    them are of its experts; all_experts: bytes of all experts; n_ops: operations.
    """

    weights: int
    experts: int
    all_experts: int
    n_ops: int
    kv: KVLayout

    def cache_bytes(self, depth: int) -> int:
        """Bytes of keys and values that a token behind `depth` others reads."""
        return self.kv.bytes(depth + 1)


def demand_of(model: Planned) -> Demand:
    """The demand of a loaded or described model."""
    ops = model.lowered.ops
    matmuls = [op for op in ops if isinstance(op, (PlanMatmul, PlanGatedMatmul))]
    dense = sum(model.weight_bytes(name) for op in matmuls for name in op.weights)
    experts = all_experts = 0
    for op in ops:
        if isinstance(op, PlanExpertMatmul):
            n_bytes = sum(map(model.weight_bytes, op.weights))
            all_experts += n_bytes
            experts += n_bytes * op.n_used // op.n_experts
    return Demand(dense + experts, experts, all_experts, len(ops), model.kv)


@dataclass(frozen=True)
class Bandwidth:
    """The bandwidth of this machine. read: bytes per second with this number of threads."""

    threads: int
    read: float

    @classmethod
    def now(cls, threads: int) -> Bandwidth:
        """The median of five measurements. Raises MemoryBudgetError, UnsupportedError."""
        with Machine(threads, small=True) as machine:
            return cls(threads, statistics.median(machine.measure().read for _ in range(5)))

    @classmethod
    def load(cls, threads: int) -> Bandwidth | None:
        """The last measurement on this machine with `threads` threads; None: there is none."""
        read = _stored().get(str(threads))
        if isinstance(read, (int, float)) and 0 < read < 1e15:
            return cls(threads, float(read))
        return None

    def store(self) -> None:
        """Write it to the cache folder. Raises OSError, UnsupportedError without a home folder."""
        content = {"version": _VERSION, "cpu": cpu_name()}
        content["read"] = {**_stored(), str(self.threads): self.read}
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, ".machine-") as file:
            file.write(json.dumps(content).encode())


def tokens_per_second(demand: Demand, depth: int, measured: Bandwidth) -> float:
    """Tokens per second when decoding behind `depth` tokens."""
    seconds = demand.weights / (WEIGHTS_SHARE * measured.read)
    seconds += demand.cache_bytes(depth) / (CACHE_SHARES[demand.kv.type] * measured.read)
    return 1 / (seconds + demand.n_ops * OP_SECONDS)


def _path() -> Path:
    return cache_dir() / "machine.json"


def _stored() -> dict[str, Any]:
    """Threads -> bytes per second, as stored; {} unless `store` wrote the file on this CPU."""
    try:
        content = json.loads(_path().read_bytes())
        if content["version"] == _VERSION and content["cpu"] == cpu_name():
            return dict(content["read"])
    except (EdgeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}
