"""The options of loading a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
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
    "Lora",
    "NativeOptions",
    "OnnxOptions",
]

#: Types of stored keys and values, the most precise first.
KVType = Literal["f16", "q8", "q4"]
KV_TYPES: tuple[KVType, ...] = get_args(KVType)

#: How weights are packed in memory.
Layout = Literal["auto", "fast", "compact"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_Path = str | os.PathLike[str]
#: LoRA adapters: the path of one, (path, scale), or several of these.
Lora = _Path | tuple[_Path, float] | Sequence[_Path | tuple[_Path, float]]

#: The most that an adapter's products may be multiplied by.
_MOST_SCALE = 1000.0


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `edge.load`, see `Loading`."""

    context: int | None
    threads: int | None
    layout: Layout
    memory: int | str | None
    kv: KVType | Literal["auto"]
    sessions: int
    chat_template: str | None
    model_sampling: bool
    lora: Lora | None
    prefix_cache: str | os.PathLike[str] | None
    ep: str | None
    fallback: bool
    soc: str | None


@dataclass(frozen=True)
class _Common:
    """The options of every engine. Raises InputError for a wrong value."""

    context: int | None = None
    threads: int | None = None
    memory: int | None = None
    sessions: int = 1
    chat_template: str | None = None
    model_sampling: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _CHECKS[field.name](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True)
class NativeOptions(_Common):
    """Options of the native engine, for GGUF files; see `Loading`."""

    layout: Layout = "auto"
    kv: KVType | Literal["auto"] = "f16"
    lora: tuple[tuple[str, float], ...] = ()
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
    threads: how many; None: one for each core that helps, see `edge.device.cores`. EDGE_THREADS
    overrides both. memory: the most that the whole process may have resident, bytes or a size as
    "1.5GB"; None: the memory that is available now. sessions: for how many sessions memory is
    planned. chat_template: the name of one of the model's chat templates; None: the default one,
    and the one named "tool_use" where tools are given. model_sampling: whether what the model's
    files recommend of sampling counts where a call says nothing else.

    For GGUF models only: layout: "fast", "compact" (some types take less memory, and are slower),
    "auto" (as many weights fast as fit). kv: the type of stored keys and values; "auto": the best
    type with which the context fits. lora: LoRA adapters in GGUF files, a path or several: their
    products are added to those of the model's matrices, which stay as they are; (path, scale)
    instead of a path multiplies them by scale. prefix_cache: a folder that keeps computed prompts
    for later runs.

    For ONNX models only: ep: the execution provider, "auto" or one that `edge-run devices` lists;
    None: the one that the model was made for. fallback: whether the CPU may run the parts that the
    provider cannot. soc: the chip to compile for, instead of this device's.
    """

    native: NativeOptions
    onnx: OnnxOptions

    @classmethod
    def of(cls, options: LoadOptions | Mapping[str, Any]) -> Loading:
        """Check the options. Raises InputError for an unknown option or a wrong value."""
        check.names(options, list(LoadOptions.__annotations__))
        return cls(_take(NativeOptions, options), _take(OnnxOptions, options))

    def for_native(self, path: str) -> NativeOptions:
        """The options for a GGUF file. Raises InputError for an option of ONNX models only."""
        for name in _own(self.onnx):
            raise InputError(
                f"{name} is an option of ONNX models, {path} runs on the CPU: make one of it with "
                f"`edge-run export {path} -o FOLDER --dialect npu`, and load that"
            )
        return self.native

    def for_onnx(self) -> OnnxOptions:
        """The options for ONNX graphs. Raises InputError for an option of GGUF models only."""
        for name in _own(self.native):
            raise InputError(f"{name} is an option of GGUF models: {_NOT_OF_ONNX[name]}")
        return self.onnx


#: Option that ONNX models do not have -> what to do instead.
_NOT_OF_ONNX = {
    "layout": "the weights are as they were exported: leave it out",
    "kv": "keys and values are of the type that the graph has: leave it out",
    "lora": "merge the adapter into the model before it is exported",
    "prefix_cache": "save the session instead, and resume it",
}

#: Option -> its check, which takes its name and value, and returns the value in a plain type.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "context": lambda name, value: check.optional(check.whole, name, value, 1),
    "threads": lambda name, value: check.optional(check.whole, name, value, 1, cores.MOST),
    "memory": lambda name, value: check.optional(check.size, name, value),
    "sessions": lambda name, value: check.whole(name, value, 1),
    "chat_template": lambda name, value: check.optional(check.text, name, value),
    "model_sampling": lambda name, value: check.flag(name, value),
    "layout": lambda name, value: check.choice(name, value, LAYOUTS),
    "kv": lambda name, value: check.choice(name, value, ("auto", *KV_TYPES)),
    "lora": lambda name, value: _adapters(name, value),
    "prefix_cache": lambda name, value: check.optional(check.path, name, value),
    "ep": lambda name, value: check.optional(check.text, name, value),
    "fallback": lambda name, value: check.flag(name, value),
    "soc": lambda name, value: check.optional(check.text, name, value),
}

_Options = TypeVar("_Options", bound=_Common)


def _adapters(name: str, value: Any) -> tuple[tuple[str, float], ...]:
    """The path and the scale of each adapter."""
    if value is None:
        return ()
    entries = value if isinstance(value, (list, tuple)) and not _is_scaled(value) else [value]
    adapters = list[tuple[str, float]]()
    for entry in entries:
        path, scale = entry if _is_scaled(entry) else (entry, 1.0)
        scale = check.number(f"the scale of {name}", scale, -_MOST_SCALE, _MOST_SCALE)
        adapters.append((check.path(name, path), scale))
    return tuple(adapters)


def _is_scaled(value: Any) -> bool:
    """Whether this is (path, scale)."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and not isinstance(value[1], (str, bytes, os.PathLike, list, tuple))


def _take(kind: type[_Options], options: Mapping[str, Any]) -> _Options:
    """The options of one engine."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in options.items() if name in names})


def _own(options: _Common) -> list[str]:
    """The options that only this engine has, and that are not at their defaults."""
    common = {field.name for field in fields(_Common)}
    own = [field for field in fields(options) if field.name not in common]
    return [field.name for field in own if getattr(options, field.name) != field.default]
