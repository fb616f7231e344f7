"""How each byte-level BPE cuts text into words before it merges: one row per `pre`.

The patterns are those of the models' own tokenizers. To add one, add a row. Where llama.cpp differs
from a model's own tokenizer, the row follows the model:

nfc         Characters are composed first. llama.cpp never does so.
gpt-4o      And its like: letters have a case in every script, and combining marks belong to a word.
            In llama.cpp only ASCII letters have one, and Hindi, Thai and Khmer are cut at marks.
deepseek    llm and coder: wide spaces (U+2000 on) are in the range of their CJK characters.
tiny_aya    Digits are counted in threes from the right only where no letter follows them.

Rows whose own tokenizer could not be had follow llama.cpp.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from edge.errors import UnsupportedError

__all__ = ["PRE_SPLITS", "PreSplit", "WordEnds", "pre_split"]

#: Where a word surely ends (pieces.py says it in full): around letters and digits, and before each
#: space; around letters and digits; nowhere that is known.
WordEnds: TypeAlias = Literal["spaces", "letters", "nowhere"]


class PreSplit(NamedTuple):
    """One row: how a text is cut before its words are merged."""

    #: A match is a word, and so is the text between two matches. Each of several patterns cuts the
    #: words that the one before it made. None: the pattern of GPT-2, built into ByteLevel.
    pattern: str | tuple[str, ...] | None
    split_digits: bool = False  # each digit is a word of its own, before the pattern
    nfc: bool = False  # compose characters first
    ignore_merges: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # whether a text begins with bos, where the file does not say
    word_ends: WordEnds = "spaces"

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns, in their order; empty for that of GPT-2."""
        return (self.pattern,) if isinstance(self.pattern, str) else self.pattern or ()


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str) -> str:
    """The pattern of GPT-4, with another one for digits."""
    return rf"{_CONTRACTION}|{_LETTERS}|{digits}|{_SYMBOLS}|{_SPACES}"


def _cased(contraction: str, digits: str) -> str:
    """The pattern of GPT-4o, with others for contractions behind a word and for digits."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{contraction}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


_GPT4 = _cl100k(r"\p{N}{1,3}")
_GPT4O = _cased(rf"{_CONTRACTION}?", r"\p{N}{1,3}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
#: Letters that have a case, as DeepSeek LLM lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

_ROWS: tuple[tuple[str, PreSplit], ...] = (
    # No model's own: llama.cpp's, for files that name no `pre`.
    (
        "default",
        PreSplit((r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ),
    # GPT-2
    ("gpt-2 phi-2 exaone4 mellum a.x-4.0 gigachat jais trillion granite-docling", PreSplit(None)),
    ("olmo mpt", PreSplit(None, nfc=True)),
    # each digit alone, then GPT-2
    (
        "starcoder refact smollm codeshell exaone minerva-7b mellum2",
        PreSplit(None, split_digits=True),
    ),
    ("command-r", PreSplit(None, split_digits=True, nfc=True)),
    ("falcon", PreSplit((r"[\p{P}$+<=>^~|`]+", _GPT2_WORDS, r"[0-9][0-9][0-9]"))),
    # GPT-4: up to three digits, contractions in any case
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0",
        PreSplit(_GPT4, ignore_merges=True, add_bos=True),
    ),
    ("smaug-bpe dbrx chatglm-bpe", PreSplit(_GPT4)),
    ("glm4 glm5", PreSplit(_GPT4, ignore_merges=True)),
    ("minicpm5", PreSplit((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), ignore_merges=True)),
    # GPT-4 with single digits
    (
        "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan f2llmv2",
        PreSplit(_cl100k(r"\p{N}"), nfc=True),
    ),
    ("kormo solar-open", PreSplit(_cl100k(r"\p{N}"))),
    (
        "qwen35",
        PreSplit(
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
            nfc=True,
        ),
    ),
    (
        "seed-coder",
        PreSplit(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"),
    ),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreSplit(rf"{_CONTRACTION}|{_LETTERS}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"),
    ),
    # GPT-4o: words end where upper case begins
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreSplit(_GPT4O)),
    ("tekken", PreSplit(_cased("", r"\p{N}"), ignore_merges=True, add_bos=True)),
    ("tiny_aya cohere2moe", PreSplit((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O))),
    # DeepSeek
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", PreSplit(_DEEPSEEK3)),
    (
        "deepseek-llm",
        PreSplit(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
                r"\s+$",
                _CJK,
                r"\p{N}+",
            ),
            word_ends="letters",
        ),
    ),
    (
        "deepseek-coder",
        PreSplit((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"), word_ends="letters"),
    ),
    # Words may have spaces inside; only digits are apart, in threes from the right.
    ("superbpe", PreSplit((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), word_ends="nowhere")),
)

PRE_SPLITS: dict[str, PreSplit] = {name: row for names, row in _ROWS for name in names.split()}


def pre_split(name: str) -> PreSplit:
    """The row for `tokenizer.ggml.pre` = name. Raises UnsupportedError for an unknown name."""
    try:
        return PRE_SPLITS[name]
    except KeyError:
        raise UnsupportedError(
            f"unknown tokenizer pre-split {name!r}", what=name, supported=PRE_SPLITS
        ) from None
