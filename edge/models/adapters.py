"""LoRA adapters in GGUF files: what `convert_lora_to_gguf.py` of llama.cpp writes.

    general.type, adapter.type   "adapter" and "lora"
    general.architecture         that of the model
    adapter.lora.alpha           products are multiplied by alpha / rank; 0: they are not
    NAME.lora_a, NAME.lora_b     the matrices A and B for the model's tensor NAME

Matrices stay beside the model's, which are not changed: so one packed file of the model serves with
and without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import InputError, ModelFileError, UnsupportedError, brief
from edge.graph.graph import Graph
from edge.graph.ops import MAX_DIM, LowRank
from edge.models.keys import Keys

__all__ = ["Adapter", "GGUFHeader", "by_tensor", "require_used"]

#: Keys of activated LoRA, which begins at these tokens.
_ALORA = "adapter.alora.invocation_tokens"


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a model's or of an adapter's file. shapes: of its tensors."""

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    path: str


@dataclass(frozen=True)
class Adapter:
    """An adapter of a model. scale: the user's; prefix: of its tensors' names in the graph; shapes:
    of its tensors, by these names; pairs: the model's tensor -> what is added to its products.
    """

    path: str
    scale: float
    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    pairs: Mapping[str, LowRank]

    @classmethod
    def read(cls, header: GGUFHeader, model: GGUFHeader, *, number: int, scale: float) -> Adapter:
        """Check an adapter's header. model: of the model that it is for; number: of the adapter,
        among those of this model.

        Raises InputError for a file that is no adapter, or one of another architecture;
        UnsupportedError for a kind or a part of an adapter that is not built; ModelFileError for
        tensors that do not fit together or to the model.
        """
        alpha = _alpha(header, model.metadata.get("general.architecture"))
        prefix, pairs = f"lora{number}.", dict[str, LowRank]()
        for name in _adapted(header):
            rank = _rank(name, header, model)
            a, b = f"{prefix}{name}.lora_a", f"{prefix}{name}.lora_b"
            pairs[name] = LowRank(a, b, scale * alpha / rank if alpha else scale)
        named = {prefix + name: shape for name, shape in header.shapes.items()}
        return cls(header.path, scale, prefix, named, pairs)

    def as_dict(self) -> dict[str, Any]:
        """What `info` tells of it."""
        ranks = [self.shapes[low.b][1] for low in self.pairs.values()]
        return {
            "path": self.path,
            "scale": self.scale,
            "tensors": len(self.pairs),
            "rank": max(ranks),
        }


def by_tensor(adapters: Sequence[Adapter]) -> dict[str, list[LowRank]]:
    """Each adapted tensor of the model -> what the adapters add to its products, in their order."""
    adapted: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for name, low in adapter.pairs.items():
            adapted.setdefault(name, []).append(low)
    return adapted


def require_used(adapters: Sequence[Adapter], graph: Graph) -> None:
    """Raise UnsupportedError for an adapted tensor that the graph uses in a way that has no place
    for an adapter. Tensors that the graph does not use (keys of layers that read another's) may be
    adapted, to no effect.
    """
    for adapter in adapters:
        for name, low in adapter.pairs.items():
            if name in graph.weights and low.b not in graph.weights:
                raise UnsupportedError(
                    f"{adapter.path}: it adapts {brief(name)}, which is no plain matrix: only such "
                    "matrices and the embedding can be adapted",
                    what=f"adapter of {name}",
                )


def _alpha(header: GGUFHeader, architecture: Any) -> float:
    """The checked alpha of an adapter for this architecture."""
    metadata, path = header.metadata, header.path
    if metadata.get("general.type") != "adapter":
        raise InputError(
            f"{path} is no LoRA adapter (general.type is not adapter): name a file that "
            "convert_lora_to_gguf.py of llama.cpp made"
        )
    kind, own = metadata.get("adapter.type"), metadata.get("general.architecture")
    if kind != "lora":
        raise UnsupportedError(
            f"{path}: an adapter of type {brief(kind)}", what=f"adapter.type = {brief(kind)}"
        )
    if own != architecture:
        raise InputError(
            f"{path} adapts models of architecture {brief(own)}, the model is of "
            f"{brief(architecture)}: name the model that it was trained on"
        )
    if _ALORA in metadata:
        raise UnsupportedError(
            f"{path}: it is an activated LoRA, which begins at some tokens", what=_ALORA
        )
    keys = Keys(metadata, "adapter.lora", path)
    return keys.number("alpha", 0, least=0, most=1e6)


def _adapted(header: GGUFHeader) -> list[str]:
    """The model's tensors that are adapted, in the order of the file."""
    names, path = dict[str, None](), header.path
    for tensor in header.shapes:
        name, dot, end = tensor.rpartition(".lora_")
        if not dot or end not in ("a", "b"):
            raise UnsupportedError(
                f"{path}: tensor {brief(tensor)} is neither the A nor the B of a matrix",
                what=f"tensor {tensor} in an adapter",
            )
        other = f"{name}.lora_{'b' if end == 'a' else 'a'}"
        if other not in header.shapes:
            raise _fault(path, tensor, f"{brief(other)} is missing, they are a pair")
        names[name] = None
    if not names:
        raise ModelFileError("the adapter has no tensors", path=path)
    return list(names)


def _rank(name: str, header: GGUFHeader, model: GGUFHeader) -> int:
    """The rank of the pair for a tensor of the model, whose shapes are checked here."""
    a, b = header.shapes[f"{name}.lora_a"], header.shapes[f"{name}.lora_b"]
    shape, path = model.shapes.get(name), header.path
    if shape is None:
        raise _fault(
            path,
            f"{name}.lora_a",
            "the model has no such tensor: it was trained on another model, or on an output head "
            "of its own where this model's is the embedding",
        )
    if len(a) != 2 or len(b) != 2 or len(shape) != 2:
        raise UnsupportedError(
            f"{path}: it adapts {brief(name)}, of shape {shape}, with {a} and {b}: only matrices "
            "and the embedding can be adapted",
            what=f"adapter of {name}",
        )
    rank = b[1]
    # The rows of the embedding are looked up, so its A comes transposed.
    is_table = name.endswith("token_embd.weight")
    wanted = (shape[0], rank) if is_table else (rank, shape[1])
    rows = shape[1] if is_table else shape[0]
    if a != wanted or b[0] != rows or rank > MAX_DIM:
        raise _fault(
            path,
            f"{name}.lora_a",
            f"shapes are {a} and {b}, those for {shape} are {wanted} and {(rows, rank)}",
        )
    return rank


def _fault(path: str, tensor: str, message: str) -> ModelFileError:
    return ModelFileError(message, path=path, field=f"tensor {brief(tensor)}")
