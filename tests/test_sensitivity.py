"""What rounding one matrix does to a model's output, and types that are chosen by it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from native_plan import shared_threads

import edge
from edge.engine.engine import Engine
from edge.errors import InputError
from edge.native import ffi
from edge.perplexity import compare
from edge.quantizer.encode import Encoder, decode
from edge.quantizer.sensitivity import EncodedMatrix, damages
from edge.weights.packed import describe_weight
from edge.windows import Windows

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

NAMES = ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "output.weight")
WINDOWS = Windows(
    tuple(np.random.default_rng(i).integers(0, 288, 32).tolist() for i in range(3)), 32
)
SHAPE = {"tied": False, "ffn": 128}


def rounded(model: edge.Model, name: str, kind: str) -> EncodedMatrix:
    """A matrix of a model in another type."""
    tensor = model.engine.gguf.tensors[name]
    rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
    x = decode(tensor.type, rows, tensor.shape[1], shared_threads(1))
    return EncodedMatrix(kind, Encoder(kind).encode(x, None, shared_threads(1)))


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_damages_are_those_of_files_with_this_matrix(tiny_gguf, kind):
    """A file in which one matrix has the type diverges as much, but for the floor."""
    with edge.load(tiny_gguf(type=kind, **SHAPE), context=64) as model:
        trials = {name: partial(rounded, model, name, "Q4_0") for name in NAMES}
        found = dict(damages(model, WINDOWS, trials))
        for name in NAMES:
            made = tiny_gguf(type=lambda n, name=name: "Q4_0" if n == name else kind, **SHAPE)
            with edge.load(made, context=64) as other:
                kl = compare(other, model, WINDOWS).kl
            assert found[name] == pytest.approx(kl, rel=0.02 if kind == "F32" else 0.3)


def test_the_model_is_as_before(tiny_gguf):
    greedy = edge.SamplingOptions(temperature=0)
    with edge.load(tiny_gguf(type="Q8_0", **SHAPE), context=64) as model:
        text = model.session().generate("the", max_tokens=8, sampling=greedy).text
        trials = {name: partial(rounded, model, name, "Q4_0") for name in NAMES}
        assert len([*damages(model, WINDOWS, trials)]) == len(NAMES)
        assert model.session().generate("the", max_tokens=8, sampling=greedy).text == text


def test_a_weight_of_another_shape_is_refused(tiny_gguf):
    with edge.load(tiny_gguf(**SHAPE), context=64) as model:
        engine = model.engine
        assert isinstance(engine, Engine)
        weight = ffi.new("edge_weight *")
        describe_weight("F32", (7, 64), "fast", weight)
        with (
            pytest.raises(InputError, match=r"\(7, 64\), not \(128, 64\)"),
            engine.substituted({"blk.0.ffn_up.weight": weight}),
        ):
            pass


def test_a_closed_model_takes_no_other_weights(tiny_gguf):
    model = edge.load(tiny_gguf(**SHAPE), context=64)
    engine = model.engine
    assert isinstance(engine, Engine)
    model.close()
    with pytest.raises(InputError, match="closed"), engine.substituted({}):
        pass
