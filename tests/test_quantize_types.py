"""Which type a tensor gets: llama.cpp's mixes as `llama-quantize` chose them, and fallbacks."""

from __future__ import annotations

import json
from pathlib import Path

import make_mixes
import pytest
from make_mixes import MODELS, in_runs, write_shapes

from edge.errors import InputError, UnsupportedError
from edge.files.gguf import GGUF
from edge.quantizer import types
from edge.quantizer.standard import MIXES, standard_types
from edge.quantizer.types import ModelTensors, fitting, is_quantised, kind_of, layer_of


@pytest.mark.parametrize("name", MODELS)
def test_mixes_are_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    chosen = json.loads(make_mixes.DATA.read_text(encoding="utf-8"))[name]
    assert len(chosen) == 2 * (len(MIXES) - 1)  # all but F32, the type of the file
    with GGUF.open(write_shapes(tmp_path / "shapes.gguf", MODELS[name])) as gguf:
        model = ModelTensors.of(gguf)
    for case, runs in chosen.items():
        mix, _, given = case.partition(" ")
        if not runs:
            with pytest.raises(UnsupportedError, match=f"cannot be {mix}"):
                standard_types(MIXES[mix], model, bool(given))
            continue
        assert in_runs(standard_types(MIXES[mix], model, bool(given))) == runs, case


def test_names_say_layer_and_kind() -> None:
    assert layer_of("blk.12.ffn_down_exps.weight") == 12
    assert kind_of("blk.12.ffn_down_exps.weight") == "ffn_down_exps"
    assert layer_of("token_embd.weight") == layer_of("blk.x.attn_q.weight") == -1
    assert kind_of("token_embd.weight") == "token_embd"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (64, 64), True),
        ("blk.0.ffn_down_exps.weight", (8, 64, 32), True),
        ("blk.0.attn_q_norm.weight", (4, 16), False),
        ("blk.0.ffn_gate_inp.weight", (8, 64), False),
        ("blk.0.ffn_gate_inp_shexp.weight", (1, 64), False),
        ("blk.0.ffn_up_exps.bias", (8, 64), False),
        ("output_norm.weight", (64,), False),
    ],
)
def test_only_matrices_are_quantised(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert is_quantised(name, shape) is expected


@pytest.mark.parametrize(
    ("wanted", "k", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("IQ2_XS", 576, "IQ4_NL"),
        ("Q3_K", 40, "F16"),
        ("Q8_0", 33, "F16"),
        ("F32", 7, "F32"),
    ],
)
def test_rows_that_do_not_fit_get_another_type(wanted: str, k: int, expected: str) -> None:
    assert fitting(wanted, k) == expected


def test_a_type_without_a_fallback_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="rows of 576 weights cannot be Q1_0"):
        fitting("Q1_0", 576)


def test_a_type_that_nothing_encodes_is_refused() -> None:
    with pytest.raises(InputError, match=r"Q8_1.*one of F32"):
        types.need_target("Q8_1", "type")
