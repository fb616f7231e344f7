"""Architectures, one file each, found by the name in the GGUF's `general.architecture`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from edge.errors import UnsupportedError, brief
from edge.graph.graph import Graph
from edge.models.adapters import Adapter, by_tensor, require_used
from edge.models.common import Config, Ends, chain, decoder
from edge.models.kinds import require_model

#: Modules that are not an architecture.
_SHARED = ("adapters", "common", "experts", "keys", "kinds", "ropes")
#: Tensors that may be there and change nothing: scales of NVFP4's inputs, for engines that round
#: these to 4 bits.
_UNUSED = ("*.input_scale",)
#: Names that are spelled with a hyphen; their files have an underscore.
_HYPHENATED = ("command-r", "ernie4_5-moe", "gpt-oss", "hunyuan-dense", "hunyuan-moe")
_SPELLED = {name.replace("-", "_"): name for name in _HYPHENATED}


def architectures() -> list[str]:
    """The names of the architectures that `build` knows."""
    modules = (m.name for m in pkgutil.iter_modules(__path__) if m.name not in _SHARED)
    return sorted(_SPELLED.get(name, name) for name in modules)


def build(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    context: int | None = None,
    path: str = "model",
    adapters: Sequence[Adapter] = (),
) -> tuple[Graph, Config]:
    """The graph of the model that this metadata and these tensor shapes describe.

    context: the most positions that a session may use; None: the model's own limit, at most
    `common.DEFAULT_CONTEXT`. It also decides which LongRoPE factors are used (see
    `ropes.longrope_of`). adapters: LoRA adapters, whose products are added in this order.
    Raises UnsupportedError for a file that is not a model, and for an architecture, or a part of
    one, that is not built; ModelFileError for missing or contradictory metadata, a missing tensor
    or a wrong shape. An error of unsupported parts comes before one of missing tensors.
    """
    require_model(metadata, shapes, path)
    name = metadata["general.architecture"]
    if name not in architectures():
        raise UnsupportedError(
            f"{path}: the architecture is {brief(name)}",
            what=brief(name),
            supported=architectures(),
        )
    module = importlib.import_module(f"edge.models.{name.replace('-', '_')}")
    config = Config.read(metadata, context, path, getattr(module, "KEYS", ()))
    if config.n_layers > len(shapes):  # else a file of a few bytes could ask for thousands
        raise config.keys.error("block_count", f"{config.n_layers} layers of {len(shapes)} tensors")
    every = dict(shapes)
    for adapter in adapters:
        every.update(adapter.shapes)
    graph = Graph(every, path, by_tensor(adapters))
    if hasattr(module, "n_positions"):
        config = dataclasses.replace(config, n_positions=module.n_positions(graph, config))
    layers = module.layers if hasattr(module, "layers") else chain(module.layer)
    decoder(graph, config, layers, module.ends(config) if hasattr(module, "ends") else Ends())
    optional = (*_UNUSED, *getattr(module, "OPTIONAL", ()))
    strange = [
        tensor
        for tensor in shapes
        if tensor not in graph.weights and not any(fnmatchcase(tensor, o) for o in optional)
    ]
    if strange:
        raise UnsupportedError(
            f"{path}: {len(strange)} tensors have no place in a {name} model as it is built here, "
            f"first {brief(strange[0])}",
            what=strange[0],
        )
    if graph.fault is not None:
        raise graph.fault
    require_used(adapters, graph)
    return graph, config
