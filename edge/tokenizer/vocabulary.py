"""The vocabulary of a model, and the keys of a GGUF file that describe it, checked before use."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import repeat
from typing import Any

from edge.errors import ModelFileError, UnsupportedError, brief
from edge.tokenizer.cost import MOST_ADDED_BYTES, extent
from edge.tokenizer.marks import end_marks
from edge.tokenizer.presplit import pre_split

__all__ = ["MODELS", "TokenType", "Vocabulary", "byte_of", "named_token", "settle_control_tokens"]

#: Byte-level BPE; SentencePiece BPE by scores; the same by merges, as in Gemma 4.
MODELS = ("gpt2", "llama", "gemma4")
# Models that edge knows of and does not build.
_NOT_BUILT = {"bert": "WordPiece", "t5": "Unigram of SentencePiece"}
_PREFIX = "tokenizer.ggml."
_MOST_PIECE = 1024  # characters of a SentencePiece piece; its trainer's default is 16
_PRE_UNNAMED = "default"  # as llama.cpp, for byte-level BPE that names no `pre`
# How SentencePiece vocabularies spell tokens that a file does not name by id; the first one that
# the vocabulary has is taken.
_SPELLED = {"bos": ("<bos>", "<s>"), "eos": ("<eos>", "</s>")}
_UNKNOWN = "<unk>"
# Keys that are not built, because they change tokens or their probabilities, and the value with
# which they change nothing.
_NEUTRAL: dict[str, Any] = {
    "add_sep_token": False,
    "normalizer.lowercase": False,
    "normalizer.strip_accents": False,
    "remove_extra_whitespaces": False,
    "suppress_tokens": [],
}
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class TokenType(IntEnum):
    """The types of `tokenizer.ggml.token_type`; numbers as in the file."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2  # stands for characters that have no token
    CONTROL = 3  # marks turns and documents; ordinary text never becomes one
    USER_DEFINED = 4  # ordinary text that is always one token
    UNUSED = 5
    BYTE = 6  # one byte, spelled <0xNN>


@dataclass(frozen=True)
class Vocabulary:
    """tokens[i], types[i] (and scores[i]) describe token i; merges are best first.

    model: one of MODELS. scores: empty unless "llama"; merges: empty if "llama".
    end_ids: the tokens that end a turn, eos_id included. file: a tokenizer.json that says how text
    is cut and merged, instead of pre, scores and merges; None: there is none. steps: the file's
    steps before it merges. notes: a line for each key that the file lacks: its name and what was
    assumed instead. surplus: text -> whether it is special, of the file's added tokens for which
    the model has no row; a text that needs one is refused.
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
    steps: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    surplus: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], path: str, n_vocab: int | None = None
    ) -> Vocabulary:
        """Read and check the keys `tokenizer.ggml.*`.

        n_vocab: how many tokens there must be; counts are compared before any list is decoded.
        Raises ModelFileError for a key that is missing or wrong, UnsupportedError for an unknown
        `model` or `pre`.
        """
        fields = _Fields(metadata, path)
        model = fields.text("model")
        if model not in MODELS:
            known = f" ({_NOT_BUILT[model]}) is not built" if model in _NOT_BUILT else " is unknown"
            raise UnsupportedError(
                f"{path}: the tokenizer model {model!r}{known}", what=model, supported=MODELS
            )
        fields.check_neutral()
        is_spm, by_scores = is_sentencepiece(model), model == "llama"
        if n_vocab is not None:
            fields.check_count("tokens", n_vocab)
        tokens = fields.strings("tokens")
        if not tokens:
            raise fields.error("tokens", "the vocabulary is empty")
        pre = fields.text("pre", _PRE_UNNAMED)
        if not is_spm and "pre" not in fields:
            fields.note("pre", "words are cut in a way that may not be the model's")
        bos_id, eos_id = (fields.named_id(name, tokens, is_spm) for name in ("bos", "eos"))
        others = [fields.token_id(f"{name}_token_id", len(tokens)) for name in ("eot", "eom")]
        ends = {i for i in (eos_id, *others) if i is not None}
        ends |= fields.token_ids("eos_token_ids", len(tokens))
        types = fields.types(tokens, is_spm)
        merges = [] if by_scores else fields.merges()
        made = merges if "token_type" in fields else ()  # else only the spelling tells
        end_ids = settle_control_tokens(tokens, types, frozenset(ends), bos_id, made)
        if eos_id is None:
            ending = ", ".join(sorted(ascii(tokens[i]) for i in end_ids))
            fields.note("eos_token_id", f"answers end at {ending or 'no token'}")
        add_bos = fields.flag("add_bos_token", is_spm or pre_split(pre).add_bos)
        add_bos |= model == "gemma4"  # its first files say false, and answer nonsense without bos
        if add_bos and bos_id is None:
            fields.note("bos_token_id", "texts begin without the token that the model expects")
        vocabulary = cls(
            path=path,
            model=model,
            pre=pre,
            tokens=tokens,
            types=types,
            scores=fields.scores(len(tokens)) if by_scores else [],
            merges=merges,
            bos_id=bos_id,
            eos_id=eos_id,
            end_ids=end_ids,
            add_bos=add_bos and bos_id is not None,
            add_eos=fields.flag("add_eos_token", False) and eos_id is not None,
            space_prefix=by_scores and fields.flag("add_space_prefix", True),
            notes=tuple(fields.notes),
        )
        vocabulary._check_sizes(fields)
        return vocabulary

    @property
    def is_spm(self) -> bool:
        """Whether tokens are spelled as in SentencePiece."""
        return is_sentencepiece(self.model)

    def ids_of(self, *types: TokenType) -> list[int]:
        """The ids of all tokens of these types that have a text, in order. Not for type NORMAL."""
        return [i for i in self._uncommon if self.types[i] in types and self.tokens[i]]

    def _check_sizes(self, fields: _Fields) -> None:
        """Raise ModelFileError for texts with which building the tokenizer would take minutes, or
        more memory than was planned.
        """
        added = self.ids_of(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        n_bytes = sum(len(self.tokens[i].encode("utf-8", "replace")) for i in added)
        each, beyond = MOST_ADDED_BYTES
        if n_bytes > each * len(added) + beyond:
            raise fields.error(
                "tokens",
                f"{len(added)} control and user-defined tokens have {n_bytes} bytes: too much",
            )
        longest = max(self.tokens, key=len)
        if self.is_spm and len(longest) > _MOST_PIECE:
            raise fields.error(
                "tokens", f"a piece of {len(longest)} characters: at most {_MOST_PIECE}"
            )

    @cached_property
    def _uncommon(self) -> list[int]:
        """The ids of all tokens that are not NORMAL."""
        return [i for i, t in enumerate(self.types) if t != 1]


def settle_control_tokens(
    tokens: list[str],
    types: list[int],
    ends: frozenset[int],
    bos_id: int | None,
    merges: Iterable[tuple[str, str]],
) -> frozenset[int]:
    """Make bos and the end tokens control tokens in `types`, whatever type the file gave them.

    ends: the end tokens that the file names. merges: pairs that make ordinary text. Returns the ids
    of all tokens that end a turn.
    """
    if bos_id is not None:
        types[bos_id] = TokenType.CONTROL
    for i in ends:
        types[i] = TokenType.CONTROL
    marks = end_marks(
        tokens,
        lambda i: types[i] == TokenType.CONTROL,
        lambda text: any(left + right == text for left, right in merges),
    )
    for i in marks:
        types[i] = TokenType.CONTROL
    return ends | marks


def is_sentencepiece(model: str | None) -> bool:
    """Whether this model spells a space as U+2581, and a byte that has no other token as <0xNN>."""
    return model in ("llama", "gemma4")


def byte_of(text: str) -> int | None:
    """The byte that a SentencePiece token such as `<0x0A>` stands for; None for other tokens."""
    return int(text[3:5], 16) if _BYTE.fullmatch(text) else None


def named_token(metadata: Mapping[str, Any], path: str, name: str) -> str:
    """The text of the token `name`, "bos" or "eos"; "": there is none. Raises ModelFileError."""
    fields = _Fields(metadata, path)
    tokens = fields.strings("tokens") if "tokens" in fields else []
    token = fields.named_id(name, tokens, is_sentencepiece(metadata.get(f"{_PREFIX}model")))
    return "" if token is None else tokens[token]


class _Fields:
    """Typed access to the keys `tokenizer.ggml.*` of one file."""

    def __init__(self, metadata: Mapping[str, Any], path: str) -> None:
        self._metadata, self._path = metadata, path
        self.notes: list[str] = []

    def __contains__(self, key: str) -> bool:
        return _PREFIX + key in self._metadata

    def note(self, key: str, meaning: str) -> None:
        """Note that a key is missing, and the consequence."""
        self.notes.append(f"no {_PREFIX}{key}: {meaning}")

    def error(self, key: str, message: str) -> ModelFileError:
        return ModelFileError(message, path=self._path, field=_PREFIX + key)

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._metadata.get(_PREFIX + key, default)
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, kind):
            raise self.error(key, f"a {type(value).__name__} where another type belongs")
        return value

    def check_neutral(self) -> None:
        """Raise UnsupportedError for a key that is not built, unless its value changes nothing."""
        for key, neutral in _NEUTRAL.items():
            value = self._metadata.get(_PREFIX + key, neutral)
            if value != neutral:
                what = _PREFIX + key
                message = f"{what} is {brief(value)}, which is not built, but {neutral!r}"
                raise UnsupportedError(f"{self._path}: {message}", what=what)

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._get(key, str, default)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value: bool = self._get(key, bool, default)
        return value

    def token_id(self, key: str, n_vocab: int) -> int | None:
        """A token id; None: there is none. Some writers set all bits to say so."""
        if key not in self:
            return None
        value: int = self._get(key, int, None)
        if value in (-1, 0xFFFFFFFF):
            return None
        self._check_id(key, value, n_vocab)
        return value

    def token_ids(self, key: str, n_vocab: int) -> set[int]:
        """The ids of a list; none where the list is missing."""
        values = self._get(key, (list, tuple), [])
        if not set(map(type, values)) <= {int}:
            raise self.error(key, "an array of whole numbers belongs here")
        for value in values:
            self._check_id(key, value, n_vocab)
        return set(values)

    def named_id(self, name: str, tokens: list[str], is_spm: bool) -> int | None:
        """The id of bos or eos. Where the file has no key for it, a SentencePiece token is found by
        its spelling.

        llama.cpp takes the ids 1 and 2 there, which are the same tokens in Llama's vocabularies.
        In byte-level BPE it takes id 11, which is wrong in every vocabulary in use.
        """
        key = f"{name}_token_id"
        if key in self:
            return self.token_id(key, len(tokens))
        spelled = (text for text in _SPELLED[name] if is_spm and text in tokens)
        return next(map(tokens.index, spelled), None)

    def _check_id(self, key: str, value: int, n_vocab: int) -> None:
        if not 0 <= value < n_vocab:
            raise self.error(key, f"token {value} is outside the vocabulary of {n_vocab}")

    def strings(self, key: str) -> list[str]:
        values: Sequence[Any] = self._get(key, (list, tuple), None)
        if not set(map(type, values)) <= {str}:
            raise self.error(key, "an array of strings belongs here")
        return list(values)

    def types(self, tokens: list[str], is_spm: bool) -> list[int]:
        """The type of each token; where the file has none, the type that its spelling shows."""
        n = len(tokens)
        if "token_type" not in self:
            self.note("token_type", "control tokens are known by their spelling alone")
            kinds = [TokenType.NORMAL] * n
            for i, text in enumerate(tokens) if is_spm else ():
                if text == _UNKNOWN:
                    kinds[i] = TokenType.UNKNOWN
                elif byte_of(text) is not None:
                    kinds[i] = TokenType.BYTE
            return list(kinds)
        self.check_count("token_type", n)
        values: Sequence[Any] = self._get("token_type", (list, tuple), None)
        self._check_length("token_type", len(values), n)
        if not set(map(type, values)) <= {int, TokenType}:
            raise self.error("token_type", "an array of whole numbers belongs here")
        strange = set(values) - set(TokenType)
        if strange:
            raise self.error("token_type", f"unknown token type {min(strange)}")
        return list(values)

    def scores(self, n: int) -> list[float]:
        """The score of each token. Where the file has none, they fall from the first token on,
        because SentencePiece writes the best token first. (llama.cpp takes 0 for all, and then
        joins from the left.)
        """
        if "scores" not in self:
            self.note("scores", "pieces are joined in the order of the vocabulary")
            return [-float(i) for i in range(n)]
        self.check_count("scores", n)
        values: Sequence[Any] = self._get("scores", (list, tuple), None)
        self._check_length("scores", len(values), n)
        if not (set(map(type, values)) <= {float} and all(map(math.isfinite, values))):
            raise self.error("scores", "an array of finite float32 belongs here")
        return list(values)

    def merges(self) -> list[tuple[str, str]]:
        """The pairs of tokens. A merge is written "left right"; a byte-level token has no space."""
        merges = self.strings("merges")
        for i, n_spaces in enumerate(map(str.count, merges, repeat(" "))):
            if n_spaces != 1:
                raise self.error("merges", f"merge {i} is not a pair of tokens")
        sides = " ".join(merges).split(" ") if merges else []  # one split: 200,000 would be slow
        return list(zip(sides[::2], sides[1::2], strict=True))

    def check_count(self, key: str, n: int) -> None:
        """Raise ModelFileError for a list of another length than n, before it is decoded."""
        if length := extent(self._metadata, key)[0]:
            self._check_length(key, length, n)

    def _check_length(self, key: str, n: int, expected: int) -> None:
        if n != expected:
            what = "tokens, the model has" if key == "tokens" else "values, the tokens are"
            raise self.error(key, f"{n} {what} {expected}")
