"""Gemma 3n, the part that reads text: four streams of which each layer computes one (AltUp), a
residual of low rank (laurel), inputs of each layer by token, layers that read the keys and values
of others, activations of which few are not zero.

`transformers` is followed where llama.cpp differs: the standard deviation divides by n, not by
n - 1; how much of a layer's activations is zero, and how many layers read from others, is what the
file says, not fixed; the size of a stream has a floor when another is scaled to it.
Sources: AltUp, Baykal et al. 2023; LAuReL, Menghani et al. 2024.
"""

from __future__ import annotations

import math

from edge.graph.graph import Graph
from edge.graph.ops import MAX_DIM, Rope, Scores
from edge.models.common import Attend, Config, Ends, attention, linear, rms, window_of
from edge.models.ropes import local_rope, rope_of

KEYS = frozenset(
    {
        "activation_sparsity_scale",
        "altup.active_idx",
        "altup.num_inputs",
        "attention.shared_kv_layers",
        "embedding_length_per_layer_input",
        "final_logit_softcapping",
        "rope.freq_base_swa",
    }
)
#: Files have these also for layers that read the keys and values of others.
OPTIONAL = frozenset({"blk.*.attn_k.weight", "blk.*.attn_v.weight", "blk.*.attn_k_norm.weight"})

_PERIOD = 5  # each 5th layer sees all positions
_N_OWN = 20  # layers with keys and values of their own, where the file does not say
_N_SPARSE, _SPARSITY = 10, 1.6448533535003662  # layers, and the factor that leaves 5 %
_FLOOR = 1e-5  # of the mean square of a stream that is scaled


def ends(c: Config) -> Ends:
    """The embedding is scaled, logits are capped."""
    cap = c.keys.softcap("final_logit_softcapping", 30)
    return Ends(embedding_scale=math.sqrt(c.dim), softcap=cap)


def layers(g: Graph, x: str, c: Config) -> str:
    """x: the embedding, (tokens, dim) -> (tokens, dim)."""
    c.keys.whole("attention.sliding_window")  # it must be there
    c.keys.neutral("altup.active_idx", (0,))
    n = c.keys.whole("altup.num_inputs", 4, least=2, most=16)
    inputs = layer_inputs(g, x, c)
    others = g.matmul_stack(x, "altup_proj.weight", n - 1)
    streams = [x, *(g.rescale(g.slice(others, j * c.dim, c.dim), x, _FLOOR) for j in range(n - 1))]
    for i in range(c.n_layers):
        streams = layer(g, streams, i, c, inputs)
    x = streams[0]
    for j, stream in enumerate(streams[1:]):
        h = g.slice(g.matmul_stack(stream, "altup_unembd_proj.weight", n - 1), j * c.dim, c.dim)
        x = g.add(x, g.rescale(h, streams[0], _FLOOR))
    return g.scale(x, 1 / n)


def layer(g: Graph, streams: list[str], i: int, c: Config, inputs: str) -> list[str]:
    """Streams (tokens, dim) -> the same number of streams."""
    blk = f"blk.{i}."
    predicted = _predict(g, streams, i, c)
    x = predicted[0]
    h = rms(g, x, f"{blk}attn_norm", c)
    low = g.matmul(g.matmul(h, f"{blk}laurel_l.weight"), f"{blk}laurel_r.weight", rows=[c.dim])
    laurel = g.add(h, rms(g, low, f"{blk}laurel_post_norm", c))
    x = g.add(rms(g, attention(g, h, i, c, _attend(c, i)), f"{blk}post_attention_norm", c), x)
    x = g.scale(g.add(x, laurel), math.sqrt(0.5))
    x = g.add(rms(g, _mlp(g, rms(g, x, f"{blk}ffn_norm", c), i, c), f"{blk}post_ffw_norm", c), x)
    corrected = _correct(g, predicted, x, i, c)
    h = from_input(g, g.gain(corrected[0], f"{blk}altup_correct_scale.weight"), i, c, inputs)
    return [corrected[0], *(g.add(stream, h) for stream in corrected[1:])]


def _attend(c: Config, i: int) -> Attend:
    owner = owner_of(c, i, _PERIOD, max(0, c.n_layers - _N_OWN))
    window = window_of(c, i, period=_PERIOD)
    return Attend(_rope(c, window), Scores(window, 1.0), norm="head", values="normed", owner=owner)


def _rope(c: Config, window: int) -> Rope:
    """Layers with a window have a base of their own; their positions are not scaled."""
    rope = rope_of(c, interleaved=False, factors=None)
    return local_rope(c, rope, 10000.0) if window else rope


def owner_of(c: Config, i: int, period: int, n_shared: int) -> int | None:
    """The layer whose keys and values layer i reads: the last of the same kind that has its own;
    None: its own. n_shared: layers without their own, where the file does not say.
    """
    key = "attention.shared_kv_layers"
    n_own = c.n_layers - c.keys.whole(key, n_shared, least=0, most=c.n_layers - 1)
    if i < n_own:
        return None
    window = window_of(c, i, period=period)
    for j in reversed(range(n_own)):
        if window_of(c, j, period=period) == window:
            return j
    raise c.keys.error(key, f"no layer of the kind of layer {i} has keys and values")


def _mlp(g: Graph, x: str, i: int, c: Config) -> str:
    """Of the gate, what is above its mean by some standard deviations."""
    blk, n = f"blk.{i}.", c.ffn[i]
    key = "activation_sparsity_scale"
    factor = _SPARSITY if i < _N_SPARSE else -math.inf
    if c.keys.get(key) is not None:
        factor = c.keys.numbers(key, c.n_layers, least=-math.inf, most=100)[i]
    if -math.inf < factor < -100:
        raise c.keys.error(key, f"{factor} is out of range")
    h = linear(g, x, [f"{blk}ffn_gate", f"{blk}ffn_up"], [n, n])
    if factor > -math.inf:
        h = g.sparsify(h, n, factor)
    return linear(g, g.gated(h, "gelu_tanh"), [f"{blk}ffn_down"], [c.dim])


def _predict(g: Graph, streams: list[str], i: int, c: Config) -> list[str]:
    """Each stream, plus a sum of all streams that its token weights."""
    n = len(streams)
    weights = _route(g, streams[0], i, c, n)
    weights = g.matmul(weights, f"blk.{i}.altup_predict_coef.weight", rows=[n * n])
    out = []
    for row, stream in enumerate(streams):
        for column, other in enumerate(streams):
            weight = g.slice(weights, row * n + column, 1)
            stream = g.add(stream, g.multiply(other, weight))
        out.append(stream)
    return out


def _correct(g: Graph, predicted: list[str], x: str, i: int, c: Config) -> list[str]:
    """Each predicted stream, plus its share of what the layer has changed."""
    n = len(predicted)
    weights = _route(g, x, i, c, n)
    weights = g.matmul(weights, f"blk.{i}.altup_correct_coef.weight", rows=[n])
    change = g.add(x, g.scale(predicted[0], -1.0))
    return [
        g.add(g.add(stream, change), g.multiply(change, g.slice(weights, j, 1)))
        for j, stream in enumerate(predicted)
    ]


def _route(g: Graph, x: str, i: int, c: Config, n: int) -> str:
    """tanh(Wrouter norm(x) / dim): (tokens, dim) -> (tokens, n)."""
    h = g.scale(rms(g, x, f"blk.{i}.altup_router_norm", c), 1 / c.dim)
    return g.activate(g.matmul(h, f"blk.{i}.altup_router.weight", rows=[n]), "tanh")


def layer_inputs(g: Graph, x: str, c: Config) -> str:
    """The inputs of all layers side by side, of a table by token and of the embedding x."""
    n = _input_dim(c)
    h = g.matmul(x, "per_layer_model_proj.weight", rows=[n * c.n_layers])
    heads = (0, c.n_layers, n)
    h = g.head_norm(
        g.scale(h, 1 / math.sqrt(c.dim)), "per_layer_proj_norm.weight", c.rms_eps, heads
    )
    n_vocab = g.weights["token_embd.weight"][0]
    table = g.embed("per_layer_token_embd.weight", n * c.n_layers, n_vocab or None)
    return g.scale(g.add(h, g.scale(table, math.sqrt(n))), math.sqrt(0.5))


def from_input(g: Graph, x: str, i: int, c: Config, inputs: str) -> str:
    """norm(Wproj (gelu(Wgate x) * input)): (tokens, dim) -> (tokens, dim)."""
    blk, n = f"blk.{i}.", _input_dim(c)
    h = g.activate(linear(g, x, [f"{blk}inp_gate"], [n]), "gelu_tanh")
    h = g.multiply(h, g.slice(inputs, i * n, n))
    return rms(g, linear(g, h, [f"{blk}proj"], [c.dim]), f"{blk}post_norm", c)


def _input_dim(c: Config) -> int:
    return c.keys.whole("embedding_length_per_layer_input", most=MAX_DIM // c.n_layers)
