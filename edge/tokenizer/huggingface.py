"""The vocabulary of a Hugging Face folder: tokenizer.json and tokenizer_config.json.

tokenizer.json says how a text is cut and merged; the package `tokenizers` reads that part itself
(see backend.py). This module reads the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import UnsupportedError, brief
from edge.files.json_file import JsonFile
from edge.tokenizer.pieces import SPM_SPACE
from edge.tokenizer.vocabulary import TokenType, Vocabulary, settle_control_tokens

__all__ = ["read_folder", "token_text"]

_MOST_BYTES = 96 << 20  # of tokenizer.json; the largest in use have about 35 MiB
_MOST_SURPLUS = 1024  # added tokens without a row in the model


def read_folder(folder: Path, n_vocab: int, bos_id: int | None, ends: Iterable[int]) -> Vocabulary:
    """The vocabulary of a folder, filled up with empty tokens to the n_vocab ids of the model.
    Added tokens with larger ids become its `surplus`.

    bos_id, ends: ids that the model's own files name; tokenizer_config.json may name more.
    Raises ModelFileError for files that are missing, damaged or contradict themselves,
    UnsupportedError for a tokenizer that is not BPE.
    """
    file = JsonFile.read(folder / "tokenizer.json", _MOST_BYTES)
    config = JsonFile.find(folder / "tokenizer_config.json")
    is_spm = _is_spm(file)
    tokens, types, surplus = _tokens(file, n_vocab, is_spm)
    ids = {token: i for i, token in enumerate(tokens) if token}

    def named(key: str, model_ids: Iterable[int]) -> list[int]:
        text = token_text(config, key)
        if text in surplus:
            raise file.error(key, f"{brief(text)} is outside the vocabulary of {n_vocab}")
        token_ids = [*model_ids, *([ids[text]] if text in ids else [])]
        for token in token_ids:
            if token >= n_vocab:
                raise file.error(key, f"token {token} is outside the vocabulary of {n_vocab}")
        return token_ids

    bos = named("bos_token", [] if bos_id is None else [bos_id])
    eos = named("eos_token", ends)
    bos_id = bos[0] if bos else None
    end_ids = settle_control_tokens(tokens, types, frozenset(eos), bos_id, _merges(file, is_spm))
    add_bos = config.get("add_bos_token", bool, _adds(file, tokens, bos_id))
    return Vocabulary(
        path=str(file.path),
        model="llama" if is_spm else "gpt2",
        pre="",
        tokens=tokens,
        types=types,
        scores=[],
        merges=[],
        bos_id=bos_id,
        eos_id=eos[0] if eos else None,
        end_ids=end_ids,
        add_bos=add_bos and bos_id is not None,
        add_eos=config.get("add_eos_token", bool, False) and bool(eos),
        space_prefix=is_spm and _puts_space(file),
        file=str(file.path),
        surplus=surplus,
        steps=(*_steps(file, "normalizer"), *_steps(file, "pre_tokenizer")),
    )


def token_text(config: JsonFile, key: str) -> str:
    """The text of the token that tokenizer_config.json names by `key`; "": it names none."""
    value = config.values.get(key)
    if isinstance(value, dict):
        return config.inside(key).get("content", str, "")
    return config.get(key, str, "")


def _is_spm(file: JsonFile) -> bool:
    """Whether the vocabulary is SentencePiece's, not of bytes. Raises UnsupportedError for others.

    SentencePiece spells a space as U+2581.
    """
    kind = file.inside("model").get("type", str, "BPE")
    parts = ("pre_tokenizer", "decoder", "normalizer")
    steps = [step for part in parts for step in _steps(file, part)]
    if kind == "BPE":
        if any(step.get("type") == "ByteLevel" for step in steps):
            return False
        if any(step.get("type") == "Metaspace" or SPM_SPACE in str(step) for step in steps):
            return True
    raise UnsupportedError(
        f"{file.path}: a tokenizer of another kind, {brief(kind)}",
        what=f"tokenizer {kind}",
        supported=["BPE of bytes", "BPE of SentencePiece"],
    )


def _merges(file: JsonFile, is_spm: bool) -> list[tuple[str, str]]:
    """The pairs of byte-level BPE, in both spellings of the format; none of SentencePiece, whose
    control tokens are merged from letters, too.
    """
    merges = [] if is_spm else file.inside("model").get("merges", list, [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [
        (pair[0], pair[1])
        for pair in pairs
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(s, str) for s in pair)
    ]


def _steps(file: JsonFile, part: str) -> Iterator[dict[str, Any]]:
    """A part of the file, and the steps inside it where it is a sequence of steps."""
    whole = file.get(part, dict, {})
    inner: Any = next(
        (whole[k] for k in ("pretokenizers", "decoders", "normalizers") if k in whole), []
    )
    for step in (whole, *(inner if isinstance(inner, list) else ())):
        if isinstance(step, dict):
            yield {k: v for k, v in step.items() if v is not inner}


def _puts_space(file: JsonFile) -> bool:
    """Whether encoding puts a space before a text."""
    for step in (*_steps(file, "normalizer"), *_steps(file, "pre_tokenizer")):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return scheme != "never" if scheme is not None else bool(step.get("add_prefix_space"))
    return False


class _Tokens(NamedTuple):
    """texts, types: of each id; an id without a token is UNUSED and has no text. surplus: text ->
    whether it is special, of the added tokens from n_vocab on.
    """

    texts: list[str]
    types: list[int]
    surplus: dict[str, bool]


def _tokens(file: JsonFile, n_vocab: int, is_spm: bool) -> _Tokens:
    """The tokens of tokenizer.json. Raises ModelFileError for a bad one."""
    tokens, types = [""] * n_vocab, [int(TokenType.UNUSED)] * n_vocab
    surplus = dict[str, bool]()

    def put(text: Any, token: Any, kind: TokenType, where: str) -> None:
        if not isinstance(text, str) or isinstance(token, bool) or not isinstance(token, int):
            raise file.error(where, f"{brief(text)} with the id {brief(token)}")
        if token >= n_vocab and where == "added_tokens" and len(surplus) < _MOST_SURPLUS:
            surplus[text] = kind != TokenType.USER_DEFINED
            return
        if not 0 <= token < n_vocab:
            raise file.error(where, f"token {token}, the model has {n_vocab}")
        tokens[token], types[token] = text, int(kind)

    model = file.inside("model")
    unknown = model.values.get("unk_token")
    for text, token in model.get("vocab", dict, {}).items():
        is_byte = is_spm and len(text) == 6 and text.startswith("<0x")
        kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        put(text, token, TokenType.UNKNOWN if text == unknown else kind, "model.vocab")
    for added in file.get("added_tokens", list, []):
        if not isinstance(added, dict):
            raise file.error("added_tokens", f"{brief(added)} is no token")
        kind = TokenType.CONTROL if added.get("special") is True else TokenType.USER_DEFINED
        if added.get("content") == unknown:
            kind = TokenType.UNKNOWN
        put(added.get("content"), added.get("id"), kind, "added_tokens")
    if not any(tokens):
        raise file.error("model.vocab", "the vocabulary is empty")
    return _Tokens(tokens, types, surplus)


def _adds(file: JsonFile, tokens: list[str], bos_id: int | None) -> bool:
    """Whether the file's post-processor begins a text with the bos token."""
    if bos_id is None:
        return False
    whole = file.get("post_processor", dict, {})
    steps = whole.get("processors", [whole])
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict) and special.get("id") == tokens[bos_id]:
            return True
    return False
