"""The configuration and the blocks that the decoder-only architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.errors import ContextError, InputError, UnsupportedError, brief
from edge.graph import MAX_DIM, Activation, Graph, Heads, Rope
from edge.models.keys import Keys

#: Positions of a session by default: enough for a chat, and small on a device.
DEFAULT_CONTEXT = 4096

#: The most layers, and the most heads of a layer, that a file may claim.
MAX_COUNT = 4096


@dataclass(frozen=True)
class Config:
    """The numbers of a model, from GGUF metadata (`<architecture>.<key>`)."""

    architecture: str
    n_layers: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int  # width of the feed-forward network
    norm_eps: float
    n_context_train: int  # positions that the model was trained for
    n_context: int  # positions that a session may use
    n_positions: int  # positions that the rotary embedding serves
    attention_scale: float  # scores are multiplied by it; 0: 1 / sqrt(head_dim)
    keys: Keys
    path: str

    @classmethod
    def read(cls, metadata: Mapping[str, Any], context: int | None, path: str) -> Config:
        """Read and check the metadata.

        Raises ModelFileError, ContextError, InputError; UnsupportedError for a part of a model that
        is not built.
        """
        arch = metadata["general.architecture"]
        keys = Keys(metadata, arch, path)
        keys.check()
        n_layers = keys.whole("block_count", most=MAX_COUNT)
        dim = keys.whole("embedding_length", most=MAX_DIM)
        n_heads = keys.whole("attention.head_count", most=MAX_COUNT, n_layers=n_layers)
        n_kv_heads = keys.whole("attention.head_count_kv", n_heads, n_layers=n_layers)
        head_dim = keys.whole("attention.key_length", dim // n_heads)
        if keys.whole("attention.value_length", head_dim) != head_dim:
            raise keys.not_built("attention.value_length", "keys and values differ in size")
        if n_heads % n_kv_heads:
            raise keys.error(
                "attention.head_count_kv",
                f"{n_heads} heads do not share {n_kv_heads} key heads evenly",
            )
        scale = keys.number("attention.scale", 0, least=0, most=1000)
        if math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
            scale = 0  # it is the default, rounded in another way
        trained = keys.whole("context_length")
        return cls(
            architecture=arch,
            n_layers=n_layers,
            dim=dim,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            ffn=keys.whole("feed_forward_length", most=MAX_DIM, n_layers=n_layers),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon", least=0, most=0.1),
            n_context_train=trained,
            n_context=_context(context, trained, path),
            n_positions=trained,
            attention_scale=scale,
            keys=keys,
            path=path,
        )


def _context(wanted: int | None, trained: int, path: str) -> int:
    """Positions of a session, of a model that was made for `trained` positions."""
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


#: Appends layer i to a graph: x (tokens, dim) -> (tokens, dim).
Layer = Callable[[Graph, str, int, Config], str]


def decoder(g: Graph, c: Config, layer: Layer) -> None:
    """Append embedding, layers, last norm and output head to a graph. A file without an output head
    uses the embedding as its head.
    """
    embedding, head = "token_embd.weight", "output.weight"
    x = g.embed(embedding, c.dim)
    for i in range(c.n_layers):
        x = layer(g, x, i, c)
    x = g.rms_norm(x, "output_norm.weight", c.norm_eps)
    n_vocab = g.weights[embedding][0]
    g.matmul(x, head if g.has(head) else embedding, rows=[n_vocab])
    if n_vocab and c.keys.whole("vocab_size", n_vocab) != n_vocab:
        raise c.keys.error("vocab_size", f"the embedding has {n_vocab} rows, not as many")


@dataclass(frozen=True)
class Positions:
    """How a layer uses positions. rope: how they rotate queries and keys; window: how many last
    positions a token sees, its own included; 0: all.
    """

    rope: Rope
    window: int


def attention(
    g: Graph, x: str, i: int, c: Config, positions: Positions, *, qkv: Sequence[str]
) -> str:
    """Wo attention(rope(Wqkv x)): (tokens, dim) -> (tokens, dim). qkv: one fused weight, or the
    weights of q, k and v.
    """
    heads = Heads(c.n_heads, c.n_kv_heads, c.head_dim)
    h = _fused(g, x, qkv, [n * c.head_dim for n in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])
    h = g.rope(h, c.n_heads + c.n_kv_heads, c.head_dim, positions.rope)
    h = g.attention(h, i, heads, window=positions.window, scale=c.attention_scale)
    return g.matmul(h, f"blk.{i}.attn_output.weight", rows=[c.dim])


def gated_mlp(
    g: Graph, x: str, i: int, c: Config, *, gate_up: Sequence[str], activation: Activation
) -> str:
    """Wdown (activation(Wgate x) * Wup x): (tokens, dim) -> (tokens, dim). gate_up: one fused
    weight, or two.
    """
    h = _fused(g, x, gate_up, [c.ffn, c.ffn])
    return g.matmul(g.gated(h, activation), f"blk.{i}.ffn_down.weight", rows=[c.dim])


def _fused(g: Graph, x: str, weights: Sequence[str], rows: list[int]) -> str:
    """The products of x with some weights, side by side: (tokens, sum of rows). rows: of each
    weight; a single fused weight has the rows of all.
    """
    return g.matmul(x, *weights, rows=rows if len(weights) > 1 else [sum(rows)])


def window_of(c: Config, i: int) -> int:
    """How many last positions a token of layer i sees, by the metadata; 0: all.

    The pattern says which layers have the window: a list of true or false for each layer, or else
    0 or true, which mean all layers.
    """
    window = c.keys.whole("attention.sliding_window", 0, least=0)
    key = "attention.sliding_window_pattern"
    pattern = c.keys.get(key)
    if not window:
        return 0
    if isinstance(pattern, list) and all(isinstance(value, bool) for value in pattern):
        if len(pattern) != c.n_layers:
            raise c.keys.error(key, f"{len(pattern)} values for {c.n_layers} layers")
        return window if pattern[i] else 0
    c.keys.neutral(key, (0, True))
    return window


def rope_of(
    c: Config,
    *,
    interleaved: bool,
    factors: str | None,
    magnitude: float = 1.0,
    scalings: tuple[str, ...] = ("none", "linear"),
) -> Rope:
    """The rotary embedding that the metadata asks for.

    magnitude: the default where the file has none. scalings: the types of scaling that the file may
    name, "linear" is the default. With each but "none", positions are divided by the file's factor.
    """
    keys = c.keys
    n_rot = keys.whole("rope.dimension_count", c.head_dim)
    if n_rot % 2 or n_rot > c.head_dim:
        raise keys.error(
            "rope.dimension_count", f"{n_rot} rotated dimensions of a head of {c.head_dim}"
        )
    base = keys.number("rope.freq_base", 10000.0, least=1.001, most=1e11)
    kind = keys.get("rope.scaling.type", "linear")
    if kind not in scalings:
        raise UnsupportedError(
            f"{c.path}: position scaling of type {brief(kind)}",
            what=f"rope.scaling.type = {brief(kind)}",
            supported=scalings,
        )
    factor_key = "rope.scaling.factor"
    if keys.get(factor_key) is None:
        factor_key = "rope.scale_linear"  # its old name
    factor = keys.number(factor_key, 0, least=0, most=1e4) or 1  # 0: no scaling
    if factor < 1e-3:
        raise keys.error(factor_key, f"{factor} is out of range")
    scale = 1 if kind == "none" else 1 / factor
    magnitude = keys.number("rope.scaling.attn_factor", magnitude, least=0.01, most=100)
    return Rope(n_rot, base, interleaved, factors, scale, magnitude)
