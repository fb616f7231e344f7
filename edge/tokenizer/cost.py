"""What a tokenizer takes of memory, from the sizes of a file's arrays, before they are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.files.gguf import Metadata

__all__ = [
    "MOST_ADDED_BYTES",
    "MOST_SPM_MERGES",
    "extent",
    "folder_tokenizer_bytes",
    "tokenizer_bytes",
]

_PREFIX = "tokenizer.ggml."

#: While it is built: bytes for each token and merge, and for each byte of their texts. Measured
#: with 20,000 to 200,000 tokens of 8 to 2,000 bytes, and 850,000 merges: 320 and 3, 350 and 5; with
#: the vocabularies of SmolLM2 and Phi-4-mini a seventh more.
_TOKEN, _TOKEN_BYTE = 380, 3
_MERGE, _MERGE_BYTE = 420, 5

#: What a token is that is looked for in the text before all else, besides; 900 and 100 measured.
_ADDED, _ADDED_BYTE = 1300, 130

#: Bytes of the texts of those tokens, for each and beyond: more is refused.
MOST_ADDED_BYTES = (48, 4096)

#: Merges that the scores of SentencePiece may imply, for each token and beyond; the vocabularies in
#: use have 2 for each.
MOST_SPM_MERGES = (4, 4096)

#: Token types that are not looked for: normal, unused, byte.
_NOT_ADDED = (0, 1, 5, 6)


def tokenizer_bytes(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of the tokenizer of a GGUF file while it is built, and afterwards."""
    n_tokens, token_bytes = extent(metadata, "tokens")
    n_merges, merge_bytes = extent(metadata, "merges")
    if metadata.get(_PREFIX + "model") == "llama":
        each, beyond = MOST_SPM_MERGES
        n_merges, merge_bytes = each * n_tokens + beyond, 0
    elif n_tokens == 0:
        n_merges = merge_bytes = 0
    n_added = 0
    if extent(metadata, "token_type")[0] == n_tokens:
        types = metadata.get(_PREFIX + "token_type", [])
        n_added = n_tokens - sum(map(types.count, _NOT_ADDED)) if types else 0
    each, beyond = MOST_ADDED_BYTES
    added = _ADDED * n_added + _ADDED_BYTE * min(each * n_added + beyond, token_bytes)
    words = _TOKEN * n_tokens + _TOKEN_BYTE * token_bytes
    words += _MERGE * n_merges + _MERGE_BYTE * merge_bytes
    return words + added, words * 3 // 4 + added


def folder_tokenizer_bytes(n_vocab: int, file_bytes: int) -> int:
    """Bytes of the tokenizer of a folder, building and afterwards. file_bytes: of tokenizer.json.

    Measured: 985 bytes for each of 190,000 tokens, 12 for each byte of a file that has 83 for a
    token. One with much more for each is no list of tokens; a value of JSON takes up to 26.
    """
    each = 12 if file_bytes <= 160 * n_vocab + (1 << 20) else 26
    return max(1000 * n_vocab, each * file_bytes)


def extent(metadata: Mapping[str, Any], key: str) -> tuple[int, int]:
    """(items, bytes of their texts) of an array `tokenizer.ggml.<key>`; (0, 0) where none is."""
    if isinstance(metadata, Metadata):
        return metadata.extent(_PREFIX + key)
    values = metadata.get(_PREFIX + key)
    if not isinstance(values, (list, tuple)):
        return 0, 0
    return len(values), sum(len(x.encode("utf-8", "replace")) for x in values if type(x) is str)
