"""How each byte-level BPE cuts text into words before it merges: one row per `pre`.

The patterns are those of the models' own tokenizers. To add one, add a row.
"""

from __future__ import annotations

from typing import NamedTuple

from edge.errors import UnsupportedError

__all__ = ["PRE_SPLITS", "PreSplit", "pre_split"]


class PreSplit(NamedTuple):
    """One row: how a text is cut before its words are merged."""

    #: A match is a word, and so is the text between two matches. Each of several patterns cuts the
    #: words that the one before it made. None: the pattern of GPT-2, built into ByteLevel.
    pattern: str | tuple[str, ...] | None
    split_digits: bool = False  # each digit is a word of its own, before the pattern
    nfc: bool = False  # compose characters first
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # whether a text begins with bos, where the file does not say


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
)

_GPT2 = PreSplit(None)
_LLAMA3 = PreSplit(
    rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}",
    ignore_merges=True,
    add_bos=True,
)

PRE_SPLITS: dict[str, PreSplit] = {
    "default": PreSplit(  # no model's own: llama.cpp's, for files that name no `pre`
        (
            r"[\p{P}$+<=>^~|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        )
    ),
    "gpt-2": _GPT2,
    "smollm": PreSplit(None, split_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": PreSplit(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|{_SPACES}", nfc=True),
    "gpt-4o": PreSplit(
        rf"{_CASED}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
}


def pre_split(name: str) -> PreSplit:
    """The row for `tokenizer.ggml.pre` = name. Raises UnsupportedError for an unknown name."""
    try:
        return PRE_SPLITS[name]
    except KeyError:
        raise UnsupportedError(
            f"unknown tokenizer pre-split {name!r}", what=name, supported=PRE_SPLITS
        ) from None
