"""The options of loading a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, get_args

from edge import check
from edge.device import cores

__all__ = ["KV_TYPES", "LAYOUTS", "KVType", "Layout", "LoadOptions", "Loading"]

#: How keys and values are kept, the most precise first.
KVType = Literal["f16", "q8", "q4"]
KV_TYPES: tuple[KVType, ...] = get_args(KVType)

#: How weights lie in memory.
Layout = Literal["auto", "fast", "compact"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `edge.load`: the fields of `Loading`, for type checkers."""

    context: int | None
    threads: int | None
    layout: Layout
    memory: int | str | None
    kv: KVType | Literal["auto"]
    sessions: int
    prefix_cache: str | os.PathLike[str] | None
    ep: str | None
    fallback: bool
    soc: str | None


@dataclass(frozen=True)
class Loading:
    """Checked options. Raises InputError for a value that cannot be.

    context: tokens that a session may hold; None: the model's own limit, at most 4096.
    threads: None: the cores that help, see `edge.device.cores`; EDGE_THREADS comes before both.
    layout: "fast", "compact" (some types take less memory, and are slower), "auto": as much of it
    fast as fits. memory: the most that the whole process may have resident, bytes or a size as
    "1.5GB"; None: what is available now. kv: how keys and values are kept; "auto": the best type
    with which the context fits. sessions: how many of them the memory is planned for.
    prefix_cache: a folder that keeps computed prompts for later runs.

    Of ONNX models alone: ep: the execution provider, "auto" or one that `edge-run devices` lists;
    None: the one that the model was made for. fallback: the CPU may run what the provider does
    not. soc: compile for this chip instead of the one that is here.
    """

    context: int | None = None
    threads: int | None = None
    layout: Layout = "auto"
    memory: int | None = None
    kv: KVType | Literal["auto"] = "f16"
    sessions: int = 1
    prefix_cache: str | None = None
    ep: str | None = None
    fallback: bool = False
    soc: str | None = None

    @classmethod
    def of(cls, options: LoadOptions | Mapping[str, Any]) -> Loading:
        """Checked. Raises InputError for an option that does not exist, or cannot be."""
        check.names(options, [f.name for f in fields(cls)])
        return cls(**options)

    def __post_init__(self) -> None:
        checked = {
            "context": check.optional(check.whole, "context", self.context, 1),
            "threads": check.optional(check.whole, "threads", self.threads, 1, cores.MOST),
            "layout": check.choice("layout", self.layout, LAYOUTS),
            "memory": check.optional(check.size, "memory", self.memory),
            "kv": check.choice("kv", self.kv, ("auto", *KV_TYPES)),
            "sessions": check.whole("sessions", self.sessions, 1),
            "prefix_cache": check.optional(check.path, "prefix_cache", self.prefix_cache),
            "ep": check.optional(check.text, "ep", self.ep),
            "fallback": check.flag("fallback", self.fallback),
            "soc": check.optional(check.text, "soc", self.soc),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
