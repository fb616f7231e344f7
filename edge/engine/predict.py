"""How fast a model will decode on this machine, before it is loaded.

A token reads all weights and the keys and values of the tokens before it, and each operation has
to be handed to the threads:

    seconds = weights / (WEIGHTS_SHARE * bandwidth) + cache / (CACHE_SHARES[type] * bandwidth)
              + operations * OP_SECONDS

The bandwidth is measured on the machine that it is for; the constants were fitted to SmolLM2 and to
a model of Phi-4-mini's shape, at depths from 0 to 8,192 with one thread and two on an idle machine:
4 % off on average, 23 % at most. Attention does more per byte than a matmul: the
shares of its types are lower, that of q4 most. The last measurement is kept in the cache folder, so
that after a run `--report` can say how wrong its prediction was.
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
from edge.engine.plan import Lowered, PlanGatedMatmul, PlanMatmul
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
    """What a decoded token needs. weights: bytes that it reads; n_ops: operations."""

    weights: int
    n_ops: int
    kv: KVLayout

    def cache_bytes(self, depth: int) -> int:
        """Bytes of keys and values that the token behind `depth` others reads."""
        return self.kv.bytes(depth + 1)


def demand_of(model: Planned) -> Demand:
    """Of a model that is loaded, or described."""
    ops = model.lowered.ops
    matmuls = [op for op in ops if isinstance(op, (PlanMatmul, PlanGatedMatmul))]
    weights = sum(model.weight_bytes(name) for op in matmuls for name in op.weights)
    return Demand(weights, len(ops), model.kv)


@dataclass(frozen=True)
class Bandwidth:
    """The bandwidth of this machine. read: bytes per second with so many threads."""

    threads: int
    read: float

    @classmethod
    def now(cls, threads: int) -> Bandwidth:
        """Measure it, a few times. Raises MemoryBudgetError, UnsupportedError."""
        with Machine(threads, small=True) as machine:
            return cls(threads, statistics.median(machine.measure().read for _ in range(5)))

    @classmethod
    def load(cls, threads: int) -> Bandwidth | None:
        """The last measurement on this machine with so many threads, None: there is none."""
        read = _stored().get(str(threads))
        if isinstance(read, (int, float)) and 0 < read < 1e15:
            return cls(threads, float(read))
        return None

    def store(self) -> None:
        """Keep it in the cache folder. Raises OSError, UnsupportedError without a home folder."""
        content = {"version": _VERSION, "cpu": cpu_name()}
        content["read"] = {**_stored(), str(self.threads): self.read}
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, ".machine-") as file:
            file.write(json.dumps(content).encode())


def tokens_per_second(demand: Demand, depth: int, measured: Bandwidth) -> float:
    """The speed of decoding behind `depth` tokens."""
    seconds = demand.weights / (WEIGHTS_SHARE * measured.read)
    seconds += demand.cache_bytes(depth) / (CACHE_SHARES[demand.kv.type] * measured.read)
    return 1 / (seconds + demand.n_ops * OP_SECONDS)


def _path() -> Path:
    return cache_dir() / "machine.json"


def _stored() -> dict[str, Any]:
    """Threads -> bytes per second, as stored; {} for anything but what `store` wrote here."""
    try:
        content = json.loads(_path().read_bytes())
        if content["version"] == _VERSION and content["cpu"] == cpu_name():
            return dict(content["read"])
    except (EdgeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}
