"""The memory of an ONNX model, part by part, before onnxruntime takes any of it.

weights           of every graph: onnxruntime lays those that its kernels read out anew, and
                  holds int8 weights twice where products would be cut off
keys and values   of all sessions that are planned for, full
buffers           of a run: logits of each token where the graph makes them, activations
the rest          as `edge.device.budget` counts it
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge.device.budget import MARGIN_BYTES, budget_of, logits_bytes, program_bytes, text_parts
from edge.errors import EdgeError, MemoryBudgetError
from edge.onnx.files.folder import Decoder, Folder
from edge.onnx.providers.saturation import exact_bytes
from edge.onnx.run.runners import most_tokens
from edge.sizes import show
from edge.template.template import ChatTemplate, compiled_bytes
from edge.tokenizer.cost import folder_tokenizer_bytes

if TYPE_CHECKING:
    from edge.loading import OnnxOptions

__all__ = ["OnnxLedger"]

#: onnxruntime, imported, with a session of an empty graph.
_RUNTIME = {"onnxruntime": 32 << 20}

#: What a session keeps for a node. Measured: 8 KiB with 2,000 of them.
_NODE_BYTES = 10 << 10

#: How many results of the widest matmul, and matrices of scores, there are at a time.
_WIDE, _SCORES = 8, 4


@dataclass(frozen=True)
class OnnxLedger:
    """The plan of a model's memory. parts: bytes by name; budget: for the whole process, None: the
    system does not say; is_stated: the caller did; is_fixed: keys and values take the same whatever
    the context.
    """

    path: str
    parts: dict[str, int]
    context: int
    sessions: int
    budget: int | None
    is_stated: bool
    is_fixed: bool

    @classmethod
    def draw_up(cls, folder: Folder, n_context: int, options: OnnxOptions) -> OnnxLedger:
        """Add up. Raises MemoryBudgetError for a stated budget that is more than there is."""
        element = np.dtype(folder.dtype).itemsize
        position = 2 * folder.n_layers * folder.n_kv_heads * folder.head_dim * element
        positions = n_context if isinstance(folder, Decoder) else folder.context or n_context
        copies = 2 if isinstance(folder, Decoder) and not folder.is_shared else 1
        tokenizer = folder_tokenizer_bytes(folder.n_vocab, _size(folder.root / "tokenizer.json"))
        parts = {
            "weights": folder.weight_bytes + sum(map(exact_bytes, folder.graphs.values())),
            "keys and values": copies * options.sessions * positions * position,
            "sessions": _sessions(folder),
            "buffers": _buffers(folder, most_tokens(folder), positions),
            "logits": logits_bytes(folder.n_vocab),
            **text_parts((tokenizer, tokenizer), _template(folder), n_context),
            "program": program_bytes(_RUNTIME),
            "margin": MARGIN_BYTES,
        }
        budget = budget_of(options.memory)
        stated = options.memory is not None
        is_fixed = not isinstance(folder, Decoder)
        return cls(str(folder.path), parts, n_context, options.sessions, budget, stated, is_fixed)

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.budget is None or self.needed <= self.budget

    def require(self) -> None:
        """Raise MemoryBudgetError unless it fits."""
        if self.budget is None or self.fits:
            return
        kv = self.parts["keys and values"]
        listed = ", ".join(f"{name} {show(size)}" for name, size in self.parts.items() if size)
        there = "the budget is" if self.is_stated else "there is"
        over = self.needed - self.budget
        fits = int(self.context * (1 - over / kv)) if kv > over and not self.is_fixed else 0
        hint = f"Try --context {fits}" if fits else "A smaller context would not do"
        raise MemoryBudgetError(
            f"{self.path} needs {show(self.needed)}, {there} {show(self.budget)}: {listed}. {hint}",
            needed=self.needed,
            budget=self.budget,
            parts=self.parts,
        )


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _template(folder: Folder) -> int:
    """Bytes of the compiled chat template; one that is missing or damaged is not compiled."""
    try:
        return compiled_bytes(ChatTemplate.from_folder(folder.root).source)
    except EdgeError:
        return 0


def _sessions(folder: Folder) -> int:
    """Bytes of the graphs themselves, and of a weight that lies there twice while it is laid out
    anew.
    """
    graphs = folder.graphs.values()
    largest = max((t.n_bytes for graph in graphs for t in graph.tensors), default=0)
    return largest + _NODE_BYTES * sum(len(graph.nodes) for graph in graphs)


def _buffers(folder: Folder, chunk: int, positions: int) -> int:
    """Bytes of what a run makes: logits, the widest results of matmuls, scores of attention."""
    sizes = [
        sorted(t.dims)
        for graph in folder.graphs.values()
        for t in graph.initializers.values()
        if len(t.dims) == 2 and folder.n_vocab not in t.dims
    ]
    widest = max((size[1] for size in sizes), default=0)
    n_heads = min((size[1] for size in sizes), default=0) // folder.head_dim
    ops = {node.op for graph in folder.graphs.values() for node in graph.nodes}
    scores = 0 if "GroupQueryAttention" in ops else n_heads * (positions + chunk)
    every = isinstance(folder, Decoder) and not folder.last_only
    logits = folder.n_vocab * (chunk if every else 1)
    return 4 * (logits + chunk * (_WIDE * widest + _SCORES * scores))
