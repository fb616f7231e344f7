"""What the decoder-only architectures share: the configuration and the blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge.errors import ContextError, InputError, ModelFileError, UnsupportedError, brief
from edge.graph import MAX_DIM, Graph, Rope

#: Positions of a session where the caller does not say: enough for a chat, small on a device.
DEFAULT_CONTEXT = 4096

#: The most layers, and the most heads of a layer, that a file may claim.
MAX_COUNT = 4096


class Keys:
    """The metadata keys `<architecture>.<key>` of a file, each checked as it is read."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, path: str) -> None:
        self.metadata, self.architecture, self.path = metadata, architecture, path

    def number(
        self, key: str, default: float | None = None, *, least: float, most: float = 2**31 - 1
    ) -> float:
        """A number from least to most. Raises ModelFileError for anything else, or no default."""
        field = f"{self.architecture}.{key}"
        value = self.metadata.get(field, default)
        if value is None:
            raise ModelFileError("the key is missing", path=self.path, field=field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ModelFileError("must be one number", path=self.path, field=field)
        if not least <= value <= most:  # NaN fails too
            raise ModelFileError(f"{value} is out of range", path=self.path, field=field)
        return value

    def whole(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """A whole number from least to most. Raises ModelFileError."""
        value = self.number(key, default, least=least, most=most)
        if value != int(value):
            raise ModelFileError(
                f"{value} must be whole", path=self.path, field=f"{self.architecture}.{key}"
            )
        return int(value)


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
    n_positions: int  # positions that the rotary embedding serves
    window: int  # sliding window, 0: none
    keys: Keys
    path: str

    @classmethod
    def read(cls, metadata: Mapping[str, Any], context: int | None, path: str) -> Config:
        """Read and check the metadata. Raises ModelFileError, ContextError, InputError."""
        arch = metadata["general.architecture"]
        keys = Keys(metadata, arch, path)
        dim = keys.whole("embedding_length", most=MAX_DIM)
        n_heads = keys.whole("attention.head_count", most=MAX_COUNT)
        n_kv_heads = keys.whole("attention.head_count_kv", n_heads)
        head_dim = keys.whole("attention.key_length", dim // n_heads)
        if keys.whole("attention.value_length", head_dim) != head_dim:
            raise UnsupportedError(f"{path}: keys and values differ in size", what="value_length")
        if n_heads % n_kv_heads:
            raise ModelFileError(
                f"{n_heads} heads do not share {n_kv_heads} key heads evenly",
                path=path,
                field=f"{arch}.attention.head_count_kv",
            )
        trained = keys.whole("context_length")
        return cls(
            architecture=arch,
            n_layers=keys.whole("block_count", most=MAX_COUNT),
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            norm_eps=keys.number("attention.layer_norm_rms_epsilon", least=0, most=0.1),
            n_context_train=trained,
            n_context=_context(context, trained, path),
            n_positions=trained,
            window=keys.whole("attention.sliding_window", 0, least=0),
            keys=keys,
            path=path,
        )


def _context(wanted: int | None, trained: int, path: str) -> int:
    """Positions of a session."""
    if wanted is None:
        return min(trained, DEFAULT_CONTEXT)
    if wanted < 1:
        raise InputError(f"a context of {wanted} tokens holds nothing: ask for 1 or more")
    if wanted > trained:
        raise ContextError(
            f"{path}: a context of {wanted} tokens was asked for, the model was made for {trained}",
            needed=wanted,
            limit=trained,
        )
    return wanted


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
    logits = g.matmul(x, "output" if g.has("output") else "token_embd")
    n_vocab = g.weights["token_embd"][0]
    if g.dims[logits] != n_vocab:
        raise ModelFileError(
            f"{g.dims[logits]} rows, the embedding has {n_vocab}",
            path=c.path,
            field="tensor output.weight",
        )


def attention(g: Graph, x: str, i: int, c: Config, rope: Rope, *, qkv: tuple[str, ...]) -> str:
    """Wo attention(rope(Wqkv x)). qkv: one fused weight, or those of q, k and v."""
    h = g.matmul(x, *(f"blk.{i}.{name}" for name in qkv))
    h = g.rope(h, c.n_heads + c.n_kv_heads, c.head_dim, rope)
    h = g.attention(h, i, c.n_heads, c.n_kv_heads, c.head_dim, c.window)
    return g.matmul(h, f"blk.{i}.attn_output")


def gated_mlp(g: Graph, x: str, i: int, *, gate_up: tuple[str, ...], activation: str) -> str:
    """Wdown (activation(Wgate x) * Wup x). gate_up: one fused weight, or two."""
    h = g.matmul(x, *(f"blk.{i}.{name}" for name in gate_up))
    return g.matmul(g.gated(h, activation), f"blk.{i}.ffn_down")


def rope_of(
    c: Config,
    *,
    interleaved: bool,
    factors: str | None,
    magnitude: float = 1.0,
    scalings: tuple[str, ...] = ("none", "linear"),
) -> Rope:
    """The rotary embedding that the metadata asks for. scalings: the kinds that may be named."""
    keys = c.keys
    n_rot = keys.whole("rope.dimension_count", c.head_dim)
    if n_rot % 2 or n_rot > c.head_dim:
        raise ModelFileError(
            f"{n_rot} rotated dimensions of a head of {c.head_dim}",
            path=c.path,
            field=f"{c.architecture}.rope.dimension_count",
        )
    base = keys.number("rope.freq_base", 10000.0, least=1.001, most=1e11)
    kind = keys.metadata.get(f"{c.architecture}.rope.scaling.type", "none")
    if kind not in scalings:
        raise UnsupportedError(
            f"{c.path}: position scaling of type {brief(kind)}",
            what=f"rope.scaling.type = {brief(kind)}",
            supported=scalings,
        )
    scale = 1 / keys.number("rope.scaling.factor", least=1e-3, most=1e4) if kind == "linear" else 1
    return Rope(n_rot, base, interleaved, factors, scale, magnitude)
