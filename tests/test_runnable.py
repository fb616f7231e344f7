"""The copy in Q8_0 that runs texts in the place of a model of floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from native_plan import shared_threads
from tiny import write_tiny

from edge.errors import ModelFileError
from edge.files.gguf import GGUF
from edge.quantizer.encode import Encoder
from edge.quantizer.runnable import runnable
from edge.weights.model_file import open_model

pytestmark = [pytest.mark.native, pytest.mark.any_isa]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_run_as_a_copy_in_q8_0(tmp_path: Path, cache: Path, kind: str) -> None:
    source = write_tiny(tmp_path / "model.gguf", type=kind, tied=False)
    with open_model(source) as model:
        with runnable(model.unpacked(""), shared_threads(1)) as path, GGUF.open(path) as copy:
            assert Path(path).is_relative_to(cache)
            assert copy.metadata == model.metadata
            types = {name: tensor.type for name, tensor in copy.tensors.items()}
            name = "blk.0.ffn_up.weight"
            assert types[name] == "Q8_0"
            assert types["blk.0.ffn_norm.weight"] == "F32"
            if kind == "F32":
                tensor = model.tensors[name]
                x = np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)
                blocks = Encoder("Q8_0").encode(x, None, shared_threads(1))
                assert bytes(copy.tensors[name].data) == blocks.tobytes()
        assert [*cache.iterdir()] == []


def test_what_is_quantised_runs_itself(tmp_path: Path, cache: Path) -> None:
    source = write_tiny(tmp_path / "model.gguf", type="Q4_0")
    with open_model(source) as model:
        with runnable(model.unpacked(""), shared_threads(1)) as path:
            assert path == str(source)
        assert not cache.exists()


def test_a_weight_that_is_no_number_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    source = write_tiny(tmp_path / "model.gguf", type="F32")
    with GGUF.open(source) as gguf:
        place = gguf.tensors["blk.0.ffn_up.weight"].data
        at = source.read_bytes().index(bytes(place))
    with open(source, "r+b") as file:
        file.seek(at)
        file.write(np.float32(np.nan).tobytes())
    with open_model(source) as model:
        with (
            pytest.raises(ModelFileError, match="ffn_up"),
            runnable(model.unpacked(""), shared_threads(1)),
        ):
            pass
        assert [*cache.iterdir()] == []
