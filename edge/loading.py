"""The options of loading a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

from edge.errors import InputError
from edge.kv import kv_types
from edge.memory import parse_size
from edge.weights import LAYOUTS, Layout

__all__ = ["KVType", "LoadOptions", "Loading"]

KVType = Literal["auto", "f16", "q8", "q4"]


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `edge.load`: the fields of `Loading`, for type checkers."""

    context: int | None
    threads: int | None
    layout: Layout
    memory: int | str | None
    kv: KVType
    sessions: int
    prefix_cache: str | os.PathLike[str] | None
    ep: str | None
    fallback: bool
    soc: str | None


@dataclass(frozen=True)
class Loading:
    """Checked options. Raises InputError for a value that cannot be.

    context: tokens that a session may hold; None: the model's own limit, at most 4096.
    threads: None: the cores that help, see `edge.cores`; EDGE_THREADS comes before both. layout:
    "fast", "compact" (some types take less memory, and are slower), "auto": as much of it fast as
    fits. memory: the most that the whole process may have resident, bytes or a size as "1.5GB";
    None: what is available now. kv: how keys and values are kept; "auto": the best type with which
    the context fits. sessions: how many of them the memory is planned for. prefix_cache: a folder
    that keeps computed prompts for later runs.

    Of ONNX models alone: ep: the execution provider, "auto" or one that `edge-run devices` lists;
    None: the one that the model was made for. fallback: the CPU may run what the provider does
    not. soc: compile for this chip instead of the one that is here.
    """

    context: int | None = None
    threads: int | None = None
    layout: Layout = "auto"
    memory: int | None = None
    kv: KVType = "f16"
    sessions: int = 1
    prefix_cache: str | None = None
    ep: str | None = None
    fallback: bool = False
    soc: str | None = None

    @classmethod
    def of(cls, options: LoadOptions | Mapping[str, Any]) -> Loading:
        """Checked. Raises InputError for an option that does not exist, or cannot be."""
        names = [f.name for f in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise InputError(f"no option {unknown[0]!r}, there are {', '.join(names)}")
        given: dict[str, Any] = dict(options)
        if isinstance(given.get("memory"), str):
            given["memory"] = parse_size(given["memory"], "memory")
        if given.get("prefix_cache") is not None:
            given["prefix_cache"] = os.fsdecode(given["prefix_cache"])
        return cls(**given)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise InputError(f"layout {self.layout!r}: one of {', '.join(LAYOUTS)}")
        if self.kv not in ("auto", *kv_types()):
            raise InputError(f"kv {self.kv!r}: one of auto, {', '.join(kv_types())}")
        for name, value in (("memory", self.memory), ("sessions", self.sessions)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise InputError(f"{name} is {value!r}, it must be a whole number from 1")
