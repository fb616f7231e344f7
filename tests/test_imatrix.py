"""Importance matrices: measured as llama.cpp measures them, read and written in its forms."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import make_imatrix
import numpy as np
import pytest
from click.testing import CliRunner
from make_imatrix import REFERENCES, TEXT
from test_moments import read_by

from edge.cli import cli
from edge.engine.ledger import Ledger
from edge.errors import CancelledError, InputError, ModelFileError
from edge.files.text_file import TextFile
from edge.native.cancel import Cancel
from edge.quantizer.activations import Activations
from edge.quantizer.imatrix import Importance, InputSums
from edge.quantizer.mixing import mixing, value_rows
from edge.quantizer.squares import measure
from edge.windows import Windows


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


# ---- measured ----


def opened(path: Path, context: int = make_imatrix.CONTEXT) -> Activations:
    return Activations.open(path, context=context, threads=1)


@pytest.mark.parametrize("arch", REFERENCES)
def test_as_llama_imatrix_measures(tiny_gguf: Callable[..., Path], arch: str) -> None:
    reference = Importance.read(REFERENCES[arch])
    with opened(tiny_gguf(arch, type="F32")) as activations:
        texts = activations.read([TextFile.open(TEXT)])
        windows = activations.cut(texts, chunks=make_imatrix.CHUNKS)
        ours = measure(activations, windows, head=True)
    assert ours.inputs.keys() == reference.inputs.keys()
    assert (ours.chunk_count, ours.chunk_size) == (reference.chunk_count, reference.chunk_size)
    for name, entry in reference.inputs.items():
        got, most = ours.inputs[name], entry.squares.max()
        np.testing.assert_array_equal(got.counts, entry.counts, err_msg=name)
        np.testing.assert_allclose(got.squares / most, entry.squares / most, rtol=1e-4, atol=1e-6)
        assert entry.sums is not None and entry.stats is not None


def test_the_head_is_left_out_unless_it_is_asked_for(tiny_gguf: Callable[..., Path]) -> None:
    with opened(tiny_gguf()) as activations:
        windows = activations.cut(["the world and a hello " * 40], chunks=1)
        names = set(measure(activations, windows).inputs)
        assert all(name.startswith("blk.") for name in names)
        assert measure(activations, windows, head=True).inputs.keys() - names == {
            "token_embd.weight"
        }


def test_values_count_as_attention_mixes_them(tiny_gguf: Callable[..., Path]) -> None:
    name, tokens = "blk.1.attn_v.weight", np.random.default_rng(0).integers(0, 256, 40).tolist()
    windows = Windows((tokens,), 40)
    with opened(tiny_gguf(), 40) as activations:
        plain = measure(activations, windows)
        mixed = measure(activations, windows, mixed=True)
        ((x,), rows) = read_by(activations, windows, name), value_rows(activations.graph)
        want, attention = np.zeros(x.shape[1]), activations.graph.attentions[1]
        for _ in activations.run(tokens, [attention.output]):
            heads = activations.queries(attention.output, 40)
            for r in (r for r in rows if r.weight == name):
                want += np.diag(x.T @ mixing(attention, heads, None, r.head) @ x)
    got = mixed.inputs[name].squares[0]
    np.testing.assert_allclose(got, want / attention.heads.n_heads, rtol=1e-3)
    assert mixed.inputs[name].counts.tolist() == [40]
    for other in plain.inputs.keys() - {name, "blk.0.attn_v.weight"}:
        np.testing.assert_array_equal(mixed.inputs[other].squares, plain.inputs[other].squares)


def test_several_texts(tiny_gguf: Callable[..., Path]) -> None:
    with opened(tiny_gguf()) as activations:
        one, two = ("the world and a hello " * 40, "numbers 0 1 2 3 4 5 6 " * 40)
        both = activations.cut([one, two])
        assert both.tokens == activations.cut([one]).tokens + activations.cut([two]).tokens
        assert activations.cut([one, two], chunks=1).tokens == both.tokens[:1]
        with pytest.raises(InputError, match="a window of 64 needs 64"):
            activations.cut([one, "short"])
        with pytest.raises(InputError, match="no text"):
            activations.cut([])


def test_runs_are_as_short_as_the_memory_asks(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = Windows((list(range(64)),), 64)
    with opened(tiny_gguf()) as activations:
        whole = measure(activations, windows)
        most = 0.6 * activations.engine.arena_bytes
    monkeypatch.setattr(Ledger, "fits", property(lambda ledger: ledger.buffers < most))
    with opened(tiny_gguf()) as activations:
        assert activations.engine.chunk == 32
        short = measure(activations, windows)
    for name, entry in whole.inputs.items():
        np.testing.assert_allclose(short.inputs[name].squares, entry.squares, rtol=1e-4)


def test_a_cancelled_measurement(tiny_gguf: Callable[..., Path]) -> None:
    cancel = Cancel()
    cancel.set()
    with opened(tiny_gguf()) as activations, pytest.raises(CancelledError):
        measure(activations, Windows((list(range(64)),), 64), cancel=cancel)


# ---- the command ----


def test_the_command(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    out, how = tmp_path / "i.gguf", ["-c", "64", "--chunks", "2"]
    arguments = ["imatrix", str(tiny_gguf()), "-f", str(TEXT), "-o", str(out), *how]
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code, "14 matrices" in result.output) == (0, True), result.output
    importance = Importance.read(out)
    assert (importance.datasets, importance.chunk_count) == ([str(TEXT)], 2)
    again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1 and "--force" in again.output
    assert CliRunner().invoke(cli, [*arguments, "--force", "--attention-mixed"]).exit_code == 0
    mixed, name = Importance.read(out), "blk.0.attn_v.weight"
    assert not np.allclose(mixed.inputs[name].squares, importance.inputs[name].squares)
