"""The nodes of a graph that a provider runs, and those that onnxruntime gives to the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge.onnx.files.proto import OnnxFile

__all__ = ["Partition"]


@dataclass(frozen=True)
class Partition:
    """The part of a graph that the provider runs, as onnxruntime assigned it.

    nodes: after onnxruntime's own rewriting. pieces: subgraphs that the provider got, 1: the graph
    was not cut. multiply_adds: with weights, for one token. on_cpu: operator -> number of nodes.
    """

    nodes: int
    on_provider: int
    pieces: int
    multiply_adds: int
    multiply_adds_on_provider: int
    on_cpu: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_cpu(cls, graph: OnnxFile) -> Partition:
        """The partition of the CPU provider, which runs all nodes."""
        n, work = len(graph.nodes), sum(graph.multiply_adds().values())
        return cls(n, n, 1, work, work)

    @classmethod
    def of(cls, session: Any, ep: str, graph: OnnxFile) -> Partition:
        """The partition of a session that recorded its assignment.

        ep: onnxruntime's name of the provider. The multiply-adds of a node count for the provider
        if the node still has its own name. Those of rewritten nodes do not count, so the number
        may be too small, but never too large.
        """
        ours, on_cpu, pieces = set[str](), Counter[str](), 0
        n_ours = n_cpu = 0
        for piece in session.get_provider_graph_assignment_info():
            nodes = piece.get_nodes()
            if piece.ep_name == ep:
                pieces += 1
                n_ours += len(nodes)
                ours.update(node.name for node in nodes)
            else:
                n_cpu += len(nodes)
                on_cpu.update(node.op_type for node in nodes)
        work = graph.multiply_adds()
        total = sum(work.values())
        own = sum(n for name, n in work.items() if name in ours) if n_cpu else total
        return cls(n_ours + n_cpu, n_ours, pieces, total, own, dict(on_cpu.most_common()))

    @classmethod
    def from_json(cls, facts: Any) -> Partition:
        """Read what `to_json` wrote for a graph that the provider runs whole. Raises ValueError."""
        numbers = [facts.get(name) for name in ("nodes", "pieces", "multiply_adds")]
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise ValueError("not a partition")
        nodes, pieces, work = numbers
        return cls(nodes, nodes, pieces, work, work)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @property
    def whole(self) -> bool:
        """Whether the provider runs the whole graph."""
        return self.nodes > 0 and self.on_provider == self.nodes

    @property
    def left(self) -> str:
        """The operators on the CPU, for people: the most frequent first, such as `Softmax (2)`."""
        return ", ".join(f"{op} ({n})" for op, n in self.on_cpu.items())

    def __str__(self) -> str:
        share = f"{self.on_provider:,} of {self.nodes:,} nodes"
        if self.multiply_adds:
            percent = 100 * self.multiply_adds_on_provider / self.multiply_adds
            share += f", {percent:.1f} % of the multiply-adds with weights"
        if self.on_provider:
            share += f", in {'1 piece' if self.pieces == 1 else f'{self.pieces} pieces'}"
        return f"{share}; on the CPU: {self.left}" if self.on_cpu else share
