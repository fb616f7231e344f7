"""Importance matrices: measured as llama.cpp measures them, read and written in its forms."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge.errors import InputError, ModelFileError
from edge.quantizer.imatrix import Importance, InputSums


def sums(*shape: int, seed: int = 0, counts: int = 7) -> InputSums:
    squares = np.random.default_rng(seed).random(shape, np.float32) + 0.1
    return InputSums(squares, np.full(shape[0], counts, np.int64))


def some() -> Importance:
    stack = sums(3, 8, seed=1)
    stack.counts[1] = 0
    stack.squares[1] = 0
    stack.sums, stack.stats = stack.squares - 1, np.ones(12, np.float32)
    inputs = {"blk.0.ffn_down_exps.weight": stack, "blk.0.attn_q.weight": sums(1, 16)}
    return Importance(inputs, ["a.txt", "b.txt"], 3, 128)


def test_written_and_read_again(tmp_path: Path) -> None:
    written = some()
    written.write(tmp_path / "i.gguf")
    back = Importance.read(tmp_path / "i.gguf")
    assert (back.datasets, back.chunk_count, back.chunk_size) == (["a.txt", "b.txt"], 3, 128)
    assert list(back.inputs) == sorted(written.inputs)
    for name, mine in written.inputs.items():
        for field in ("squares", "counts", "sums", "stats"):
            np.testing.assert_array_equal(
                getattr(back.inputs[name], field), getattr(mine, field), err_msg=name
            )
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


def test_the_form_is_that_of_llama_cpp(tmp_path: Path) -> None:
    some().write(tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a.txt", "b.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert shapes["blk.0.ffn_down_exps.weight.in_sum2"] == [8, 3]
    assert shapes["blk.0.ffn_down_exps.weight.counts"] == [1, 3]
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [16, 1]


def test_mean_squares() -> None:
    importance = some()
    q = importance.inputs["blk.0.attn_q.weight"]
    np.testing.assert_array_equal(
        importance.mean("blk.0.attn_q.weight", (32, 16)), q.squares[0] / np.float32(7)
    )
    stack = importance.mean("blk.0.ffn_down_exps.weight", (3, 4, 8))
    assert stack is not None and stack.shape == (3, 8) and stack.dtype == np.float32
    assert (stack[1] == 1).all() and (stack[0] != 1).all()
    assert importance.unreached() == {"blk.0.ffn_down_exps.weight": [1]}
    assert importance.mean("blk.1.attn_q.weight", (32, 16)) is None


def old(entries: dict[str, list[float]], chunks: int = 2, name: str | None = "text") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for key, values in entries.items():
        head = struct.pack("<i", len(key)) + key.encode()
        numbers = struct.pack(f"<{len(values)}f", *values)
        parts.append(head + struct.pack("<ii", chunks, len(values)) + numbers)
    if name is not None:
        parts.append(struct.pack("<ii", chunks, len(name)) + name.encode())
    return b"".join(parts)


@pytest.mark.parametrize("name", ["text", None])
def test_the_older_form(tmp_path: Path, name: str | None) -> None:
    (tmp_path / "i.dat").write_bytes(old({"a.weight": [2.0, 4.0, 6.0, 8.0]}, 2, name))
    importance = Importance.read(tmp_path / "i.dat")
    np.testing.assert_array_equal(importance.mean("a.weight", (5, 4)), [1, 2, 3, 4])
    np.testing.assert_array_equal(importance.mean("a.weight", (2, 5, 2)), [[1, 2], [3, 4]])
    assert list(importance.datasets) == ([name] if name else [])


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_an_old_file_cut_short(tmp_path: Path, cut: int) -> None:
    whole = old({"a.weight": [2.0, 4.0, 6.0, 8.0]})
    (tmp_path / "i.dat").write_bytes(whole[:-cut])
    with pytest.raises(ModelFileError, match=r"i\.dat"):
        Importance.read(tmp_path / "i.dat")


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "NaN"), (np.inf, "infinite"), (-1, "negative")]
)
def test_numbers_of_no_text(tmp_path: Path, value: float, says: str) -> None:
    importance = some()
    importance.inputs["blk.0.attn_q.weight"].squares[0, 3] = value
    importance.write(tmp_path / "i.gguf")
    with pytest.raises(ModelFileError, match=rf"attn_q.*{says}"):
        Importance.read(tmp_path / "i.gguf")


def test_zeros_are_refused(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(old({"a.weight": [0.0] * 4}))
    with pytest.raises(ModelFileError, match="would erase the weights"):
        Importance.read(tmp_path / "i.dat")


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, data in {"empty": b"", "text": b"hello world, and more"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=name):
            Importance.read(tmp_path / name)
    Importance({}).write(tmp_path / "none")
    with pytest.raises(ModelFileError, match="no importance"):
        Importance.read(tmp_path / "none")
    with pytest.raises(ModelFileError, match="missing"):
        Importance.read(tmp_path / "missing")


def test_a_matrix_of_another_model() -> None:
    with pytest.raises(InputError, match=r"16 columns, the model's has 24: .* another model"):
        some().require_of({"blk.0.attn_q.weight": (8, 24)})
    with pytest.raises(InputError, match="names no tensor"):
        some().require_of({"blk.0.attn_qkv.weight": (8, 16)})
    some().require_of({"blk.0.attn_q.weight": (8, 16), "output.weight": (8, 16)})
