"""Packed files: they run as their source does, and whatever happens to one is one typed error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ggufbytes as raw
import numpy as np
import pytest
from fake_model import assert_one_line, run
from ggufbytes import ARRAY, BOOL, STRING, U32, U64, key
from tiny import write_split

import edge
from edge import native
from edge.engine import describe
from edge.engine.engine import Engine
from edge.errors import EdgeError, InputError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.weights import packed, packed_cache
from edge.weights.model_file import open_model
from edge.weights.packed import PackedFile

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

TOKENS = [5, 17, 200, 3, 77]


def logits(path: Path, **options: Any) -> np.ndarray:
    """Of some tokens, by a model of its own."""
    engine = Engine.load(path, threads=2, **options)
    try:
        out = engine.run(engine.cache(), TOKENS, logits="all")
        assert out is not None
        return out
    finally:
        engine.close()


@pytest.fixture(scope="module")
def source(tiny_gguf: Callable[..., Path]) -> Path:
    types = {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "F16"}
    return tiny_gguf(type=lambda name: types.get(name, "Q4_0"), rope_freqs=True)


@pytest.fixture(scope="module")
def shipped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed file of `source`."""
    path = tmp_path_factory.mktemp("packed") / "m.gguf"
    assert describe.pack(source, path, threads=2) == path.stat().st_size
    return path


# ---- it runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "phi3"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q8_0"])
def test_runs_as_its_source(
    tiny_gguf: Callable[..., Path], tmp_path: Path, arch: str, kind: str
) -> None:
    source = tiny_gguf(arch, type=kind)
    path = tmp_path / "m.gguf"
    describe.pack(source, path)
    assert np.array_equal(logits(path), logits(source))


def test_runs_without_its_source(source: Path, tmp_path: Path) -> None:
    want, copy, path = logits(source), tmp_path / "source.gguf", tmp_path / "m.gguf"
    shutil.copy(source, copy)
    describe.pack(copy, path)
    copy.unlink()
    assert np.array_equal(logits(path), want)
    with edge.load(path) as model:
        assert list(model.session().stream("Hello", max_tokens=3))
        assert "<|im_start|>" in model.template.render([{"role": "user", "content": "x"}])
        types = model.info()["types"]
    with edge.load(source) as model:
        assert model.info()["types"] == types and types.keys() == {"Q8_0", "F16", "Q4_0", "F32"}


def test_runs_when_it_is_deleted_meanwhile(source: Path, shipped: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(shipped, tmp_path / "m.gguf"))
    engine = Engine.load(path)
    path.unlink()
    out = engine.run(engine.cache(), TOKENS, logits="all")
    assert np.array_equal(out, logits(source))
    engine.close()


def test_serves_every_context(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """Short and long rotary factors are both in it."""
    source = tiny_gguf("phi3", original_context=64, context=256)
    path = tmp_path / "m.gguf"
    describe.pack(source, path)
    for context in (32, 256):
        assert np.array_equal(logits(path, context=context), logits(source, context=context))
    assert not np.array_equal(logits(path, context=32), logits(path, context=256))


def test_split_model_becomes_one_file(tmp_path: Path) -> None:
    shards = write_split(tmp_path / "s", type="Q4_0")
    path = tmp_path / "m.gguf"
    describe.pack(shards[0], path)
    want = logits(shards[0])
    for shard in shards:
        shard.unlink()
    assert np.array_equal(logits(path), want)


def test_same_model_same_bytes(source: Path, shipped: Path, tmp_path: Path) -> None:
    describe.pack(source, tmp_path / "again.gguf", threads=1)
    assert (tmp_path / "again.gguf").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("form", packed.FORMS)
@pytest.mark.parametrize("kind", packed.supported_types())
def test_slices_make_no_difference(
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    form: Any,
) -> None:
    from edge.weights import weights

    source = tiny_gguf(type=kind, dim=256, n_heads=4, ffn=256)
    describe.pack(source, tmp_path / "whole.gguf", layout=form)
    monkeypatch.setattr(weights, "_SLICE", 1)  # one panel at a time
    describe.pack(source, tmp_path / "sliced.gguf", layout=form)
    assert (tmp_path / "sliced.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_alignment_of_the_source_is_replaced(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_gguf(extra=(("general.alignment", 32), ("edge.packed.extra", "x")))
    path = tmp_path / "m.gguf"
    describe.pack(source, path)
    with GGUF.open(path) as gguf:
        assert gguf.alignment == 64 and "edge.packed.extra" not in gguf.metadata
        assert all(tensor.offset % 64 == 0 for tensor in gguf.tensors.values())
        assert gguf.metadata["tokenizer.ggml.tokens"][:3] == ["Ā", "ā", "Ă"]


# ---- damage --------------------------------------------------------------------------------------


def is_refused(path: Path, data: bytes) -> EdgeError:
    """The error for a file with these bytes."""
    path.write_bytes(data)
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        Engine.load(path, threads=2).close()
    return caught.value


def test_every_flipped_byte_is_found(shipped: Path, tmp_path: Path) -> None:
    data = shipped.read_bytes()
    rng = np.random.default_rng(0)
    for i in {*range(32), *rng.integers(0, len(data), 250).tolist(), len(data) - 1}:
        flipped = bytearray(data)
        flipped[i] ^= int(rng.integers(1, 256))
        is_refused(tmp_path / "m.gguf", bytes(flipped))


def test_every_cut_is_found(shipped: Path, tmp_path: Path) -> None:
    data = shipped.read_bytes()
    cuts = np.random.default_rng(0).integers(0, len(data), 60).tolist()
    for n in {*cuts, 0, 3, 4, 23, 24, len(data) - 1, len(data) - 64}:
        is_refused(tmp_path / "m.gguf", data[:n])


@pytest.mark.parametrize("more", [b"\0", bytes(64), b"more than there was"])
def test_bytes_at_the_end_are_found(shipped: Path, tmp_path: Path, more: bytes) -> None:
    is_refused(tmp_path / "m.gguf", shipped.read_bytes() + more)


def test_damaged_data_say_where(shipped: Path, tmp_path: Path) -> None:
    data = bytearray(shipped.read_bytes())
    data[-1000] ^= 1
    error = is_refused(tmp_path / "m.gguf", bytes(data))
    assert isinstance(error, ModelFileError) and error.field == "packed data"
    assert "checksum" in str(error) and error.offset


def test_info_needs_no_data(shipped: Path, tmp_path: Path) -> None:
    """But its header must be whole."""
    data = bytearray(shipped.read_bytes())
    data[-1000] ^= 1
    (tmp_path / "m.gguf").write_bytes(data)
    result = run("info", "--json", str(tmp_path / "m.gguf"))
    assert json.loads(result.output)["packed"] is True
    data[data.index(b"tiny llama")] ^= 1
    (tmp_path / "m.gguf").write_bytes(data)
    result = run("info", "--json", str(tmp_path / "m.gguf"))
    assert_one_line(result.exit_code, result.stderr, "digest")


# ---- headers that were written to deceive --------------------------------------------------------


def matrix_bytes() -> int:
    """Of a (32, 32) Q4_0 matrix when packed."""
    weight = packed.ffi.new("edge_weight *")
    packed.describe_weight("Q4_0", (32, 32), "fast", weight)
    return int(weight.n_bytes)


BYTES = matrix_bytes()


def entries(**change: Any) -> dict[str, bytes]:
    """The keys of a right packed file of one (32, 32) Q4_0 matrix and a vector, some changed."""
    values: dict[str, tuple[int, Any]] = {
        "version": (U32, packed.VERSION),
        "layouts": (U32, packed.lib.edge_layout_version()),
        "key": (STRING, "k"),
        "whole": (BOOL, True),
        "types": (ARRAY, (STRING, ["Q4_0", "F32"])),
        "forms": (ARRAY, (STRING, ["fast", "fast"])),
        "rows": (ARRAY, (U64, [32, 0])),
        "columns": (ARRAY, (U64, [32, 32])),
        "sums": (ARRAY, (U64, [1, 2])),
    }
    values |= change
    return {n: key(f"edge.packed.{n}", *v) for n, v in values.items() if v is not None}


def forged(tensors: list[tuple[int, tuple[int, ...]]] | None = None, **change: Any) -> bytes:
    """A packed file with a right digest. tensors: type number and dims of each."""
    keys = [key("general.alignment", U32, 64), *entries(**change).values()]
    keys.append(key("edge.packed.digest", STRING, "0" * 64))
    infos, offset = [], 0
    for i, (kind, dims) in enumerate(tensors or [(24, (BYTES,)), (24, (128,))]):
        infos.append(raw.tensor(f"{i}.weight", dims, kind, offset))
        offset += 2048
    data = bytearray(raw.gguf(keys, infos, bytes(8192), alignment=64))
    at = data.index(b"0" * 64)
    header = data[: len(data) - 8192]
    digest = hashlib.sha256(header[:at] + header[at + 64 :]).hexdigest().encode()
    data[at : at + 64] = digest
    return bytes(data)


def open_packed(path: Path, data: bytes) -> PackedFile:
    path.write_bytes(data)
    model = open_model(path)
    assert isinstance(model, PackedFile)
    return model


def test_forged_header_is_right(tmp_path: Path) -> None:
    with open_packed(tmp_path / "m.gguf", forged()) as model:
        assert [t.shape for t in model.tensors.values()] == [(32, 32), (32,)]
        assert len(model.tensors["0.weight"].data) == BYTES


LIES: dict[str, dict[str, Any]] = {
    "other container": {"version": (U32, packed.VERSION + 1)},
    "other layouts": {"layouts": (U32, 10**6)},
    "version is text": {"version": (STRING, "1")},
    "version is true": {"version": (BOOL, True)},
    "no layouts": {"layouts": None},
    "no key": {"key": None},
    "key is a list": {"key": (ARRAY, (STRING, ["k"]))},
    "a part of the cache": {"whole": (BOOL, False)},
    "whole is a number": {"whole": (U32, 1)},
    "no types": {"types": None},
    "types are numbers": {"types": (ARRAY, (U32, [2, 0]))},
    "unknown type": {"types": (ARRAY, (STRING, ["Q4_9", "F32"]))},
    "type without a layout": {"types": (ARRAY, (STRING, ["I32", "F32"]))},
    "other type": {"types": (ARRAY, (STRING, ["Q8_0", "F32"]))},
    "too few types": {"types": (ARRAY, (STRING, ["Q4_0"]))},
    "unknown form": {"forms": (ARRAY, (STRING, ["slow", "fast"]))},
    "forms are numbers": {"forms": (ARRAY, (U32, [0, 0]))},
    "too many forms": {"forms": (ARRAY, (STRING, ["fast"] * 3))},
    "more rows": {"rows": (ARRAY, (U64, [64, 0]))},
    "huge shape": {"rows": (ARRAY, (U64, [2**63, 0]))},
    "huge vector": {"columns": (ARRAY, (U64, [32, 2**62]))},
    "no columns at all": {"columns": (ARRAY, (U64, [0, 32]))},
    "half a block": {"columns": (ARRAY, (U64, [16, 32]))},
    "rows are floats": {"rows": (ARRAY, (raw.F64, [32.0, 0.0]))},
    "rows are bools": {"rows": (ARRAY, (BOOL, [True, False]))},
    "no sums": {"sums": (ARRAY, (U64, []))},
    "too many sums": {"sums": (ARRAY, (U64, [1] * 4))},
    "sums are text": {"sums": (ARRAY, (STRING, ["1", "2"]))},
    "tensor of floats": {"tensors": [(0, (BYTES // 4,)), (24, (128,))]},
    "tensor of two dimensions": {"tensors": [(24, (BYTES // 4, 4)), (24, (128,))]},
    "tensor too long": {"tensors": [(24, (BYTES + 64,)), (24, (128,))]},
    "one tensor more": {"tensors": [(24, (BYTES,)), (24, (128,)), (24, (64,))]},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_lies_are_refused(tmp_path: Path, lie: dict[str, Any]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(forged(**lie))
    with pytest.raises((ModelFileError, UnsupportedError), match=r"m\.gguf"):
        open_model(path)


def test_right_header_wrong_sums(tmp_path: Path) -> None:
    threads = native.new_threads(1)
    with (
        open_packed(tmp_path / "m.gguf", forged()) as model,
        pytest.raises(ModelFileError, match="checksum"),
    ):
        model.verify(threads)


def test_another_version_says_what_to_do(shipped: Path, tmp_path: Path) -> None:
    data = shipped.read_bytes()
    entry = key("edge.packed.layouts", U32, packed.lib.edge_layout_version())
    assert entry in data
    changed = data.replace(entry, entry[:-4] + struct.pack("<I", 999))
    error = is_refused(tmp_path / "m.gguf", changed)
    assert isinstance(error, UnsupportedError)
    assert "layouts 999" in str(error) and "pack it again" in str(error)


# ---- packing that fails --------------------------------------------------------------------------


def test_packed_file_is_not_packed_again(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed already"):
        describe.pack(shipped, tmp_path / "m.gguf")


def test_source_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(source, tmp_path / "m.gguf"))
    os.symlink(copy, tmp_path / "link.gguf")
    for target in (copy, tmp_path / "link.gguf"):
        with pytest.raises(InputError, match="the model itself"):
            describe.pack(copy, target)
    assert copy.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("target", ["missing/m.gguf", "folder"])
def test_target_that_cannot_be_written(source: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelFileError, match="cannot be written"):
        describe.pack(source, tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def test_stopped_packing_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe.pack(source, tmp_path / "m.gguf", progress=stop)
    assert not list(tmp_path.iterdir())


def test_disk_that_is_full_halfway(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(packed, "write_all", full)
    with pytest.raises(ModelFileError, match="No space left"):
        describe.pack(source, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ModelFileError, match="No space left"):
        describe.pack(source, tmp_path / "m.gguf")


# ---- the command ---------------------------------------------------------------------------------


def test_command_packs_and_does_not_overwrite(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    result = run("pack", str(source), "-o", str(path), "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.output)
    assert facts["bytes"] == path.stat().st_size and facts["layout"] == "fast"
    before = path.stat()
    result = run("pack", str(source), "-o", str(path))
    assert_one_line(result.exit_code, result.stderr, "--force")
    assert path.stat() == before
    assert run("pack", str(source), "-o", str(path), "--force").exit_code == 0


def test_command_info_tells_memory_from_disk(source: Path, shipped: Path) -> None:
    lines = run("info", str(shipped)).output
    assert "packed)" in lines and "c4h32" in lines
    for path, is_packed in ((source, False), (shipped, True)):
        facts = json.loads(run("info", "--json", str(path)).output)
        row = facts["types"]["Q4_0"]
        assert facts["packed"] is is_packed and facts["runs"]
        assert row["layouts"] == ["c4h32"] and row["memory_bytes"] >= 4.5 / 8 * row["parameters"]
        assert facts["memory_bytes"] >= sum(r["memory_bytes"] for r in facts["types"].values())


@pytest.mark.parametrize("command", [["complete", "-p", "Hello"], ["chat", "-p", "Hello"]])
def test_commands_take_packed_files(source: Path, shipped: Path, command: list[str]) -> None:
    name, *options = command
    options += ["-q", "-n", "5", "--temperature", "0", "--layout", "fast"]
    outputs = {run(name, str(path), *options).output for path in (source, shipped)}
    assert len(outputs) == 1 and outputs != {""}
