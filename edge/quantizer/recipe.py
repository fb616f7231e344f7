"""Recipes: which type each tensor of a model gets.

A recipe is a small TOML file, or a name: of one that ships (`recipes/NAME.toml`), or of a mix of
llama.cpp (see `edge.quantizer.standard`).

    description = "First and last quarter of the layers better than the middle"
    depth = 4                    # `layers` counts as if the model had so many: these are quarters
    default = "IQ2_XXS"          # of tensors that no rule matches

    [[rules]]
    tensors = ["token_embd", "output"]
    type = "Q5_K"

    [[rules]]
    layers = "0, 3"
    type = "IQ4_XS"

The first rule that matches a tensor decides. `tensors` are kinds, the same in every layer: names
without `blk.N.` and `.weight`, in which * stands for anything; without the key, all kinds. `layers`
are numbers and ranges below `depth`, such as "0-2, 29"; without the key, all tensors, in a layer or
not. Layer i of n counts as layer (i + 1/2) depth / n, rounded down: a recipe that was made for each
layer of a small model serves a bigger one of the family.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from itertools import groupby
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edge.errors import InputError, brief
from edge.files.text_file import TextFile
from edge.quantizer.standard import ALIASES, MIXES, Mix, standard_types
from edge.quantizer.types import (
    TARGETS,
    ModelTensors,
    file_type,
    fitting,
    kind_of,
    layer_of,
    need_target,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from edge.files.gguf import Tensor

__all__ = ["Chosen", "Rule", "Rules", "TypeChoice", "Uniform", "described", "find", "shipped"]

_MOST_BYTES = 1 << 20  # of a recipe's file
_MOST_DEPTH = 4096
_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


class TypeChoice(Protocol):
    """How the types of a model's tensors are chosen. name: for people and for the file."""

    @property
    def name(self) -> str: ...

    def types(self, model: ModelTensors, has_importance: bool) -> dict[str, str]:
        """The type of each matrix that is quantised. Raises UnsupportedError for rows that fit
        neither a type nor one that replaces it.
        """

    def file_type(self, types: Mapping[str, str]) -> int:
        """The number for `general.file_type`."""


@dataclass(frozen=True)
class Uniform:
    """All matrices in one type, where their rows fit it."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in TARGETS and (mix := ALIASES.get(self.name, self.name)) in MIXES:
            raise InputError(f"type {self.name!r} is a mix of several: take it as recipe {mix!r}")
        need_target(self.name, "type")

    def types(self, model: ModelTensors, has_importance: bool) -> dict[str, str]:
        """See `TypeChoice`."""
        return {t.name: fitting(self.name, t.shape[-1]) for t in model.matrices}

    def file_type(self, types: Mapping[str, str]) -> int:
        """See `TypeChoice`."""
        return file_type({"": self.name})


@dataclass(frozen=True)
class Chosen:
    """A type for each matrix of one model."""

    name: str
    chosen: Mapping[str, str]

    def types(self, model: ModelTensors, has_importance: bool) -> dict[str, str]:
        """See `TypeChoice`."""
        return dict(self.chosen)

    def file_type(self, types: Mapping[str, str]) -> int:
        """See `TypeChoice`."""
        return file_type(types)


@dataclass(frozen=True)
class Standard:
    """A mix of llama.cpp."""

    mix: Mix

    @property
    def name(self) -> str:
        """That of the mix."""
        return self.mix.name

    def types(self, model: ModelTensors, has_importance: bool) -> dict[str, str]:
        """See `TypeChoice`."""
        return standard_types(self.mix, model, has_importance)

    def file_type(self, types: Mapping[str, str]) -> int:
        """See `TypeChoice`."""
        return self.mix.file_type


@dataclass(frozen=True)
class Rule:
    """Which tensors get a type. tensors: patterns of kinds, (): all; layers: of `depth`, None: the
    tensors may also be in none.
    """

    type: str
    tensors: tuple[str, ...] = ()
    layers: frozenset[int] | None = None


@dataclass(frozen=True)
class Rules:
    """A recipe of a file. depth: how many layers the rules count."""

    name: str
    default: str
    rules: tuple[Rule, ...] = ()
    depth: int = 1

    def types(self, model: ModelTensors, has_importance: bool) -> dict[str, str]:
        """See `TypeChoice`."""
        return {
            t.name: fitting(self._type_of(t, model.layer_count), t.shape[-1])
            for t in model.matrices
        }

    def file_type(self, types: Mapping[str, str]) -> int:
        """See `TypeChoice`."""
        return file_type(types)

    def _type_of(self, tensor: Tensor, n_layers: int) -> str:
        kind, layer = kind_of(tensor.name), layer_of(tensor.name)
        counted = (2 * layer + 1) * self.depth // (2 * max(1, n_layers)) if layer >= 0 else -1
        for rule in self.rules:
            if rule.tensors and not any(fnmatchcase(kind, pattern) for pattern in rule.tensors):
                continue
            if rule.layers is None or counted in rule.layers:
                return rule.type
        return self.default


def shipped() -> list[str]:
    """The names of the recipes that ship."""
    folder = files("edge.quantizer") / "recipes"
    names = [file.name for file in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def find(recipe: str | PathLike[str]) -> TypeChoice:
    """The recipe of a name, or of a path that ends in .toml.

    Raises InputError for a name that is unknown, and for a file that is not a recipe.
    """
    name = fspath(recipe)
    if name.endswith(".toml"):
        text = TextFile.open(recipe).read(_MOST_BYTES)
        if text is None:
            raise InputError(f"{name}: a recipe has at most {_MOST_BYTES} bytes")
        return _read(text, name)
    if mix := MIXES.get(ALIASES.get(name, name)):
        return Standard(mix)
    if name not in shipped():
        known = [*shipped(), *MIXES]
        raise InputError(
            f"recipe {name!r:.80}: a file that ends in .toml, or one of {', '.join(known)}"
        )
    file = files("edge.quantizer") / "recipes" / f"{name}.toml"
    return _read(file.read_text(encoding="utf-8"), name)


def described(types: Mapping[str, str], model: ModelTensors, description: str) -> str:
    """A recipe, as the text of its file, that gives the tensors of this model these types."""
    by_kind = dict[str, dict[int, str]]()
    for name, chosen in types.items():
        by_kind.setdefault(kind_of(name), {})[layer_of(name)] = chosen
    chosen_of_all = [*types.values()]
    default = max(sorted({*chosen_of_all, "F32"}), key=chosen_of_all.count)
    depth = max(1, model.layer_count)
    lines = [f"description = {_quoted(description)}", f"depth = {depth}", f'default = "{default}"']
    for kind, by_layer in sorted(by_kind.items()):
        for chosen in sorted(set(by_layer.values()) - {default}):
            layers = sorted(layer for layer, name in by_layer.items() if name == chosen)
            lines += ["", "[[rules]]", f"tensors = [{_quoted(kind)}]"]
            if len(layers) < len(by_layer):
                lines.append(f'layers = "{_ranges(layers)}"')
            lines.append(f'type = "{chosen}"')
    return "\n".join(lines) + "\n"


def _ranges(layers: Sequence[int]) -> str:
    """Ascending numbers as `layers` has them: "0-2, 29"."""
    runs = [
        [layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda p: p[1] - p[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text) + '"'


# ---- reading -------------------------------------------------------------------------------------


def _read(text: str, name: str) -> Rules:
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # the message says the line
        raise InputError(f"{name}: {e}") from None
    _need_keys(data, ("description", "depth", "default", "rules"), name)
    depth = data.get("depth", 1)
    if type(depth) is not int or not 1 <= depth <= _MOST_DEPTH:
        raise InputError(f"{name}, depth {brief(depth)}: a whole number from 1 to {_MOST_DEPTH}")
    listed = data.get("rules", [])
    if not isinstance(listed, list) or not all(isinstance(rule, dict) for rule in listed):
        raise InputError(f"{name}, rules: each rule begins with a line [[rules]]")
    rules = [_rule(rule, depth, f"{name}, rule {i}") for i, rule in enumerate(listed, 1)]
    return Rules(Path(name).stem, _target(data, "default", name), tuple(rules), depth)


def _rule(rule: Mapping[str, Any], depth: int, where: str) -> Rule:
    _need_keys(rule, ("tensors", "layers", "type"), where)
    tensors, layers = rule.get("tensors", []), rule.get("layers")
    if not isinstance(tensors, list) or not all(isinstance(kind, str) for kind in tensors):
        raise InputError(f'{where}, tensors: a list of kinds, such as ["attn_v", "ffn_down*"]')
    for kind in tensors:
        if kind.startswith("blk.") or kind.endswith(".weight"):
            raise InputError(
                f"{where}, tensors {brief(kind)}: a kind has neither blk.N. nor .weight, "
                "and `layers` says the layers"
            )
    counted = None if layers is None else _layers(layers, depth, f"{where}, layers")
    return Rule(_target(rule, "type", where), tuple(tensors), counted)


def _layers(layers: Any, depth: int, where: str) -> frozenset[int]:
    found = set[int]()
    for part in layers.split(",") if isinstance(layers, str) else [""]:
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f'{where} {brief(layers)}: numbers and ranges in a string, such as "0-2, 29"'
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < depth:
            raise InputError(f"{where} {brief(layers)}: they are from 0 to {depth - 1} (depth - 1)")
        found.update(range(first, last + 1))
    return frozenset(found)


def _target(table: Mapping[str, Any], key: str, where: str) -> str:
    if key not in table:
        raise InputError(f"{where}: the key {key} is missing: one of {', '.join(TARGETS)}")
    value = table[key]
    need_target(value if isinstance(value, str) else str(value), f"{where}, {key}")
    return str(value)


def _need_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise InputError(f"{where}: there is no key {brief(key)}: {', '.join(known)}")
