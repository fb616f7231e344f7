"""Bytes flipped, overwritten, cut and repeated: the reader answers with a file or a typed error."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import ggufbytes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.engine.describe import describe
from edge.errors import EdgeError, ModelFileError
from edge.files.gguf import GGUF
from edge.weights.model_file import open_model

#: Numbers that break sums and products, as the eight bytes of a count or an offset.
NUMBERS = [0, 1, 8, 32, 255, 2**16, 2**26, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]

EDIT = st.tuples(
    st.floats(0, 1, exclude_max=True),  # where
    st.one_of(
        st.integers(0, 7).map(lambda bit: ("flip", bytes([1 << bit]))),
        st.binary(min_size=1, max_size=4).map(lambda new: ("put", new)),
        st.sampled_from(NUMBERS).map(lambda n: ("put", struct.pack("<Q", n))),
        st.sampled_from(NUMBERS).map(lambda n: ("put", struct.pack("<I", n % 2**32))),
        st.binary(min_size=1, max_size=9).map(lambda new: ("insert", new)),
        st.just(("cut", b"")),
    ),
)


def damaged(content: bytes, edits: list[tuple[float, tuple[str, bytes]]]) -> Iterator[bytes]:
    """The content after the first edit, after the first two, and so on."""
    data = bytearray(content)
    for where, (what, new) in edits:
        at = int(where * len(data))
        if what == "flip" and data:
            data[at] ^= new[0]
        elif what == "put":
            data[at : at + len(new)] = new
        elif what == "insert":
            data[at:at] = new
        elif what == "cut":
            del data[at:]
        yield bytes(data)


@pytest.fixture(scope="module")
def originals(tiny_gguf: Callable[..., Path]) -> list[bytes]:
    """A file with every value type, and a whole model."""
    model = tiny_gguf(type="Q4_0", n_layers=1, dim=32, n_heads=2, n_kv_heads=1, ffn=32)
    return [ggufbytes.sample(), model.read_bytes()]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    path.touch()
    return path


@settings(
    max_examples=800,  # at least three files each
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(which=st.sampled_from([0, 0, 1]), edits=st.lists(EDIT, min_size=3, max_size=6))
def test_damaged_file_is_read_or_refused(
    originals: list[bytes], path: Path, which: int, edits: list[tuple[float, tuple[str, bytes]]]
) -> None:
    for content in damaged(originals[which], edits):
        with path.open("r+b") as file:  # some file systems are slow to make a file anew
            file.write(content)
            file.truncate()
        for read in (read_all, read_header):
            try:
                read(path, len(content))
            except EdgeError as e:
                assert "\n" not in str(e).removeprefix(str(path))


def read_all(path: Path, size: int) -> None:
    """Touch everything that the reader gives."""
    with GGUF.open(path) as g:
        assert g.n_bytes == size
        for key in g.metadata:
            assert isinstance(g.metadata[key], (str, bool, int, float, list))
        for tensor in g.tensors.values():
            assert len(bytes(tensor.data)) == tensor.n_bytes


def read_header(path: Path, size: int) -> None:
    """What works with the header alone; a file that is refused for anything but its length is
    refused here, too.
    """
    with open_model(path, header_only=True) as g:
        assert g.n_bytes == size <= g.whole_bytes
        for key in g.metadata:
            assert isinstance(g.metadata[key], (str, bool, int, float, list))
        assert isinstance(g, GGUF)
        for tensor in g.tensors.values():
            assert tensor.offset + tensor.n_bytes <= g.whole_bytes
            with pytest.raises(ModelFileError, match="header alone"):
                _ = tensor.data
        assert describe(g).ledger.needed > 0


def test_every_length_of_a_file(originals: list[bytes], path: Path) -> None:
    content = originals[0]
    path.write_bytes(content)
    with GGUF.open(path) as whole:
        (header,) = map(len, whole.headers())
        places = [(t.name, t.type, t.shape, t.offset) for t in whole.tensors.values()]
    for n in range(len(content), 0, -1):
        with path.open("r+b") as file:
            file.truncate(n)
        try:
            with GGUF.open(path, header_only=True) as g:
                assert [(t.name, t.type, t.shape, t.offset) for t in g.tensors.values()] == places
                with pytest.raises(ModelFileError, match="header alone"):
                    g.data()
        except ModelFileError:
            assert n < header
        else:
            assert n > header - 64  # less its padding
