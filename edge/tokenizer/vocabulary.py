"""The vocabulary of a model, and what a GGUF file says of it, checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import repeat
from typing import Any

from edge.errors import ModelFileError, UnsupportedError
from edge.tokenizer.presplit import pre_split

__all__ = ["MODELS", "TokenType", "Vocabulary", "settle_control_tokens"]

MODELS = ("gpt2", "llama")  # byte-level BPE; SentencePiece BPE with byte fallback
_PREFIX = "tokenizer.ggml."

# Control tokens that end a turn, for files that name only one of them by id.
_END_MARKERS = frozenset(
    {
        "</s>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
    }
)


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token; numbers as in the file."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2  # stands for what has no token
    CONTROL = 3  # marks turns and documents; never the meaning of ordinary text
    USER_DEFINED = 4  # ordinary text that is always one token
    UNUSED = 5
    BYTE = 6  # one byte, spelled <0xNN>


@dataclass(frozen=True)
class Vocabulary:
    """tokens[i], types[i] (and scores[i]) describe token i; merges are best first.

    model: one of MODELS. scores: empty unless "llama"; merges: empty unless "gpt2".
    end_ids: the tokens that end a turn, eos_id included. file: a tokenizer.json that says how text
    is cut and merged, in the place of pre, scores and merges; None: these do.
    """

    path: str
    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    bos_id: int | None
    eos_id: int | None
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    file: str | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> Vocabulary:
        """Read and check the keys `tokenizer.ggml.*`.

        Raises ModelFileError for what is missing or wrong, UnsupportedError for an unknown
        `model` or `pre`.
        """
        fields = _Fields(metadata, path)
        model = fields.text("model")
        if model not in MODELS:
            raise UnsupportedError(
                f"{path}: unknown tokenizer model {model!r}", what=model, supported=MODELS
            )
        pre = fields.text("pre", "default")
        add_bos = pre_split(pre).add_bos if model == "gpt2" else True
        tokens = fields.strings("tokens")
        if not tokens:
            raise fields.error("tokens", "the vocabulary is empty")
        ids = {
            key: fields.token_id(f"{key}_token_id", len(tokens))
            for key in ("bos", "eos", "eot", "eom")
        }
        ends = frozenset(i for key, i in ids.items() if key != "bos" and i is not None)
        types = fields.types(len(tokens))
        end_ids = ends | settle_control_tokens(tokens, types, ends, ids["bos"])
        return cls(
            path=path,
            model=model,
            pre=pre,
            tokens=tokens,
            types=types,
            scores=fields.scores(len(tokens)) if model == "llama" else [],
            merges=fields.merges() if model == "gpt2" else [],
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            end_ids=end_ids,
            add_bos=fields.flag("add_bos_token", add_bos) and ids["bos"] is not None,
            add_eos=fields.flag("add_eos_token", False) and ids["eos"] is not None,
            space_prefix=model == "llama" and fields.flag("add_space_prefix", True),
        )

    def ids_of(self, *types: TokenType) -> list[int]:
        """The ids of all tokens of these types that have a text, in order; not for NORMAL."""
        return [i for i in self._uncommon if self.types[i] in types and self.tokens[i]]

    @cached_property
    def _uncommon(self) -> list[int]:
        return [i for i, t in enumerate(self.types) if t != 1]


def settle_control_tokens(
    tokens: list[str], types: list[int], ends: frozenset[int], bos_id: int | None
) -> frozenset[int]:
    """Make bos and the end tokens control tokens in `types`, whatever type the file gave them.

    Returns the ids of the tokens that are spelled like an end of turn.
    """
    special = {int(TokenType.CONTROL), int(TokenType.USER_DEFINED)}
    named = frozenset(i for i, t in enumerate(types) if t in special and tokens[i] in _END_MARKERS)
    for i in named | ends:
        types[i] = TokenType.CONTROL
    if bos_id is not None:
        types[bos_id] = TokenType.CONTROL
    return named


class _Fields:
    """Typed access to the keys `tokenizer.ggml.*` of one file."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self._metadata, self._path = metadata, path

    def error(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self._path, field=_PREFIX + key)

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._metadata.get(_PREFIX + key, default)
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, kind):
            raise self.error(key, f"a {type(value).__name__} where another type belongs")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._get(key, str, default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._get(key, bool, default)
        return value

    def token_id(self, key: str, n_vocab: int) -> int | None:
        """A token id or None. All bits set is how some writers say that there is none."""
        if _PREFIX + key not in self._metadata:
            return None
        value: int = self._get(key, int, None)
        if value in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= value < n_vocab:
            raise self.error(key, f"token {value} is outside the vocabulary of {n_vocab}")
        return value

    def strings(self, key: str) -> list[str]:
        values: Sequence[Any] = self._get(key, (list, tuple), None)
        if not set(map(type, values)) <= {str}:
            raise self.error(key, "an array of strings belongs here")
        return list(values)

    def types(self, n: int) -> list[int]:
        values: Sequence[Any] = self._get("token_type", (list, tuple), [TokenType.NORMAL] * n)
        self._check_length("token_type", len(values), n)
        if not set(map(type, values)) <= {int, TokenType}:
            raise self.error("token_type", "an array of whole numbers belongs here")
        strange = set(values) - set(TokenType)
        if strange:
            raise self.error("token_type", f"unknown token type {min(strange)}")
        return list(values)

    def scores(self, n: int) -> list[float]:
        values: Sequence[Any] = self._get("scores", (list, tuple), None)
        self._check_length("scores", len(values), n)
        if not (set(map(type, values)) <= {float, int} and all(map(math.isfinite, values))):
            raise self.error("scores", "an array of finite numbers belongs here")
        return list(map(float, values))

    def merges(self) -> list[tuple[str, str]]:
        """Each merge is written "left right"; a byte-level token holds no space."""
        merges = self.strings("merges")
        for i, n_spaces in enumerate(map(str.count, merges, repeat(" "))):
            if n_spaces != 1:
                raise self.error("merges", f"merge {i} is not a pair of tokens")
        sides = " ".join(merges).split(" ") if merges else []  # one split: 200,000 are slow
        return list(zip(sides[::2], sides[1::2], strict=True))

    def _check_length(self, key: str, n: int, expected: int) -> None:
        if n != expected:
            raise self.error(key, f"{n} values for {expected} tokens")
