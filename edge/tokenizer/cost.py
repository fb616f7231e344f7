"""The memory that a tokenizer takes, from the sizes of a file's arrays, before they are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edge.files.gguf import Metadata

__all__ = [
    "MOST_ADDED_BYTES",
    "MOST_SPM_MERGES",
    "TokenizerBytes",
    "extent",
    "folder_tokenizer_bytes",
    "tokenizer_bytes",
]

_PREFIX = "tokenizer.ggml."

#: Bytes while the tokenizer is built: for each token and merge, and for each byte of their texts.
#: Measured: 320 and 3 for tokens (20,000 to 200,000 of 8 to 2,000 bytes), 350 and 5 for merges
#: (850,000); a seventh more with the vocabularies of SmolLM2 and Phi-4-mini.
_TOKEN, _TOKEN_BYTE = 380, 3
_MERGE, _MERGE_BYTE = 420, 5

#: Further bytes for each added token (one that is cut out of a text before anything else), and for
#: each byte of its text. Measured: 900 and 100.
_ADDED, _ADDED_BYTE = 1300, 130

#: The most bytes that the texts of all added tokens may have, as (a, b): a * n + b for n of them.
MOST_ADDED_BYTES = (48, 4096)

#: The most merges that the scores of SentencePiece may imply, as (a, b): a * n + b for n tokens.
#: The vocabularies in use have 2 for each token.
MOST_SPM_MERGES = (4, 4096)

#: Types of tokens that are not added tokens: undefined, normal, unused, byte.
_NOT_ADDED = (0, 1, 5, 6)


class TokenizerBytes(NamedTuple):
    """Bytes of a tokenizer. building: while it is built; built: afterwards."""

    building: int
    built: int


def tokenizer_bytes(metadata: Mapping[str, Any]) -> TokenizerBytes:
    """Bytes of the tokenizer of a GGUF file."""
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
    return TokenizerBytes(words + added, words * 3 // 4 + added)


def folder_tokenizer_bytes(n_vocab: int, file_bytes: int) -> int:
    """Bytes of the tokenizer of a folder, building and afterwards. file_bytes: of tokenizer.json.

    Measured with 190,000 tokens, and 83 bytes of the file for each: 985 bytes of memory for each
    token, 12 for each byte of the file. A file with much more for each token holds other JSON
    values, too, which take up to 26 bytes for each byte of the file.
    """
    each = 12 if file_bytes <= 160 * n_vocab + (1 << 20) else 26
    return max(1000 * n_vocab, each * file_bytes)


def extent(metadata: Mapping[str, Any], key: str) -> tuple[int, int]:
    """(items, bytes of their texts) of the array `tokenizer.ggml.<key>`; (0, 0): there is none."""
    if isinstance(metadata, Metadata):
        return metadata.extent(_PREFIX + key)
    values = metadata.get(_PREFIX + key)
    if not isinstance(values, (list, tuple)):
        return 0, 0
    return len(values), sum(len(x.encode("utf-8", "replace")) for x in values if type(x) is str)
