"""The GGUF reader: right files read the same as by the `gguf` package, wrong ones refused."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as package
import ggufbytes as raw
import numpy as np
import pytest
from ggufbytes import ARRAY, BOOL, F32, I16, STRING, U8, U16, U32, U64, key, tensor
from tiny import write_split, write_tiny

from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files.gguf import GGUF, TENSOR_TYPES


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """Bytes -> path of a file that holds them."""

    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


def read_all(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything that the reader can be asked for."""
    with GGUF.open(path) as g:
        return dict(g.metadata), {name: bytes(t.data) for name, t in g.tensors.items()}


# --- right files ---------------------------------------------------------------------------------


def test_every_value_type(write: Callable[[bytes], Path]) -> None:
    metadata, tensors = read_all(write(raw.sample()))
    assert metadata == {
        "u8": 200,
        "i8": -100,
        "u16": 60000,
        "i16": -30000,
        "u32": 4 * 10**9,
        "i32": -(2 * 10**9),
        "f32": 0.5,
        "yes": True,
        "text": "Grüße, 世界",
        "words": ["", "a", "é\0", "世界" * 9],
        "bools": [True, False],
        "floats": [1.0, -2.5],
        "none": [],
        "nested": [[1, -2], ["x"], [[3]]],
        "u64": 2**63,
        "i64": -(2**63),
        "f64": 0.1,
        "general.alignment": 64,
    }
    assert metadata["yes"] is True and metadata["bools"][1] is False
    data = bytes(range(140))
    assert tensors == {"vector": data[128:], "matrix": data[:36], "cube": data[64:88]}


def test_tensors_say_where_they_are(write: Callable[[bytes], Path]) -> None:
    path = write(raw.sample())
    with GGUF.open(path) as g:
        assert list(g.tensors) == ["vector", "matrix", "cube"]
        t = g.tensors["matrix"]
        assert (t.name, t.type, t.shape, t.n_bytes) == ("matrix", "Q4_0", (2, 32), 36)
        assert g.tensors["cube"].shape == (2, 3, 2)
        assert g.alignment == 64 and t.offset % 64 == 0
        assert path.read_bytes()[t.offset :][:36] == bytes(t.data)
        assert t.path == g.path == str(path) and g.n_bytes == path.stat().st_size
        assert t.data.readonly


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 32, 1 << 20])
def test_versions_and_alignments(
    write: Callable[[bytes], Path], version: int, alignment: int
) -> None:
    keys = [key("general.alignment", U32, alignment)]
    path = write(
        raw.gguf(keys, [tensor("t", (2,), 0, 0)], b"12345678", version=version, alignment=alignment)
    )
    with GGUF.open(path) as g:
        assert g.version == version
        assert bytes(g.tensors["t"].data) == b"12345678"


def test_file_without_tensors_or_keys(write: Callable[[bytes], Path]) -> None:
    assert read_all(write(raw.gguf())) == ({}, {})
    assert read_all(write(raw.header(0, 0))) == ({}, {})


def test_path_may_be_text_bytes_or_path(write: Callable[[bytes], Path]) -> None:
    path = write(raw.sample())
    for form in (path, str(path), os.fsencode(path)):
        GGUF.open(form).close()  # type: ignore[arg-type]


TINY_MODELS = [
    {"arch": "llama", "type": "Q4_1", "tied": False, "rope_freqs": True},
    {"arch": "llama", "type": lambda name: "Q8_0" if "embd" in name else "Q4_0", "head_dim": 32},
    {"arch": "phi3", "type": "IQ4_NL", "original_context": 64, "n_rot": 8, "window": 32},
    {"arch": "phi3", "type": "BF16"},
    {"arch": "llama", "type": "F16", "n_kv_heads": 4},
]


@pytest.mark.parametrize("options", TINY_MODELS)
def test_reads_what_the_gguf_package_reads(
    tiny_gguf: Callable[..., Path], options: dict[str, Any]
) -> None:
    path = tiny_gguf(**options)
    reader = package.GGUFReader(path)
    with GGUF.open(path) as g:
        theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert dict(g.metadata) == theirs
        assert [t.name for t in reader.tensors] == list(g.tensors)
        for t in reader.tensors:
            ours = g.tensors[t.name]
            assert ours.type == t.tensor_type.name
            assert ours.shape == tuple(int(n) for n in reversed(t.shape))
            assert (ours.offset, ours.n_bytes) == (t.data_offset, t.n_bytes)
            assert bytes(ours.data) == np.ascontiguousarray(t.data).tobytes()


def test_types_are_those_of_the_gguf_package() -> None:
    theirs = {
        int(kind): (kind.name, *package.GGML_QUANT_SIZES[kind])
        for kind in package.GGMLQuantizationType
        if kind.name != "Q8_1"  # the package says 40 bytes; ggml has had 36 since 2023
    }
    ours = {number: tuple(kind) for number, kind in TENSOR_TYPES.items()}
    assert ours.items() >= {n: kind for n, kind in theirs.items() if n in ours}.items()
    assert set(ours) - {9} >= set(theirs) & set(range(40))


# --- lazy lists and closing ----------------------------------------------------------------------


def test_lists_are_decoded_once_and_only_when_asked_for(write: Callable[[bytes], Path]) -> None:
    path = write(raw.gguf([key("bad", ARRAY, (STRING, ["fine", b"\xff\xfe"])), key("n", U8, 1)]))
    with GGUF.open(path) as g:
        assert "bad" in g.metadata and list(g.metadata) == ["bad", "n"] and len(g.metadata) == 2
        assert g.metadata["n"] == 1
        with pytest.raises(ModelFileError, match=r"bad\[1\] at byte \d+: .* not UTF-8"):
            g.metadata["bad"]
    with GGUF.open(write(raw.sample())) as g:
        assert g.metadata["words"] is g.metadata["words"]


def test_closed_file_is_a_typed_error_and_views_live_on(write: Callable[[bytes], Path]) -> None:
    g = GGUF.open(write(raw.sample()))
    words = g.metadata["words"]
    g.close()
    g.close()
    assert g.metadata["words"] is words and g.metadata["u8"] == 200
    with pytest.raises(ModelFileError, match="closed"):
        g.metadata["floats"]
    with pytest.raises(ModelFileError, match="closed"):
        _ = g.tensors["matrix"].data
    with GGUF.open(write(raw.sample())) as g:
        view = g.tensors["matrix"].data
    assert bytes(view) == bytes(range(36))


def test_file_changed_while_open_is_a_typed_error(write: Callable[[bytes], Path]) -> None:
    path = write(array(STRING, 2, raw.string("ab") + raw.string("cd")))
    for length in (2**62, 2**64 - 1):
        with GGUF.open(path) as g:
            content = path.read_bytes()
            with path.open("r+b") as file:
                file.write(content.replace(raw.string("ab"), u64(length) + b"ab"))
            with pytest.raises(ModelFileError, match="changed while it was open"):
                g.metadata["a"]
        write(content)


# --- split files ---------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_split(tmp_path / "m.gguf", 3, type="Q4_0")


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_shard_opens_all(tmp_path: Path, shards: list[Path], opened: int) -> None:
    whole_metadata, whole_tensors = read_all(write_tiny(tmp_path / "whole.gguf", type="Q4_0"))
    metadata, tensors = read_all(shards[opened])
    assert {k: v for k, v in metadata.items() if not k.startswith("split.")} == whole_metadata
    assert tensors == whole_tensors and list(tensors) == list(whole_tensors)
    with GGUF.open(shards[opened]) as g:
        assert g.path == str(shards[opened])
        assert {t.path for t in g.tensors.values()} == {str(p) for p in shards}
        assert g.n_bytes == sum(p.stat().st_size for p in shards)


def test_shards_open_by_a_bare_or_odd_path(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards[0].parent)
    whole = read_all(shards[0])
    for path in (shards[1].name, f".//{shards[2].name}", f"{shards[1].parent}//{shards[1].name}"):
        assert read_all(path) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_missing_shard_is_named(shards: list[Path], missing: int) -> None:
    shards[missing].unlink()
    with pytest.raises(ModelFileError, match="shard is missing") as e:
        GGUF.open(shards[(missing + 1) % 3])
    assert e.value.path == str(shards[missing])


def test_shard_under_another_name(shards: list[Path]) -> None:
    odd = shards[0].rename(shards[0].with_name("model.gguf"))
    with pytest.raises(ModelFileError, match=r"must end like -00001-of-00003\.gguf"):
        GGUF.open(odd)
    far = odd.rename(odd.with_name("m-00009-of-00003.gguf"))
    with pytest.raises(ModelFileError, match="no shard 9 of 3"):
        GGUF.open(far)


def test_shards_in_the_wrong_order_or_of_another_model(shards: list[Path]) -> None:
    good = shards[1].read_bytes()
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(ModelFileError, match=r"split\.no"):
        GGUF.open(shards[0])
    shards[1].write_bytes(raw.gguf([key("split.no", U16, 1), key("split.count", U16, 3)]))
    with pytest.raises(ModelFileError, match=r"split\.tensors\.count"):
        GGUF.open(shards[0])
    shards[1].write_bytes(good[:-1000])
    with pytest.raises(ModelFileError, match="truncated") as e:
        GGUF.open(shards[0])
    assert e.value.path == str(shards[1])


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    for i in range(2):
        keys = [key("split.no", U16, i), key("split.count", U16, 2)]
        path = tmp_path / f"m-{i + 1:05}-of-00002.gguf"
        path.write_bytes(raw.gguf(keys, [tensor("t", (1,), 0, 0)], b"1234"))
    with pytest.raises(ModelFileError, match="two shards have a tensor of the same name"):
        GGUF.open(path)


@pytest.mark.parametrize(
    "count", [(F32, 3.0), (U32, 7), (STRING, "3"), (ARRAY, (U8, [3]))], ids=str
)
def test_wrong_split_count(tmp_path: Path, count: tuple[int, Any]) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(raw.gguf([key("split.count", *count)]))
    with pytest.raises(ModelFileError, match=r"split\.count"):
        GGUF.open(path)


# --- files that are no GGUF ----------------------------------------------------------------------

OTHER_FILES = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html>Not found", "web page"),
    "indented html": (b"\n\n  <html>", "web page"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip"),
    "safetensors": (struct.pack("<Q", 2) + b'{"a":1}' + bytes(40), "safetensors"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "json": (b'{"error": "denied"}', "JSON"),
    "ggml": (b"tjgg" + bytes(40), "before GGUF"),
    "text": (b"hello", "not a GGUF file$"),
    "zeros": (bytes(100), "not a GGUF file$"),
    "part of the magic": (b"GG", "truncated"),
    "magic only": (b"GGUF", "truncated"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files(write: Callable[[bytes], Path], name: str) -> None:
    content, says = OTHER_FILES[name]
    path = write(content)
    with pytest.raises(ModelFileError, match=says) as e:
        GGUF.open(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_file_beyond_32_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        file.truncate(1 << 31)  # a hole
    monkeypatch.setattr(sys, "maxsize", (1 << 31) - 1)
    with pytest.raises(UnsupportedError, match=r"large\.gguf: 2\.00 GiB .* split") as e:
        GGUF.open(path)
    assert "\n" not in str(e.value)


def test_missing_file_folder_and_device(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        GGUF.open(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="folder"):
        GGUF.open(tmp_path)
    with pytest.raises(ModelFileError, match="not a regular file"):
        GGUF.open(os.devnull)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        GGUF.open("a\0b")
    with pytest.raises(ModelFileError, match="cannot be opened"):
        GGUF.open(tmp_path / ("long" * 100))


@pytest.mark.parametrize(
    ("version", "says"),
    [(1, "version 1 "), (0, "version 0 "), (4, "version 4 "), (3 << 24, "big-endian")],
)
def test_other_versions(write: Callable[[bytes], Path], version: int, says: str) -> None:
    with pytest.raises(UnsupportedError, match=f"byte 4: .*{says}"):
        GGUF.open(write(raw.gguf(version=version)))


def test_big_endian_file_of_the_gguf_package(tmp_path: Path) -> None:
    writer = package.GGUFWriter(tmp_path / "be.gguf", "llama", endianess=package.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="big-endian"):
        GGUF.open(tmp_path / "be.gguf")


# --- counts, lengths and offsets that lie --------------------------------------------------------

HUGE = [2**24, 2**31, 2**32, 2**40, 2**63 - 8, 2**63, 2**64 - 8, 2**64 - 1]
MIB = 1 << 20


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def array(kind: int, n: int, payload: bytes = b"") -> bytes:
    return raw.gguf([key("a", ARRAY, struct.pack("<IQ", kind, n) + payload)])


def nested(depth: int) -> bytes:
    levels = struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", U8, 0)
    return raw.gguf([key("a", ARRAY, levels)])


def one(name: str | bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return raw.gguf([], [tensor(name, dims, kind, offset)], bytes(4096))


def two(first: tuple[Any, ...], second: tuple[Any, ...]) -> bytes:
    return raw.gguf([], [tensor(*first), tensor(*second)], bytes(4096))


def aligned(n: int, kind: int = U32) -> bytes:
    return raw.gguf([key("general.alignment", kind, n)])


BAD: dict[str, tuple[bytes, str]] = {
    **{f"{n} keys": (raw.header(0, n), "key") for n in (1, *HUGE)},
    **{f"{n} tensors": (raw.header(n, 0), "tensor") for n in (1, *HUGE)},
    **{f"key of {n} bytes": (raw.header(0, 1) + u64(n), "key 0, name") for n in HUGE},
    **{
        f"string of {n} bytes": (raw.gguf([string_key]), r"key s at byte (37|45)")
        for n in HUGE
        for string_key in [raw.string("s") + struct.pack("<I", STRING) + u64(n)]
    },
    **{f"{n} numbers": (array(U64, n), "key a at byte") for n in HUGE},
    **{f"{n} strings": (array(STRING, n), r"key a") for n in HUGE},
    **{f"{n} arrays": (array(ARRAY, n), r"key a") for n in HUGE},
    **{f"item of {n} bytes": (array(STRING, 2, u64(1) + b"x" + u64(n)), r"a\[1\]") for n in HUGE},
    **{f"first dim {n}": (one("t", (n,)), "tensor t") for n in HUGE},
    **{f"four dims of {n}": (one("t", (n,) * 4, 2), "tensor t") for n in HUGE},
    **{f"offset {n}": (one("t", (1,), 0, n), "tensor t") for n in (8192, *HUGE)},
    "product wraps to 0": (one("t", (2**32, 2**32)), "do not fit"),
    "product wraps to 4": (one("t", (2**33, 2**31 + 1)), "do not fit"),
    "bytes wrap to 8": (one("t", (2**62 + 2,)), "do not fit"),
    "five dims": (one("t", (1,) * 5), "dimensions .* more than the limit of 4"),
    "no dims": (one("t", ()), "no elements"),
    "dim of 0": (one("t", (4, 0)), "no elements"),
    "row of half a block": (one("t", (16, 2), 2), "block of 32"),
    "row of 1.5 blocks": (one("t", (48, 2), 8), "block of 32"),
    "tensor one byte too long": (raw.gguf([], [tensor("t", (4,), 0, 0)], bytes(15)), "truncated"),
    "offset not aligned": (one("t", (1,), 0, 16), "multiple of the alignment"),
    "tensors overlap": (two(("a", (16,), 0, 0), ("b", (4,), 0, 32)), "overlap those of a"),
    "tensors overlap, reversed": (two(("a", (4,), 0, 32), ("b", (9,), 0, 0)), "overlap those of b"),
    "tensors in one place": (two(("a", (1,), 0, 0), ("b", (1,), 0, 0)), "overlap"),
    "tensor twice": (two(("a", (1,), 0, 0), ("a", (1,), 0, 32)), "tensor a.*twice"),
    "key twice": (raw.gguf([key("k", U8, 1), key("k", U8, 1)]), "key k.*twice"),
    "value type 13": (raw.gguf([key("k", 13, b"1234")]), "no value type 13"),
    "item type 13": (array(13, 0), "no value type 13"),
    "bool of 2": (raw.gguf([key("k", BOOL, b"\2")]), "neither true"),
    "item bool of 2": (array(BOOL, 2, b"\1\2"), "neither true"),
    "key not UTF-8": (raw.gguf([key(b"\xff", U8, 1)]), "not UTF-8"),
    "string not UTF-8": (raw.gguf([key("k", STRING, b"abc\xc3")]), "key k at byte 48.*not UTF-8"),
    "lone surrogate": (raw.gguf([key("k", STRING, b"\xed\xa0\x80")]), "not UTF-8"),
    "tensor name not UTF-8": (one(b"\xff", (1,)), "not UTF-8"),
    "long key": (raw.gguf([key("k" * 65_536, U8, 1)]), "limit of 65535"),
    "long string": (raw.gguf([key("k", STRING, bytes(64 * MIB + 1))]), "limit"),
    "long array": (array(STRING, 2, raw.string(bytes(33 * MIB)) * 2), "more than 67108864 bytes"),
    "five arrays deep": (nested(5), "arrays within arrays"),
    "70,000 arrays": (array(ARRAY, 70_000, struct.pack("<IQ", U8, 0) * 70_000), "within arrays"),
    **{f"alignment {n}": (aligned(n), "alignment") for n in (0, 1, 4, 24, 33, 2 * MIB, 2**32 - 1)},
    "alignment -8": (aligned(-8, I16), "alignment"),
    "alignment 32.0": (aligned(32, F32), "alignment"),
    "alignment text": (raw.gguf([key("general.alignment", STRING, "32")]), "alignment"),
    "alignment list": (raw.gguf([key("general.alignment", ARRAY, (U8, [32]))]), "alignment"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(write: Callable[[bytes], Path], name: str) -> None:
    content, says = BAD[name]
    with pytest.raises(ModelFileError, match=says) as e:
        GGUF.open(write(content))
    assert e.value.field is not None and "\n" not in str(e.value)


def test_limits_themselves_are_fine(write: Callable[[bytes], Path]) -> None:
    text = "x" * 65_535
    assert read_all(write(raw.gguf([key(text, U8, 1)])))[0] == {text: 1}
    assert read_all(write(nested(4)))[0] == {"a": [[[[]]]]}
    many = [key(f"k{i}", U8, 1) for i in range(65_536)]
    assert len(read_all(write(raw.gguf(many)))[0]) == 65_536
    with pytest.raises(ModelFileError, match="limit of 65536"):
        GGUF.open(write(raw.gguf([*many, key("one more", U8, 1)])))


@pytest.mark.parametrize("number", [4, 5, 31, 38, 43, 99, 2**32 - 1])
def test_unknown_tensor_type(write: Callable[[bytes], Path], number: int) -> None:
    """Its bytes are those up to the next tensor, or the end of the file."""
    tensors = [
        tensor("t", (32,), number, 0),
        tensor("u", (8,), 0, 64),
        tensor("v", (9,), number, 96),
    ]
    with GGUF.open(write(raw.gguf((), tensors, bytes(100)))) as file:
        name = f"type {number}"
        assert [t.type for t in file.tensors.values()] == [name, "F32", name]
        assert [t.n_bytes for t in file.tensors.values()] == [64, 32, 4]
        assert len(file.tensors["v"].data) == 4


@pytest.mark.parametrize(
    ("name", "block", "offset", "k"),
    [
        ("Q2_0", 64, 576, 2048),
        ("Q2_0_128", 128, 544, 2048),
        ("Q2_0", 64, 608, 2048),  # something between
    ],
)
def test_offsets_tell_how_large_the_blocks_are(
    write: Callable[[bytes], Path], name: str, block: int, offset: int, k: int
) -> None:
    n_bytes = k // block * (2 + block // 4)
    tensors = [tensor("t", (k,), 42, 0), tensor("u", (k,), 42, offset)]
    with GGUF.open(write(raw.gguf((), tensors, bytes(offset + n_bytes)))) as file:
        for t in file.tensors.values():
            assert (t.type, t.n_bytes, len(t.data)) == (name, n_bytes, n_bytes)


@pytest.mark.parametrize(("k", "offset"), [(2048, 512), (192, 32), (2048, 0)])
def test_blocks_that_fit_in_no_size_overlap(
    write: Callable[[bytes], Path], k: int, offset: int
) -> None:
    tensors = [tensor("t", (k,), 42, 0), tensor("u", (64,), 42, offset)]
    with pytest.raises(ModelFileError, match="overlap"):
        GGUF.open(write(raw.gguf((), tensors, bytes(4096))))


@pytest.mark.parametrize("offset", [0, 96, 2**64 - 32])
def test_unknown_tensor_type_without_data(write: Callable[[bytes], Path], offset: int) -> None:
    tensors = [tensor("t", (32,), 99, 0), tensor("u", (32,), 99, offset)]
    with pytest.raises(ModelFileError, match=r"fit|overlap"):
        GGUF.open(write(raw.gguf((), tensors, bytes(96))))


def test_hostile_names_do_not_reach_the_terminal(write: Callable[[bytes], Path]) -> None:
    name = "\x1b[2J\n" + "x" * 60_000
    with pytest.raises(ModelFileError) as e:
        GGUF.open(write(raw.gguf([key(name, BOOL, b"\7")])))
    message = str(e.value).removeprefix(e.value.path)
    assert message.isprintable() and len(message) < 300


def test_truncated_anywhere(write: Callable[[bytes], Path]) -> None:
    content = raw.sample()
    whole = read_all(write(content))
    for n in range(len(content)):
        path = write(content[:n])
        with pytest.raises(ModelFileError):
            read_all(path)
    assert read_all(write(content + b"more")) == whole


def test_truncated_tiny_model(
    tiny_gguf: Callable[..., Path], write: Callable[[bytes], Path]
) -> None:
    content = tiny_gguf(
        type="Q4_0", n_layers=1, dim=32, n_heads=2, n_kv_heads=1, ffn=32
    ).read_bytes()
    path, whole = write(content), read_all(write(content))
    for n in reversed(range(0, len(content), 13)):
        os.truncate(path, n)
        try:
            assert read_all(path) == whole  # only padding is gone
        except EdgeError:
            continue
        assert len(content) - n < 32
