"""The options of loading a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, TypeVar, get_args

from edge import check
from edge.device import cores
from edge.errors import InputError

__all__ = [
    "KV_TYPES",
    "LAYOUTS",
    "KVType",
    "Layout",
    "LoadOptions",
    "Loading",
    "NativeOptions",
    "OnnxOptions",
]

#: How keys and values are kept, the most precise first.
KVType = Literal["f16", "q8", "q4"]
KV_TYPES: tuple[KVType, ...] = get_args(KVType)

#: How weights lie in memory.
Layout = Literal["auto", "fast", "compact"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `edge.load`, see `Loading`."""

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
class _Common:
    """What every engine takes. Raises InputError for a value that cannot be."""

    context: int | None = None
    threads: int | None = None
    memory: int | None = None
    sessions: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True)
class NativeOptions(_Common):
    """Options of the native engine, for GGUF files; see `Loading`."""

    layout: Layout = "auto"
    kv: KVType | Literal["auto"] = "f16"
    prefix_cache: str | None = None


@dataclass(frozen=True)
class OnnxOptions(_Common):
    """Options of onnxruntime's engine, for ONNX graphs; see `Loading`."""

    ep: str | None = None
    fallback: bool = False
    soc: str | None = None


@dataclass(frozen=True)
class Loading:
    """The keyword arguments of `edge.load`, checked before it is known which engine they are for.

    context: tokens that a session may hold; None: the model's own limit, at most 4096.
    threads: None: the cores that help, see `edge.device.cores`; EDGE_THREADS comes before both.
    memory: the most that the whole process may have resident, bytes or a size as "1.5GB"; None:
    what is available now. sessions: how many of them the memory is planned for.

    Of GGUF models alone: layout: "fast", "compact" (some types take less memory, and are slower),
    "auto": as much of it fast as fits. kv: how keys and values are kept; "auto": the best type with
    which the context fits. prefix_cache: a folder that keeps computed prompts for later runs.

    Of ONNX models alone: ep: the execution provider, "auto" or one that `edge-run devices` lists;
    None: the one that the model was made for. fallback: the CPU may run what the provider does
    not. soc: compile for this chip instead of the one that is here.
    """

    native: NativeOptions
    onnx: OnnxOptions

    @classmethod
    def of(cls, options: LoadOptions | Mapping[str, Any]) -> Loading:
        """Checked. Raises InputError for an option that does not exist, or cannot be."""
        check.names(options, list(LoadOptions.__annotations__))
        return cls(_take(NativeOptions, options), _take(OnnxOptions, options))

    def for_native(self, path: str) -> NativeOptions:
        """For a GGUF file. Raises InputError for an option that ONNX models alone have."""
        for name in _own(self.onnx):
            raise InputError(
                f"{name} is an option of ONNX models, {path} runs on the CPU: make one of it with "
                f"`edge-run export {path} -o FOLDER --dialect npu`, and load that"
            )
        return self.native

    def for_onnx(self) -> OnnxOptions:
        """For ONNX graphs. Raises InputError for an option that GGUF models alone have."""
        for name in _own(self.native):
            raise InputError(f"{name} is an option of GGUF models: {_NOT_OF_ONNX[name]}")
        return self.onnx


#: What to do instead of an option that ONNX models do not have.
_NOT_OF_ONNX = {
    "layout": "the weights are as they were exported: leave it out",
    "kv": "keys and values are of the type that the graph has: leave it out",
    "prefix_cache": "save the session instead, and resume it",
}

#: Option -> its check, which takes its name and value, and returns the value, plain.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "context": lambda name, value: check.optional(check.whole, name, value, 1),
    "threads": lambda name, value: check.optional(check.whole, name, value, 1, cores.MOST),
    "memory": lambda name, value: check.optional(check.size, name, value),
    "sessions": lambda name, value: check.whole(name, value, 1),
    "layout": lambda name, value: check.choice(name, value, LAYOUTS),
    "kv": lambda name, value: check.choice(name, value, ("auto", *KV_TYPES)),
    "prefix_cache": lambda name, value: check.optional(check.path, name, value),
    "ep": lambda name, value: check.optional(check.text, name, value),
    "fallback": lambda name, value: check.flag(name, value),
    "soc": lambda name, value: check.optional(check.text, name, value),
}

_Options = TypeVar("_Options", bound=_Common)


def _take(kind: type[_Options], options: Mapping[str, Any]) -> _Options:
    """Those of one engine."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})


def _own(options: _Common) -> list[str]:
    """The options of one engine alone that are not at their defaults."""
    common = {field.name for field in fields(_Common)}
    own = [field for field in fields(options) if field.name not in common]
    return [field.name for field in own if getattr(options, field.name) != field.default]
