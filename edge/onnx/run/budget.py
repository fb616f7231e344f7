"""The memory that an ONNX model will need, part by part, before onnxruntime takes any of it.

weights           of every graph; int8 weights count twice where onnxruntime converts a copy of
                  them, see saturation.py
keys and values   of all planned sessions, with a full context
sessions          of onnxruntime: its data for each node, and one weight that lies in memory twice
                  while onnxruntime brings it into another layout
buffers           of a run: activations, and the logits of each token that the graph makes
other parts       see `edge.device.budget`
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
from edge.template.template import Sources
from edge.tokenizer.cost import TokenizerBytes, folder_tokenizer_bytes

if TYPE_CHECKING:
    from edge.loading import OnnxOptions

__all__ = ["OnnxLedger"]

#: Bytes of the imported onnxruntime with a session of an empty graph.
_RUNTIME = {"onnxruntime": 32 << 20}

#: Bytes of a session for a node. Measured: 8 KiB, in a graph of 2,000 nodes.
_NODE_BYTES = 10 << 10

#: Numbers of results of the widest matmul, and of matrices of scores, that exist at a time.
_WIDE, _SCORES = 8, 4


@dataclass(frozen=True)
class OnnxLedger:
    """The plan of a model's memory.

    parts: bytes by name. budget: of the whole process, None: the system does not report it.
    is_stated: the caller stated the budget. is_fixed: the size of keys and values does not depend
    on the context.
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
        """Make the plan.

        Raises MemoryBudgetError for a stated budget above the available memory.
        """
        element = np.dtype(folder.dtype).itemsize
        position = 2 * folder.n_layers * folder.n_kv_heads * folder.head_dim * element
        positions = n_context if isinstance(folder, Decoder) else folder.context or n_context
        copies = 2 if isinstance(folder, Decoder) and not folder.is_shared else 1
        n_bytes = folder_tokenizer_bytes(folder.n_vocab, _size(folder.root / "tokenizer.json"))
        tokenizer = TokenizerBytes(building=n_bytes, built=n_bytes)
        parts = {
            "weights": folder.weight_bytes + sum(map(exact_bytes, folder.graphs.values())),
            "keys and values": copies * options.sessions * positions * position,
            "sessions": _sessions(folder),
            "buffers": _buffers(folder, most_tokens(folder), positions),
            "logits": logits_bytes(folder.n_vocab),
            **text_parts(tokenizer, _template(folder, options.chat_template), n_context),
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
        """Whether the model fits into the budget."""
        return self.budget is None or self.needed <= self.budget

    def require(self) -> None:
        """Raise MemoryBudgetError unless the model fits into the budget."""
        if self.budget is None or self.fits:
            return
        kv = self.parts["keys and values"]
        listed = ", ".join(f"{name} {show(size)}" for name, size in self.parts.items() if size)
        words = "the budget is" if self.is_stated else "there is"
        over = self.needed - self.budget
        fits = int(self.context * (1 - over / kv)) if kv > over and not self.is_fixed else 0
        hint = f"Try --context {fits}" if fits else "A smaller context would not do"
        raise MemoryBudgetError(
            f"{self.path} needs {show(self.needed)}, {words} {show(self.budget)}: {listed}. {hint}",
            needed=self.needed,
            budget=self.budget,
            parts=self.parts,
        )


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _template(folder: Folder, name: str | None) -> int:
    """Bytes of the compiled chat template; 0 if it is missing or damaged."""
    try:
        return Sources.from_folder(folder.root, name).compiled_bytes
    except EdgeError:
        return 0


def _sessions(folder: Folder) -> int:
    """Bytes of the graphs' nodes, and of the largest weight, whose layout is changed in a copy."""
    graphs = folder.graphs.values()
    largest = max((t.n_bytes for graph in graphs for t in graph.tensors), default=0)
    return largest + _NODE_BYTES * sum(len(graph.nodes) for graph in graphs)


def _buffers(folder: Folder, chunk: int, positions: int) -> int:
    """Bytes of the results of a run: logits, the widest results of matmuls, attention scores."""
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
    has_all_logits = isinstance(folder, Decoder) and not folder.last_only
    logits = folder.n_vocab * (chunk if has_all_logits else 1)
    return 4 * (logits + chunk * (_WIDE * widest + _SCORES * scores))
