"""Quantising with error feedback: which matrices are, what is written, and a run that is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_plan import shared_threads
from tiny import write_tiny

import edge
from edge.errors import InputError
from edge.files.gguf import GGUF
from edge.quantizer import squares
from edge.quantizer.activations import Activations
from edge.quantizer.calibration import Calibration
from edge.quantizer.runnable import runnable
from edge.weights.model_file import open_model

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

PROSE = Path(__file__).parent / "data" / "prose.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a model, a text, and the model rounded in both ways."""
    folder = tmp_path_factory.mktemp("feedback")
    write_tiny(folder / "model.gguf", n_layers=1, tied=False)
    (folder / "text.txt").write_text(PROSE.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    edge.quantize(folder / "model.gguf", folder / "nearest.gguf", type="Q4_0")
    edge.quantize(
        folder / "model.gguf", folder / "out.gguf", type="Q4_0", calibration=[folder / "text.txt"]
    )
    yield folder


def test_matrices_that_read_something_are_rounded_with_feedback(folder: Path) -> None:
    with GGUF.open(folder / "out.gguf") as out, GGUF.open(folder / "nearest.gguf") as nearest:
        same = [n for n, t in out.tensors.items() if t.data == nearest.tensors[n].data]
        assert {n: t.type for n, t in out.tensors.items()} == {
            n: t.type for n, t in nearest.tensors.items()
        }
        keys = dict(out.metadata)
    assert sorted(same) == [
        *("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"),
        "token_embd.weight",
    ]
    assert keys["edge.quantize.rounding"] == "feedback"
    text = (folder / "text.txt").read_bytes()
    assert keys["edge.quantize.calibration"] == [hashlib.sha256(text).hexdigest()]


def test_a_cut_run_with_feedback_goes_on(folder: Path, tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > 0.9 * total:
            raise Cut

    options = {"type": "Q4_0", "calibration": [folder / "text.txt"]}
    with pytest.raises(Cut):
        edge.quantize(folder / "model.gguf", tmp_path / "out.gguf", progress=cut, **options)
    again = edge.quantize(folder / "model.gguf", tmp_path / "out.gguf", **options)
    assert 0 < again.n_continued < len(again.tensors)
    assert (tmp_path / "out.gguf").read_bytes() == (folder / "out.gguf").read_bytes()


def test_feedback_wants_a_text(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a text that the model runs"):
        edge.quantize(
            folder / "model.gguf", tmp_path / "out.gguf", type="Q4_0", rounding="feedback"
        )
    (tmp_path / "short.txt").write_text(400 * "the world ", encoding="utf-8")
    with pytest.raises(InputError, match="take a longer text"):
        edge.quantize(
            folder / "model.gguf",
            tmp_path / "out.gguf",
            type="Q4_0",
            calibration=[tmp_path / "short.txt"],
        )


def test_moments_that_do_not_fit_leave_an_importance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "room", lambda *_: 100_000)  # two times 64 x 64, not 128 x 128
    text, matrix = folder / "text.txt", tmp_path / "matrix.gguf"
    result = edge.quantize(
        folder / "model.gguf", tmp_path / "out.gguf", type="IQ4_NL", calibration=[text]
    )
    with (
        open_model(folder / "model.gguf") as model,
        runnable(model.unpacked(""), shared_threads(1)) as path,
        Activations.open(path, context=256) as activations,
    ):
        windows = activations.cut([text.read_text(encoding="utf-8")])
        squares.measure(activations, windows, head=True).write(matrix)
    edge.quantize(
        folder / "model.gguf", tmp_path / "nearest.gguf", type="IQ4_NL", importance=matrix
    )
    assert result.to_nearest
    with GGUF.open(tmp_path / "out.gguf") as out, GGUF.open(tmp_path / "nearest.gguf") as nearest:
        for name in result.to_nearest:
            assert out.tensors[name].data == nearest.tensors[name].data
