"""An open model file: a GGUF, whose weights are packed when it is loaded, or a packed file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Protocol

from edge.errors import InputError, ModelFileError
from edge.files.gguf import GGUF, Metadata
from edge.weights import packed
from edge.weights.packed import PackedFile
from edge.weights.packed_cache import CachedWeights
from edge.weights.weights import MappedWeights, Stored, Weights

__all__ = ["ModelFile", "PackedModel", "RawModel", "open_model"]


class ModelFile(Protocol):
    """A GGUF or a packed file, see `edge.files.gguf.GGUF`. Close it, or use it in a `with`."""

    path: str
    version: int
    n_bytes: int
    whole_bytes: int
    metadata: Metadata

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """The tensors by name, with their types and shapes in the model."""

    @property
    def is_packed(self) -> bool:
        """Whether its tensors are already packed as panels."""

    def weights(self, names: Iterable[str]) -> Weights:
        """The weights of a graph, described but not read; their `load` brings them into memory.
        names: of their tensors. Raises UnsupportedError for a tensor type without a layout.
        """

    def unpacked(self, refusal: str) -> RawModel:
        """This file, a GGUF. A packed file raises InputError, "PATH is packed" and `refusal`."""

    def close(self) -> None:
        """Unmap."""


class RawModel(GGUF):
    """A GGUF file. Open it with `open_model`."""

    is_packed = False

    def weights(self, names: Iterable[str]) -> CachedWeights:
        """See `ModelFile`."""
        return CachedWeights(self, names)

    def unpacked(self, refusal: str) -> RawModel:
        """See `ModelFile`."""
        return self


class PackedModel(PackedFile):
    """A packed file. Open it with `open_model`."""

    is_packed = True

    def weights(self, names: Iterable[str]) -> MappedWeights:
        """See `ModelFile`."""
        return MappedWeights(self, names)

    def unpacked(self, refusal: str) -> RawModel:
        """See `ModelFile`."""
        raise InputError(f"{self.path} is packed{refusal}")


def open_model(
    path: str | os.PathLike[str], *, header_only: bool = False
) -> RawModel | PackedModel:
    """Open a GGUF or a packed file. header_only: see `GGUF.open`.

    Raises the errors of `GGUF.open` and `PackedFile`.
    """
    gguf = RawModel.open(path, header_only=header_only)
    try:
        if not packed.is_packed(gguf.metadata):
            return gguf
        model = PackedModel(gguf)
        if not model.whole:
            raise ModelFileError(
                "this file is a part of the cache and useless alone: name the model, or make a "
                "packed file of it with `edge-run pack`",
                path=gguf.path,
            )
        return model
    except BaseException:
        gguf.close()
        raise
