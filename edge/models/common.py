"""The configuration and the blocks that the decoder-only architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge.errors import ContextError, InputError, UnsupportedError, brief
from edge.graph.graph import Graph
from edge.graph.ops import MAX_DIM, Activation, GateActivation, Heads, Rope, Scores
from edge.models.keys import Keys

#: Positions of a session by default: enough for a chat, and small on a device.
DEFAULT_CONTEXT = 4096

#: The most layers, and the most heads of a layer, that a file may claim.
MAX_LAYERS, MAX_HEADS = 1024, 4096


@dataclass(frozen=True)
class Config:
    """The numbers of a model, from GGUF metadata (`<architecture>.<key>`).

    heads: of each layer; ffn: the width of each layer's feed-forward network.
    """

    architecture: str
    n_layers: int
    dim: int
    heads: tuple[Heads, ...]
    ffn: tuple[int, ...]
    n_context_train: int  # positions that the model was trained for
    n_context: int  # positions that a session may use
    n_positions: int  # positions that the rotary embedding serves
    attention_scale: float  # scores are multiplied by it; 0: 1 / sqrt(head_dim)
    keys: Keys
    path: str

    @classmethod
    def read(
        cls, metadata: Mapping[str, Any], context: int | None, path: str, own: Collection[str] = ()
    ) -> Config:
        """Read and check the metadata. own: the keys that the architecture's file reads.

        Raises ModelFileError, ContextError, InputError; UnsupportedError for a part of a model that
        is not built.
        """
        arch = metadata["general.architecture"]
        keys = Keys(metadata, arch, path, own)
        keys.check()
        n_layers = keys.whole("block_count", most=MAX_LAYERS)
        dim = keys.whole("embedding_length", most=MAX_DIM)
        heads = _heads(keys, n_layers, dim)
        scale = keys.optional("attention.scale", least=1e-6, most=1000)
        if math.isclose(scale, heads[0].head_dim ** -0.5, rel_tol=1e-6):
            scale = 0  # it is the default, rounded in another way
        trained = keys.whole("context_length")
        return cls(
            architecture=arch,
            n_layers=n_layers,
            dim=dim,
            heads=heads,
            ffn=tuple(keys.wholes("feed_forward_length", n_layers, most=MAX_DIM)),
            n_context_train=trained,
            n_context=_context(context, trained, path),
            n_positions=trained,
            attention_scale=scale,
            keys=keys,
            path=path,
        )

    @property
    def rms_eps(self) -> float:
        """What RMS norms add to the mean of the squares."""
        return self.keys.number("attention.layer_norm_rms_epsilon", least=0, most=0.1)

    @property
    def layer_eps(self) -> float:
        """What layer norms add to the variance."""
        return self.keys.number("attention.layer_norm_epsilon", least=0, most=0.1)


def _heads(keys: Keys, n_layers: int, dim: int) -> tuple[Heads, ...]:
    """The heads of each layer. Layers with a window may have heads of another size (Gemma 4)."""
    n_heads = keys.wholes("attention.head_count", n_layers, most=MAX_HEADS)
    n_kv_heads = [
        n or n_heads[i]
        for i, n in enumerate(keys.wholes("attention.head_count_kv", n_layers, 0, least=0))
    ]
    head_dim = keys.whole("attention.key_length", dim // n_heads[0])
    windowed = keys.whole("attention.key_length_swa", head_dim)
    for key, n in (("attention.value_length", head_dim), ("attention.value_length_swa", windowed)):
        if keys.whole(key, n) != n:
            raise keys.not_built(key, "keys and values differ in size")
    for n, n_kv in zip(n_heads, n_kv_heads, strict=True):
        if n % n_kv:
            raise keys.error(
                "attention.head_count_kv", f"{n} heads do not share {n_kv} key heads evenly"
            )
    pattern = keys.get("attention.sliding_window_pattern")
    has_two = windowed != head_dim and isinstance(pattern, list) and len(pattern) == n_layers
    return tuple(
        Heads(n, n_kv, windowed if has_two and pattern[i] else head_dim)
        for i, (n, n_kv) in enumerate(zip(n_heads, n_kv_heads, strict=True))
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

#: Appends all layers to a graph: x (tokens, dim) -> (tokens, dim).
Layers = Callable[[Graph, str, Config], str]

#: Appends a norm: graph, x, the tensor's name without `.weight`.
Norm = Callable[[Graph, str, str, Config], str]


def rms(g: Graph, x: str, name: str, c: Config) -> str:
    """x / rms(x) * weight."""
    return g.rms_norm(x, f"{name}.weight", c.rms_eps)


def layer_norm(g: Graph, x: str, name: str, c: Config) -> str:
    """(x - mean(x)) / std(x) * weight, plus the bias where the file has one."""
    bias = f"{name}.bias"
    return g.layer_norm(x, f"{name}.weight", c.layer_eps, bias if g.has(bias) else None)


@dataclass(frozen=True)
class Ends:
    """What is before the first layer, and behind the last.

    embedding_scale: of the embedding. norm: appends the last norm. head: the tensor of the output
    head, "tied": the embedding; "own": the file's; "any": the file's, else the embedding.
    logit_scale, softcap: of the logits; 0: no softcap.
    """

    embedding_scale: float = 1.0
    norm: Norm = rms
    head: Literal["tied", "own", "any"] = "any"
    logit_scale: float = 1.0
    softcap: float = 0.0


def chain(layer: Layer) -> Layers:
    """Layers that hand one value from each to the next."""

    def layers(g: Graph, x: str, c: Config) -> str:
        for i in range(c.n_layers):
            x = layer(g, x, i, c)
        return x

    return layers


def decoder(g: Graph, c: Config, layers: Layers, ends: Ends) -> None:
    """Append embedding, layers, last norm and output head to a graph."""
    embedding, head = "token_embd.weight", "output.weight"
    x = g.embed(embedding, c.dim)
    if ends.embedding_scale != 1:
        x = g.scale(x, ends.embedding_scale)
    x = layers(g, x, c)
    x = ends.norm(g, x, "output_norm", c)
    n_vocab = g.weights[embedding][0]
    if ends.head == "tied" or (ends.head == "any" and not g.has(head)):
        head = embedding
    x = g.matmul(x, head, rows=[n_vocab])
    if head != embedding:
        x = _scaled(g, x, "output", n_vocab, 0)
    if g.has("output.bias"):
        x = g.bias(x, "output.bias")
    if ends.logit_scale != 1:
        x = g.scale(x, ends.logit_scale)
    if ends.softcap:
        g.softcap(x, ends.softcap)
    if n_vocab and c.keys.whole("vocab_size", n_vocab) != n_vocab:
        raise c.keys.error("vocab_size", f"the embedding has {n_vocab} rows, not as many")


@dataclass(frozen=True)
class Attend:
    """What is special about the attention of a layer.

    rope: how positions rotate queries and keys; None: not at all. scores: window, scale, cap and
    sinks. norm: of queries and keys before they are rotated: of each head, or of all heads at once;
    "none". is_centred: these norms subtract the mean. norm_last: they come after the rotation.
    temperature: (beta, length) of `Temperature`. values: "normed": each head has a norm without
    weights; "keys": they are the keys before their norm, normed so. owner: the layer whose keys and
    values it reads, None: its own.
    """

    rope: Rope | None
    scores: Scores
    norm: Literal["none", "head", "whole"] = "none"
    is_centred: bool = False
    norm_last: bool = False
    temperature: tuple[float, int] | None = None
    values: Literal["plain", "normed", "keys"] = "plain"
    owner: int | None = None


def attention(g: Graph, x: str, i: int, c: Config, a: Attend) -> str:
    """Wo attention(rope(Wqkv x)): (tokens, dim) -> (tokens, dim).

    The file has one fused matrix for queries, keys and values, or three; biases are added where it
    has them, and the results are multiplied by `.scale` where it has that.
    """
    heads, blk = c.heads[i], f"blk.{i}."
    n_q, n_k = heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim
    names = ["attn_q", "attn_k", "attn_k" if a.values == "keys" else "attn_v"]
    if not any(g.has(f"{blk}{name}.weight") for name in names):
        names = ["attn_qkv"]
    is_reader = a.owner is not None
    rows = [n_q] if is_reader else [n_q, n_k, n_k]
    h = linear(g, x, [blk + name for name in names[: len(rows)]], rows)
    if not a.norm_last:
        h = _head_norms(g, h, i, c, a)
    if a.rope is not None:
        n_rotated = heads.n_heads + (0 if is_reader else heads.n_kv_heads)
        h = g.rope(h, n_rotated, heads.head_dim, a.rope)
    if a.norm_last:
        h = _head_norms(g, h, i, c, a)
    if a.temperature is not None:
        h = g.temperature(h, n_q, *a.temperature)
    owner = i if a.owner is None else a.owner
    h = g.attention(h, owner, heads, a.scores, reads_only=is_reader)
    if g.has(f"{blk}attn_sub_norm.weight"):  # BitNet
        h = g.rms_norm(h, f"{blk}attn_sub_norm.weight", c.rms_eps)
    return linear(g, h, [f"{blk}attn_output"], [c.dim])


def _head_norms(g: Graph, x: str, i: int, c: Config, a: Attend) -> str:
    """Norms of queries and keys, and of values."""
    if a.norm == "none":
        return x
    heads, first = c.heads[i], 0
    eps = c.layer_eps if a.is_centred else c.rms_eps
    n_kv_heads = heads.n_kv_heads if a.owner is None else 0
    for part, n in (("q", heads.n_heads), ("k", n_kv_heads)):
        size = n * heads.head_dim
        each = (first, n, heads.head_dim) if a.norm == "head" else (first, 1, size)
        if n:
            weight = f"blk.{i}.attn_{part}_norm.weight"
            x = g.head_norm(x, weight, eps, each, is_centred=a.is_centred)
        first += size
    if a.values != "plain" and n_kv_heads:
        x = g.head_norm(x, None, eps, (first, n_kv_heads, heads.head_dim))
    return x


def gated_mlp(g: Graph, x: str, i: int, c: Config, activation: GateActivation = "silu") -> str:
    """Wdown (activation(Wgate x) * Wup x): (tokens, dim) -> (tokens, dim). The file has two
    matrices, or one of twice the rows, which is named up; biases are added where it has them.
    """
    blk = f"blk.{i}."
    names = ["ffn_gate", "ffn_up"]
    if not g.has(f"{blk}ffn_gate.weight") and g.shapes.get(f"{blk}ffn_up.weight", ())[:1] != (
        c.ffn[i],
    ):
        names = ["ffn_up"]
    h = linear(g, x, [blk + name for name in names], [c.ffn[i], c.ffn[i]])
    h = g.gated(h, activation)
    if g.has(f"{blk}ffn_sub_norm.weight"):  # BitNet
        h = g.rms_norm(h, f"{blk}ffn_sub_norm.weight", c.rms_eps)
    return linear(g, h, [f"{blk}ffn_down"], [c.dim])


def mlp(g: Graph, x: str, i: int, c: Config, activation: Activation) -> str:
    """Wdown activation(Wup x): (tokens, dim) -> (tokens, dim), with biases where the file has
    them.
    """
    h = linear(g, x, [f"blk.{i}.ffn_up"], [c.ffn[i]])
    return linear(g, g.activate(h, activation), [f"blk.{i}.ffn_down"], [c.dim])


def pre_norm(
    g: Graph, x: str, i: int, c: Config, a: Attend, activation: GateActivation = "silu"
) -> str:
    """Llama's layer: each part reads x through a norm, its result is added to x."""
    x = g.add(attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a), x)
    return g.add(gated_mlp(g, rms(g, x, f"blk.{i}.ffn_norm", c), i, c, activation), x)


def scaled_branches(g: Graph, x: str, i: int, c: Config, a: Attend, scale: float) -> str:
    """`pre_norm`, where the result of each part is multiplied by scale (Granite, MiniCPM)."""
    h = attention(g, rms(g, x, f"blk.{i}.attn_norm", c), i, c, a)
    x = g.add(g.scale(h, scale), x)
    h = gated_mlp(g, rms(g, x, f"blk.{i}.ffn_norm", c), i, c)
    return g.add(g.scale(h, scale), x)


def sandwich(
    g: Graph, x: str, i: int, c: Config, a: Attend, activation: GateActivation = "silu"
) -> str:
    """A layer with norms before and behind each part."""
    blk = f"blk.{i}."
    h = attention(g, rms(g, x, f"{blk}attn_norm", c), i, c, a)
    x = g.add(rms(g, h, f"{blk}post_attention_norm", c), x)
    h = gated_mlp(g, rms(g, x, f"{blk}ffn_norm", c), i, c, activation)
    return g.add(rms(g, h, f"{blk}post_ffw_norm", c), x)


def linear(g: Graph, x: str, names: Sequence[str], rows: Sequence[int]) -> str:
    """[s0 W0 x + b0 | s1 W1 x + b1 | ...]: (tokens, k) -> (tokens, sum of rows).

    names: of the layers, without `.weight`, `.scale` or `.bias`; rows: of each, a single fused one
    has the rows of all. Scales (one number each) and biases take part where the file has them.
    """
    sizes = list(rows) if len(names) == len(rows) else [sum(rows)]
    h = g.matmul(x, *(f"{name}.weight" for name in names), rows=sizes)
    first = 0
    for name, n in zip(names, sizes, strict=True):
        h = _scaled(g, h, name, n, first)
        first += n
    biases = [f"{name}.bias" for name in names]
    if all(map(g.has, biases)):
        return g.bias(h, *biases, dims=sizes)
    first = 0
    for bias, n in zip(biases, sizes, strict=True):
        if g.has(bias):
            h = g.bias(h, bias, dims=[n], first=first)
        first += n
    return h


def _scaled(g: Graph, x: str, name: str, n: int, first: int) -> str:
    """x, with n elements from `first` on multiplied by the scale of a matrix that has one of its
    own (NVFP4, BitNet).
    """
    if not g.has(f"{name}.scale"):
        return x
    if f"{name}.weight" in g.adapters:
        raise UnsupportedError(
            f"{g.path}: {name} has a scale of its own, such a matrix cannot be adapted",
            what=f"adapter of {name}.weight",
        )
    return g.gain(x, f"{name}.scale", n, first)


def window_of(c: Config, i: int, *, period: int = 0, default: int = 0) -> int:
    """How many last positions a token of layer i sees; 0: all.

    default: where the metadata does not say. The pattern says which layers have the window: a list
    of true or false (or 1, 0) for each layer; or a number n: all but every n-th, 0: all layers.
    period: that number, where the metadata does not say.
    """
    window = c.keys.whole("attention.sliding_window", default, least=0)
    key = "attention.sliding_window_pattern"
    pattern = c.keys.get(key, period)
    if not window:
        return 0
    if isinstance(pattern, list):
        if len(pattern) != c.n_layers:
            raise c.keys.error(key, f"{len(pattern)} values for {c.n_layers} layers")
        if pattern[i] not in (0, 1):
            raise c.keys.error(key, f"{brief(pattern[i])} is neither true nor false")
        return window if pattern[i] else 0
    if pattern is True:
        return window
    n = c.keys.whole(key, period, least=0)
    return window if n == 0 or i % n < n - 1 else 0
