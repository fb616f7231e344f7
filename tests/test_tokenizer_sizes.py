"""What a vocabulary may be: counts and sizes that are known before anything is built."""

from __future__ import annotations

from pathlib import Path

import ggufbytes
import pytest
from test_tokenizer import PIECES, bpe, build, spm

from edge.errors import ModelFileError, UnsupportedError
from edge.files.gguf import GGUF
from edge.tokenizer import Tokenizer
from edge.tokenizer.cost import extent, folder_tokenizer_bytes, tokenizer_bytes


def test_a_package_that_cannot_be_loaded_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise ImportError("tokenizers.so: failed to map segment from shared object")

    monkeypatch.setattr("edge.tokenizer.backend.import_module", fail)
    tokenizer = build()
    assert tokenizer.decode([97]) == "a"
    with pytest.raises(UnsupportedError, match=r"is there and cannot be loaded.*failed to map"):
        tokenizer.encode("a")


def test_a_huge_piece_is_refused_at_once() -> None:
    with pytest.raises(ModelFileError, match="a piece of 1000000 characters: at most 1024"):
        Tokenizer.from_metadata(spm({**PIECES, "ab" * 500_000: -1.0}))


def test_merges_of_pieces_are_bounded() -> None:
    """Memory is planned for four cuts of each piece."""
    pieces = {"a" * i: -float(i) for i in range(1, 300)}
    with pytest.raises(ModelFileError, match="cut into others in more than 6328 ways"):
        Tokenizer.from_metadata(spm(pieces))


def test_counts_are_compared_before_anything_is_decoded() -> None:
    metadata = bpe("a+b")
    with pytest.raises(ModelFileError, match=r"ggml\.tokens: 257 tokens, the model has 300"):
        Tokenizer.from_metadata(metadata, "x.gguf", 300)
    metadata["tokenizer.ggml.token_type"] = [1] * 7
    with pytest.raises(ModelFileError, match="7 values, the tokens are 257"):
        Tokenizer.from_metadata(metadata)


def test_extents_of_a_file_are_those_of_its_lists(tmp_path: Path) -> None:
    metadata = bpe("a+b ab+c", (("<end>", 3),))
    types = metadata["tokenizer.ggml.token_type"]
    keys = {
        "tokens": (ggufbytes.STRING, metadata["tokenizer.ggml.tokens"]),
        "merges": (ggufbytes.STRING, metadata["tokenizer.ggml.merges"]),
        "token_type": (ggufbytes.I32, types),
    }
    entries = [
        ggufbytes.key(f"tokenizer.ggml.{name}", ggufbytes.ARRAY, value)
        for name, value in keys.items()
    ]
    entries.append(ggufbytes.key("tokenizer.ggml.model", ggufbytes.STRING, "gpt2"))
    (tmp_path / "x.gguf").write_bytes(ggufbytes.gguf(entries))
    with GGUF.open(tmp_path / "x.gguf") as gguf:
        for name in ("tokens", "merges", "scores"):
            assert extent(gguf.metadata, name) == extent(metadata, name)
        assert tokenizer_bytes(gguf.metadata) == tokenizer_bytes(metadata)


def test_memory_is_planned_by_counts_and_bytes() -> None:
    plain = tokenizer_bytes(bpe("a+b"))
    for more in (bpe("a+b " * 50), bpe("a+b", (("x" * 500, 1),)), bpe("a+b", (("<x>", 3),))):
        build, rest = tokenizer_bytes(more)
        assert build > plain[0] and rest > plain[1]
    assert tokenizer_bytes({}) < (1 << 20, 1 << 20)


def test_a_folder_is_planned_by_its_file() -> None:
    assert folder_tokenizer_bytes(1000, 0) == 1_000_000
    assert folder_tokenizer_bytes(50_000, 5_000_000) == 60_000_000
    assert folder_tokenizer_bytes(100, 50_000_000) == 26 * 50_000_000
