"""What the decoder-only architectures share: the configuration and the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.errors import ContextError, InputError, ModelFileError, UnsupportedError
from edge.graph import Graph, Rope

#: Positions of a session where the caller does not say: enough for a chat, small on a device.
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Config:
    """The numbers of a model, from GGUF metadata (`<architecture>.<key>`)."""

    architecture: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    n_context_train: int  # positions the model was made for
    n_context: int  # positions a session may use
    window: int  # sliding window, 0: none
    metadata: Mapping[str, Any]
    path: str

    @classmethod
    def read(cls, metadata: Mapping[str, Any], context: int | None, path: str) -> Config:
        """Read and check the metadata. Raises ModelFileError, ContextError, InputError."""
        arch = metadata["general.architecture"]

        def number(key: str, default: float | None = None, *, least: float = 1) -> Any:
            value = metadata.get(f"{arch}.{key}", default)
            field = f"{arch}.{key}"
            if value is None:
                raise ModelFileError("the key is missing", path=path, field=field)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ModelFileError("must be one number", path=path, field=field)
            if not least <= value < 2**31:  # NaN fails too
                raise ModelFileError(f"{value} is out of range", path=path, field=field)
            return value

        def whole(key: str, default: int | None = None, *, least: int = 1) -> int:
            value = number(key, default, least=least)
            if value != int(value):
                raise ModelFileError("must be whole", path=path, field=f"{arch}.{key}")
            return int(value)

        dim, n_heads = whole("embedding_length"), whole("attention.head_count")
        n_kv_heads = whole("attention.head_count_kv", n_heads)
        head_dim = whole("attention.key_length", dim // n_heads)
        if whole("attention.value_length", head_dim) != head_dim:
            raise UnsupportedError(f"{path}: keys and values differ in size", what="value_length")
        if n_heads % n_kv_heads:
            raise ModelFileError(
                f"{n_heads} heads do not share {n_kv_heads} key heads evenly",
                path=path,
                field=f"{arch}.attention.head_count_kv",
            )
        trained = whole("context_length")
        if context is None:
            context = min(trained, DEFAULT_CONTEXT)
        elif context < 1:
            raise InputError(f"a context of {context} tokens holds nothing: ask for 1 or more")
        elif context > trained:
            raise ContextError(
                f"{path}: a context of {context} tokens was asked for, "
                f"the model was made for {trained}",
                needed=context,
                limit=trained,
            )
        return cls(
            architecture=arch,
            n_layers=whole("block_count"),
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            norm_eps=float(number("attention.layer_norm_rms_epsilon", least=0)),
            n_context_train=trained,
            n_context=context,
            window=whole("attention.sliding_window", 0, least=0),
            metadata=metadata,
            path=path,
        )

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


Layer = Callable[[Graph, str, int, Config, Rope], str]


def decoder(g: Graph, c: Config, layer: Layer, rope: Rope) -> None:
    """Embedding, the layers, a last norm, the output head (the embedding where it is tied)."""
    x = g.embed("token_embd")
    if g.dims[x] != c.dim:
        raise ModelFileError(
            f"rows of {g.dims[x]}, the metadata says {c.dim}",
            path=c.path,
            field="tensor token_embd.weight",
        )
    for i in range(c.n_layers):
        x = layer(g, x, i, c, rope)
    x = g.rms_norm(x, "output_norm", c.norm_eps)
    g.matmul(x, "output" if g.has("output") else "token_embd")


def attention(
    g: Graph, x: str, i: int, c: Config, rope: Rope, *, qkv: tuple[str, ...], residual: str
) -> str:
    """residual + Wo attention(rope(Wqkv x)). qkv: one fused weight, or those of q, k and v."""
    h = g.matmul(x, *(f"blk.{i}.{name}" for name in qkv))
    h = g.rope(h, c.n_heads + c.n_kv_heads, c.head_dim, rope)
    h = g.attention(h, i, c.n_heads, c.n_kv_heads, c.head_dim, c.window)
    return g.add(g.matmul(h, f"blk.{i}.attn_output"), residual)


def gated_mlp(
    g: Graph, x: str, i: int, *, gate_up: tuple[str, ...], activation: str, residual: str
) -> str:
    """residual + Wdown (activation(Wgate x) * Wup x). gate_up: one fused weight, or two."""
    h = g.matmul(x, *(f"blk.{i}.{name}" for name in gate_up))
    h = g.gated(h, activation)
    return g.add(g.matmul(h, f"blk.{i}.ffn_down"), residual)


def rope_of(c: Config, *, interleaved: bool, factors: str | None, magnitude: float = 1.0) -> Rope:
    """The rotary embedding that the metadata asks for, position scaling `linear` included."""
    n_rot = c.get("rope.dimension_count", c.head_dim)
    if not isinstance(n_rot, int) or n_rot % 2 or not 0 < n_rot <= c.head_dim:
        raise ModelFileError(
            f"{n_rot} rotated dimensions of a head of {c.head_dim}",
            path=c.path,
            field=f"{c.architecture}.rope.dimension_count",
        )
    base = c.get("rope.freq_base", 10000.0)
    if not isinstance(base, float) or not 1 < base < math.inf:
        raise ModelFileError(
            f"{base} is no base", path=c.path, field=f"{c.architecture}.rope.freq_base"
        )
    kind, scale = c.get("rope.scaling.type", "none"), 1.0
    if kind == "linear":
        factor = c.get("rope.scaling.factor", 0.0)
        if not isinstance(factor, float) or not 0 < factor < math.inf:
            raise ModelFileError(
                f"{factor} is no factor", path=c.path, field=f"{c.architecture}.rope.scaling.factor"
            )
        scale = 1.0 / factor
    elif kind not in ("none", "longrope"):
        raise UnsupportedError(
            f"{c.path}: position scaling of type {kind!r}",
            what=f"rope.scaling.type = {kind}",
            supported=("none", "linear", "longrope"),
        )
    return Rope(n_rot, base, interleaved, factors, scale, magnitude)
