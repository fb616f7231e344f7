"""The shape of the cache of keys and values: what a page holds, and how many bytes it takes.

A page holds PAGE positions of a *group* of layers. The layers of a group see the same positions and
have keys and values of the same shape. Most models have one group. Where only some layers have a
window, these give back pages that the other layers still need.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edge import native
from edge.errors import ContextError
from edge.graph.graph import Graph
from edge.native import CData, ffi, lib

__all__ = [
    "PAGE",
    "KVLayout",
    "KVShape",
    "LayerGroup",
    "WhenFull",
    "kv_types",
    "pages_of",
    "too_many",
]

#: What a session does when its context is full, see `KVCache`.
WhenFull = Literal["stop", "slide"]

#: Positions of a page.
PAGE = int(lib.edge_page_positions())


def kv_types() -> list[str]:
    """The types that keys and values may be kept in, the most precise first."""
    names: list[str] = []
    while (name := lib.edge_kv_type_name(len(names))) != ffi.NULL:
        names.append(native.text(name))
    return names


def too_many(n_tokens: int, limit: int) -> ContextError:
    """The error for n_tokens in a cache that holds `limit`."""
    return ContextError(
        f"{n_tokens} tokens are {n_tokens - limit} more than the context of {limit} holds",
        needed=n_tokens,
        limit=limit,
    )


def pages_of(n_tokens: int) -> int:
    """Pages that n_tokens positions take."""
    return -(-n_tokens // PAGE)


@dataclass(frozen=True)
class KVShape:
    """What a page holds: positions of some layers and all their key heads, in one of `kv_types`."""

    type: str
    n_layers: int
    n_kv_heads: int
    head_dim: int

    @property
    def native(self) -> CData:
        """The shape as an edge_kv_shape."""
        numbers = [kv_types().index(self.type), self.n_layers, self.n_kv_heads, self.head_dim]
        return ffi.new("edge_kv_shape *", numbers)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page; -1: the type cannot keep heads of this size."""
        return int(lib.edge_page_bytes(self.native))


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share pages.

    layers: their numbers in the model, in the order of a page. window: how many last positions a
    token sees, its own included; 0: all. shape: what a page of the group holds.
    """

    layers: tuple[int, ...]
    window: int
    shape: KVShape

    def first_page(self, position: int) -> int:
        """The first page that a token at this position needs: the first that it sees, but at most
        the page before its own, since some types keep keys relative to that page.
        """
        return max(0, position - max(self.window - 1, PAGE)) // PAGE if self.window else 0

    def most_pages(self, n_context: int, chunk: int) -> int:
        """The most pages that a cache of n_context tokens has at once, when a run takes at most
        `chunk` tokens. With a window these are the pages of the run and of the positions that its
        first token needs, which may begin anywhere in a page.
        """
        n_pages = pages_of(n_context)
        if self.window:
            n_positions = max(self.window - 1, PAGE) + chunk
            n_pages = min(n_pages, pages_of(n_positions - 1) + 1)
        return n_pages


@dataclass(frozen=True)
class KVLayout:
    """The groups of a model, in the order of their first layers; all have one type."""

    groups: tuple[LayerGroup, ...]

    @classmethod
    def of(cls, graph: Graph, n_positions: int, kv: str = "f16") -> KVLayout:
        """The groups of a graph's layers. n_positions: positions that the model was made for; a
        window of at least so many counts as none.

        The groups do not depend on the context of the sessions, so session files and kept prompts
        do not depend on it, either.
        """
        layers: dict[tuple[int, int, int], list[int]] = {}
        for op in graph.attentions:
            window = op.window if op.window < n_positions else 0
            key = window, op.heads.n_kv_heads, op.heads.head_dim
            layers.setdefault(key, []).append(op.layer)
        return cls(
            tuple(
                LayerGroup(tuple(members), window, KVShape(kv, len(members), n_kv_heads, head_dim))
                for (window, n_kv_heads, head_dim), members in layers.items()
            )
        )

    @property
    def type(self) -> str:
        """One of `kv_types`."""
        return self.groups[0].shape.type

    def with_type(self, name: str) -> KVLayout:
        """The same groups with another type."""
        groups = (replace(g, shape=replace(g.shape, type=name)) for g in self.groups)
        return KVLayout(tuple(groups))

    @property
    def is_possible(self) -> bool:
        """Whether the type can keep the heads of all groups."""
        return all(group.shape.page_bytes > 0 for group in self.groups)

    @property
    def page_bytes(self) -> int:
        """Bytes of PAGE positions in all layers: one page of each group."""
        return sum(group.shape.page_bytes for group in self.groups)

    @property
    def places(self) -> dict[int, tuple[int, int]]:
        """Layer of the model -> (its group, its index in a page of that group)."""
        return {
            layer: (i, j)
            for i, group in enumerate(self.groups)
            for j, layer in enumerate(group.layers)
        }

    def bytes(self, n_tokens: int) -> int:
        """Bytes of the pages of n_tokens positions; in a group with a window, of the last positions
        within the window.
        """
        return sum(
            pages_of(min(n_tokens, group.window or n_tokens)) * group.shape.page_bytes
            for group in self.groups
        )

    def facts(self) -> dict[str, Any]:
        """The facts that pages depend on, as plain values for JSON. For one group they are its
        shape alone, since its window does not change what a page holds.
        """
        if len(self.groups) == 1:
            return asdict(self.groups[0].shape)
        groups = [
            {
                "layers": list(group.layers),
                "window": group.window,
                "n_kv_heads": group.shape.n_kv_heads,
                "head_dim": group.shape.head_dim,
            }
            for group in self.groups
        ]
        return {"type": self.type, "groups": groups}
