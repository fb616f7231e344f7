"""Importance matrices measured: sums of squares of what matrices read, over a text.

The sums are those of `llama-imatrix` on the same text, within the rounding of floats.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge.errors import ModelFileError
from edge.graph.ops import Attention
from edge.native.cancel import Cancel
from edge.progress import Progress
from edge.quantizer.activations import Activations, Site
from edge.quantizer.imatrix import Importance, InputSums
from edge.quantizer.mixing import mixing, value_rows
from edge.windows import Windows

__all__ = ["measure"]

Floats = NDArray[np.float32]

#: The matrices of the output, which `llama-imatrix` leaves out unless it is told otherwise.
_HEAD = ("output.weight", "token_embd.weight")


def measure(
    activations: Activations,
    windows: Windows,
    *,
    head: bool = False,
    mixed: bool = False,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Importance:
    """The importance matrix of a text.

    head: whether the output matrix has an entry, too. mixed: matrices that make values alone get
    what attention mixes of their inputs, see `edge.quantizer.mixing`, the mean over its query
    heads; `llama-imatrix` takes the inputs themselves. progress(tokens done, tokens in all).
    Raises ModelFileError for inputs that are not finite, MemoryBudgetError, CancelledError, and
    what `Engine.run` raises.
    """
    sites = {site: _entries(site, head) for site in activations.sites}
    sites = {site: names for site, names in sites.items() if names}
    readers = _readers(activations, sites) if mixed else {}
    n_sums = sum(site.n_experts * site.k for site in sites)
    n_rows = windows.context * max(site.k * site.n_used for site in sites)
    activations.require(8 * n_sums + 12 * n_rows * (1 + len(readers)), "sums of squares")
    sums = {site: _Squares(site) for site in sites}
    values = {name: _Squares(site) for name, (site, _) in readers.items()}
    names = [site.weights[0] for site in sites] + [op.output for _, op in readers.values()]
    total, done = len(windows.tokens) * windows.context, 0
    for window in windows.tokens:
        parts: dict[str, list[tuple[Floats, Floats]]] = {name: [] for name in readers}
        for n in activations.run(window, names, cancel=cancel):
            if progress is not None:
                progress(done, total)
            done += n
            for site in sites:
                for expert, x in activations.inputs(site, n):
                    sums[site].add(expert, np.einsum("ij,ij->j", x, x), len(x))
            for name, (site, op) in readers.items():
                ((_, x),) = activations.inputs(site, n)
                parts[name].append((x, activations.queries(op.output, n)))
        for name, (_, op) in readers.items():
            x, heads = (np.concatenate(joined) for joined in zip(*parts[name], strict=True))
            values[name].add(0, _mixed_squares(activations, op, x, heads), len(x))
    if progress is not None:
        progress(total, total)
    inputs = {name: sums[site].whole() for site, names in sites.items() for name in names}
    inputs |= {name: own.whole() for name, own in values.items()}
    for name, entry in inputs.items():
        if not np.isfinite(entry.squares).all():
            raise ModelFileError(
                f"what {name} reads is NaN or infinite: the weights are damaged",
                path=activations.engine.path,
            )
    return Importance(inputs, (), len(windows.tokens), windows.context)


def _entries(site: Site, head: bool) -> list[str]:
    """The weights of a site that get an entry."""
    return [w for w in site.weights if w.startswith("blk.") or (head and w in _HEAD)]


def _readers(
    activations: Activations, sites: dict[Site, list[str]]
) -> dict[str, tuple[Site, Attention]]:
    """Weights that make values alone -> what they read, and the attention that reads them."""
    rows, found = value_rows(activations.graph), dict[str, tuple[Site, Attention]]()
    site_of = {name: site for site, names in sites.items() for name in names}
    for name in {r.weight: r for r in rows}:
        own = [r for r in rows if r.weight == name]
        if sum(r.n for r in own) == activations.graph.weights[name][0]:
            found[name] = (site_of[name], own[0].attention)
    return found


def _mixed_squares(
    activations: Activations, op: Attention, x: Floats, heads: Floats
) -> NDArray[np.float64]:
    """Sums of squares (k,) of A x over the tokens, the mean over all query heads."""
    sinks = activations.vector(op.weights[0]) if op.weights else None
    each = (mixing(op, heads, sinks, head) for head in range(op.heads.n_kv_heads))
    mixed: Floats = sum(each, np.zeros((len(x), len(x)), np.float32)) @ x
    squares: Floats = np.einsum("ij,ij->j", x, mixed)
    return squares.astype(np.float64) / op.heads.n_heads


class _Squares:
    """Sums under way, in float64."""

    def __init__(self, site: Site) -> None:
        self._sums = np.zeros((site.n_experts, site.k))
        self._counts = np.zeros(site.n_experts, np.int64)

    def add(self, expert: int, squares: NDArray[np.floating], n: int) -> None:
        self._sums[expert] += squares
        self._counts[expert] += n

    def whole(self) -> InputSums:
        return InputSums(self._sums.astype(np.float32), self._counts)
