"""Recipes: read, applied, written back; a wrong one says where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from arches.common import Tiny
from make_mixes import MODELS, write_shapes

from edge.errors import InputError
from edge.files.gguf import GGUF
from edge.quantizer import recipe
from edge.quantizer.recipe import Uniform
from edge.quantizer.types import ModelTensors


def tensors_of(folder: Path, tiny: Tiny) -> ModelTensors:
    with GGUF.open(write_shapes(folder / "shapes.gguf", tiny)) as gguf:
        return ModelTensors.of(gguf)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_dynamicgate_has_better_quarters(tmp_path: Path) -> None:
    model = tensors_of(tmp_path, MODELS["llama-grouped"])
    for name, middle in (("dynamicgate-low", "IQ2_XXS"), ("dynamicgate-high", "IQ3_S")):
        types = recipe.find(name).types(model, True)
        gates = [types[f"blk.{i}.ffn_gate.weight"] for i in range(16)]
        assert gates == 4 * ["IQ4_XS"] + 8 * [middle] + 4 * ["IQ4_XS"]
        assert types["token_embd.weight"] == types["output.weight"] == "Q5_K"


def test_first_rule_that_matches_decides(tmp_path: Path) -> None:
    text = """
    depth = 16
    default = "Q4_0"
    [[rules]]
    tensors = ["attn_[qk]", "ffn_d*"]
    layers = "0-1, 15"
    type = "Q8_0"
    [[rules]]
    tensors = ["attn_q"]
    type = "Q5_0"
    """
    types = recipe.find(written(tmp_path, text)).types(tensors_of(tmp_path, MODELS["llama"]), False)
    of = [types[f"blk.{i}.{kind}.weight"] for kind in ("attn_q", "ffn_down") for i in (1, 2, 15)]
    assert of == ["Q8_0", "Q5_0", "Q8_0", "Q8_0", "Q4_0", "Q8_0"]


@pytest.mark.parametrize("name", ["Q4_K_M", "dynamicgate-low", "Q3_K_L"])
def test_types_written_as_a_recipe_come_back(name: str, tmp_path: Path) -> None:
    model = tensors_of(tmp_path, MODELS["experts-8"])
    types = recipe.find(name).types(model, True)
    again = recipe.find(written(tmp_path, recipe.described(types, model, 'a "copy"')))
    assert again.types(model, True) == types


def test_a_recipe_of_a_small_model_serves_a_bigger_one(tmp_path: Path) -> None:
    small = recipe.find(
        written(tmp_path, 'depth = 8\ndefault = "Q4_0"\n[[rules]]\nlayers = "0"\ntype = "Q8_0"')
    )
    types = small.types(tensors_of(tmp_path, MODELS["llama"]), False)  # of 16 layers
    kept = [i for i in range(16) if types[f"blk.{i}.attn_q.weight"] == "Q8_0"]
    assert kept == [0, 1]
    assert types["token_embd.weight"] == "Q4_0"  # in no layer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 4\ndefault = x", "line 2"),
        ("depth = " + 5000 * "9", "mine.toml"),
        ('defualt = "Q4_0"', "no key 'defualt': description, depth, default, rules"),
        ("depth = 2", "the key default is missing: one of F32"),
        ('default = "Q4_2"', "default 'Q4_2': one of F32"),
        ('depth = 0\ndefault = "Q4_0"', "depth 0: a whole number from 1 to 4096"),
        ('rules = 3\ndefault = "Q4_0"', r"each rule begins with a line \[\[rules\]\]"),
        ('default = "Q4_0"\n[[rules]]\ntype = "Q8_0"\n[[rules]]\ntype = 3', "rule 2, type '3'"),
        ('default = "Q4_0"\n[[rules]]\nlayer = "1"', "rule 1: there is no key 'layer'"),
        ('default = "Q4_0"\n[[rules]]\nlayers = 1', "rule 1, layers 1: numbers and ranges"),
        ('default = "Q4_0"\n[[rules]]\nlayers = "0-3"', r"from 0 to 0 \(depth - 1\)"),
        ('default = "Q4_0"\n[[rules]]\ntensors = "attn_q"', "tensors: a list of kinds"),
        ('default = "Q4_0"\n[[rules]]\ntensors = ["blk.0.attn_q"]', "neither blk.N. nor .weight"),
    ],
)
def test_a_wrong_recipe_says_where(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recipe.find(written(tmp_path, text))
    assert "mine.toml" in str(caught.value)


def test_names_that_are_none_say_what_there_is() -> None:
    with pytest.raises(InputError, match=r"one of dynamicgate-high, dynamicgate-low, .*Q4_K_M"):
        recipe.find("standard")
    with pytest.raises(InputError, match="take it as recipe 'IQ3_M'"):
        Uniform("IQ3_M")
    with pytest.raises(InputError, match="type 'q4_0': one of F32"):
        Uniform("q4_0")


def test_a_huge_file_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most"):
        recipe.find(written(tmp_path, "#" * (1 << 20) + "\n"))
