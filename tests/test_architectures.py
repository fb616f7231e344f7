"""What single architectures make of their metadata and tensors."""

from __future__ import annotations

from typing import Any

import pytest
from test_models import built, described

from edge.errors import ModelFileError, UnsupportedError
from edge.graph.ops import Attention, Gated, Matmul, Rotate, Xielu
from edge.models import build


def attentions(**options: Any) -> list[Attention]:
    """Those of a tiny model, in the order of layers."""
    graph, _ = built(**options)
    return [op for op in graph.ops if isinstance(op, Attention)]


def test_starcoder2_has_a_window_that_files_do_not_name() -> None:
    assert [op.window for op in attentions(arch="starcoder2")] == [4096] * 2


@pytest.mark.parametrize("n_kv_heads, activation", [(2, "relu2"), (4, "silu")])
def test_bitnet_of_two_generations(n_kv_heads: int, activation: str) -> None:
    graph, _ = built(arch="bitnet", n_kv_heads=n_kv_heads)
    assert {op.activation for op in graph.ops if isinstance(op, Gated)} == {activation}


def test_exaone4_of_64_layers_has_windows() -> None:
    windows = [op.window for op in attentions(arch="exaone4", n_layers=64)]
    assert windows == [4096, 4096, 4096, 0] * 16
    graph, _ = built(arch="exaone4", n_layers=64)
    assert sum(isinstance(op, Rotate) for op in graph.ops) == 48
    assert not any(op.window for op in attentions(arch="exaone4", n_layers=30))


def test_stablelm_that_is_not_parallel_needs_its_second_norm() -> None:
    metadata, shapes = described(arch="stablelm")
    for name in [name for name in shapes if "ffn_norm" in name]:
        del shapes[name]
    build(metadata, shapes)
    with pytest.raises(ModelFileError, match="missing"):
        build(metadata | {"stablelm.use_parallel_residual": False}, shapes)


@pytest.mark.parametrize("key", ["attention.sliding_window", "logit_scale"])
def test_cohere2_needs(key: str) -> None:
    with pytest.raises(ModelFileError, match="missing"):
        built({key: None}, arch="cohere2")


def test_xielu_of_each_layer() -> None:
    graph, _ = built(arch="apertus")
    first, second = (op for op in graph.ops if isinstance(op, Xielu))
    assert first.alpha_p == pytest.approx(0.9740769841801067)  # log(1 + exp(0.5))
    assert first.alpha_n == pytest.approx(0.5 + 0.8259394198788436)
    assert (second.beta, second.eps) == (0.75, -0.125)


@pytest.mark.parametrize("value", [None, [0.5], [0.5, "1"], [0.5, float("nan")], "0.5", True])
def test_xielu_without_its_numbers(value: Any) -> None:
    metadata, shapes = described(arch="apertus")
    metadata["xielu.beta"] = value
    if value is None:
        del metadata["xielu.beta"]
    with pytest.raises(ModelFileError) as caught:
        build(metadata, shapes)
    assert caught.value.field == "xielu.beta"


def test_keys_of_xielu_belong_to_one_architecture() -> None:
    metadata, shapes = described()
    with pytest.raises(UnsupportedError, match=r"xielu\.beta"):
        build(metadata | {"xielu.beta": [0.5, 0.5]}, shapes)


# ---- layers that read the keys and values of others ----


@pytest.mark.parametrize(
    "arch, n_layers, n_shared, owners",
    [("gemma3n", 15, 5, [8, 8, 8, 8, 9]), ("gemma4", 9, 3, [4, 4, 5]), ("gemma4", 6, 0, [])],
)
def test_owners_of_keys(arch: str, n_layers: int, n_shared: int, owners: list[int]) -> None:
    """The last layer of each kind that has its own."""
    shared = ((f"{arch}.attention.shared_kv_layers", n_shared),)
    found = attentions(arch=arch, n_layers=n_layers, extra=shared)
    n_own = n_layers - n_shared
    assert [op.layer for op in found] == [*range(n_own), *owners]
    assert [op.reads_only for op in found] == [False] * n_own + [True] * n_shared


GEMMA4: dict[str, dict[str, Any]] = {
    "a pattern of one number": {"attention.sliding_window_pattern": 3},
    "no pattern": {"attention.sliding_window_pattern": None},
    "a pattern of other layers": {"attention.sliding_window_pattern": [True, False]},
    "no window": {"attention.sliding_window": None},
    "all layers read": {"attention.shared_kv_layers": 6},
    "nobody to read from": {"attention.shared_kv_layers": 4},
    "owners with other heads": {
        "attention.shared_kv_layers": 3, "attention.head_count_kv": [2, 2, 2, 2, 1, 2],
    },
    "an odd rotation": {"rope.dimension_count_swa": 7},
    "a rotation beyond a head": {"rope.dimension_count_swa": 32},
    "inputs of another size": {"embedding_length_per_layer_input": 16},
}  # fmt: skip


@pytest.mark.parametrize("change", GEMMA4.values(), ids=GEMMA4)
def test_contradictory_gemma4(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        built(change, arch="gemma4", n_layers=6)


def test_gemma4_of_experts_that_are_not_there() -> None:
    experts = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 32}
    with pytest.raises(ModelFileError, match="missing") as caught:
        built(experts, arch="gemma4", n_layers=3)
    assert caught.value.field == "tensor blk.0.post_ffw_norm_1.weight"


def test_gemma4_has_one_matrix_for_keys_and_values() -> None:
    inputs = (("gemma4.embedding_length_per_layer_input", 0),)
    graph, _ = built(arch="gemma4", n_layers=3, extra=inputs)
    matrices = [op.weights for op in graph.ops if isinstance(op, Matmul) and len(op.weights) == 3]
    both = ("blk.2.attn_q.weight", "blk.2.attn_k.weight", "blk.2.attn_k.weight")
    assert matrices[-1] == both


GEMMA3N: dict[str, dict[str, Any]] = {
    "no window": {"attention.sliding_window": None},
    "one stream": {"altup.num_inputs": 1},
    "another number of streams": {"altup.num_inputs": 3},
    "no inputs": {"embedding_length_per_layer_input": None},
    "sparsity of other layers": {"activation_sparsity_scale": [1.0]},
    "sparsity not a number": {"activation_sparsity_scale": [float("nan")] * 2},
}


@pytest.mark.parametrize("change", GEMMA3N.values(), ids=GEMMA3N)
def test_contradictory_gemma3n(change: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError):
        built(change, arch="gemma3n")


def test_another_active_stream() -> None:
    with pytest.raises(UnsupportedError, match="active_idx"):
        built({"altup.active_idx": 1}, arch="gemma3n")


def test_a_table_of_inputs_for_fewer_tokens() -> None:
    """Its rows are read by the ids of the vocabulary."""
    metadata, shapes = described(arch="gemma3n")
    rows, columns = shapes["per_layer_token_embd.weight"]
    shapes["per_layer_token_embd.weight"] = (rows - 1, columns)
    with pytest.raises(ModelFileError) as caught:
        build(metadata, shapes)
    assert caught.value.field == "tensor per_layer_token_embd.weight"


def test_rows_of_wide_norms() -> None:
    """A norm of all heads at once has one vector; one row of a matrix is none."""
    metadata, shapes = described(arch="olmo2", n_heads=40, n_kv_heads=40, head_dim=16)
    build(metadata, shapes)
    shapes["blk.0.attn_q_norm.weight"] = (1, 640)
    with pytest.raises(ModelFileError, match=r"needs \(640,\)"):
        build(metadata, shapes)
