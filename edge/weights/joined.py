"""The weights of a model and those of its adapters, which lie beside them."""

from __future__ import annotations

from collections.abc import Sequence

from edge.native import CData, ffi
from edge.progress import Progress
from edge.weights.weights import RawWeights, Weights

__all__ = ["JoinedWeights"]


class JoinedWeights:
    """model: its weights; adapters: those of each adapter. No two have a name in common. names: of
    all, those of the model first.
    """

    def __init__(self, model: Weights, adapters: Sequence[RawWeights] = ()) -> None:
        self.model, self.adapters = model, list(adapters)
        self.names = [name for part in self._parts for name in part.names]
        self._part_of = {name: part for part in self._parts for name in part.names}

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapters' weights when they are packed."""
        return sum(part.n_bytes for part in self.adapters)

    @property
    def packing_bytes(self) -> int:
        """The most bytes that packing needs besides the packed bytes."""
        return max(part.packing_bytes for part in self._parts)

    def of(self, name: str) -> Weights:
        """The weights that hold this one."""
        return self._part_of[name]

    def takes_q8(self, name: str) -> bool:
        """See `Weights.takes_q8`."""
        return self.of(name).takes_q8(name)

    def layout(self, name: str) -> str:
        """See `Weights.layout`."""
        return self.of(name).layout(name)

    def entry(self, name: str) -> CData:
        """The edge_weight of a name; its data are valid after `load`."""
        part = self.of(name)
        return part.entries[part.index[name]]

    def entries(self) -> CData:
        """The edge_weight of each name, in one array."""
        return ffi.new("edge_weight[]", [self.entry(name) for name in self.names])

    def load(self, threads: CData, progress: Progress | None = None) -> None:
        """Bring all weights into memory; progress is that of the model. See `Weights.load`."""
        for part in self.adapters:
            part.load(threads)
        self.model.load(threads, progress)

    def resident(self) -> dict[str, int | None]:
        """Bytes of the weights, and of the adapters where there are any, that are in memory; None:
        the system does not say.
        """
        sizes = {"weights": self.model.resident()}
        if self.adapters:
            parts = [part.resident() for part in self.adapters]
            known = [size for size in parts if size is not None]
            sizes["adapters"] = sum(known) if len(known) == len(parts) else None
        return sizes

    def close(self) -> None:
        """Give the memory back. No plan may use the weights any more."""
        for part in self._parts:
            part.close()

    @property
    def _parts(self) -> list[Weights]:
        return [self.model, *self.adapters]
