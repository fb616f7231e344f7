"""Vocabularies of files that lack what newer converters write, or name their end tokens badly."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import ALPHABET, CONTROL, NORMAL, USER, bpe, build, spm

from edge.errors import ModelFileError, UnsupportedError
from edge.tokenizer import Tokenizer
from edge.tokenizer.marks import END_MARKS
from edge.tokenizer.presplit import PRE_SPLITS

REFERENCE = Path(__file__).parent / "data" / "llamacpp_tokens.json"  # by make_tokens.py

TEXTS = (
    "Hello 12345 don't stop!!  (a+b)<=c\n\n  x",
    "  1 22 333 ½ é",
    "he<|im_end|>he</s>",
    "a<b>c|d~e^f",
    "tab\t\tx \n y",
)
#: What pre-splits cut in different ways, but for what they do not in llama.cpp: see presplit.py.
WORDS = (
    "I'm we'll SHE'S it'S he'd' 'til l'eau Tom\u2019s don't'",
    "1 12 123 1234 12345 1234567 x1234567, 3.14 0x1F 12ab \u0967\u0968\u0969\u096a \u00bd\u00b2",
    "camelCase HTTPServer iPhone XMLHttp ABCdef aBC \u01c5x \u02b0\u02b1",
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff0c\u3002 \u30c6\u30ad\u30b9\u30c8\u304b"
    "\u306a \ud55c\uad6d \uc5b4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 \u05e9\u05dc\u05d5\u05dd "
    "\u05e2\u05d5\u05dc\u05dd \u03a3\u03af\u03c2 \u10d0\u10d1",
    "\U0001f600 \U0001f468\u200d\U0001f469 \u2764\ufe0f!\U0001f600",
    "\n\n a\r\n\r\nb \r c\n \n\t\t\n  \n   d   e \t f  ",
    "{'k': [1, 2]};\n\t// x ==---//\n/y $a<=b|c^~`q` a_b _c_ #!%&*@",
    "a\u00a0b d\u200be\x0bf\x0cg\x00h\x1bi",
)
#: Rows in which llama.cpp cuts digits, and the cases of letters, in its own ways.
NOT_LLAMA_CPP = {"tiny_aya", "cohere2moe"}


def texts_of(case: str) -> tuple[str, ...]:
    """The texts of one of CASES."""
    return WORDS if case.startswith("pre: ") else TEXTS


def _neighbours(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges of any two to four neighbours in the texts: they show where a text was cut."""
    pairs = {}
    for text in texts:
        spelled = "".join(ALPHABET[b] for b in text.encode())
        for n in (2, 3, 4):
            for i in range(len(spelled) - n + 1):
                pairs[spelled[i : i + n - 1], spelled[i + n - 1]] = None
    return list(pairs)


def _bpe(texts: tuple[str, ...] = TEXTS, **fields: Any) -> dict[str, Any]:
    """A vocabulary in which a text's neighbours merge; ids of bos and eos from 256 on."""
    pairs = _neighbours(texts)
    joined = [text for text in dict.fromkeys(map("".join, pairs)) if text != "</s>"]
    metadata = bpe(bos_token_id=256, eos_token_id=257) | {
        "tokenizer.ggml.tokens": [*ALPHABET, "<|im_start|>", "<|im_end|>", "</s>", *joined],
        "tokenizer.ggml.token_type": [NORMAL] * 256 + [CONTROL] * 3 + [NORMAL] * len(joined),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return {key: value for key, value in metadata.items() if value is not None}


ORDER = ("▁", "he", "▁a", "lo", "llo", "▁x", "el", *"abcehloHx")
PIECES = {text: -float(i) for i, text in enumerate(ORDER)}
#: What a file may leave out, and what llama.cpp then makes of the texts above.
CASES = {
    "pre": _bpe(pre=None),
    "pre that says default": _bpe(pre="default"),
    "ids": _bpe(bos_token_id=None, eos_token_id=None),
    "types": _bpe(token_type=None),
    "add_bos": _bpe(pre="llama-bpe"),
    "nothing of SentencePiece": spm(PIECES),
    "ids of SentencePiece": spm(PIECES, bos_token_id=None, eos_token_id=None),
    "types of SentencePiece": spm(PIECES, token_type=None),
    **{f"pre: {name}": _bpe(WORDS, pre=name) for name in sorted({*PRE_SPLITS} - NOT_LLAMA_CPP)},
}


@cache
def made(case: str) -> Tokenizer:
    return Tokenizer.from_metadata(CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("special", [False, True])
def test_texts_are_taken_as_llama_cpp_does(case: str, special: bool) -> None:
    tokenizer = made(case)
    wanted = [pair[special] for pair in json.loads(REFERENCE.read_text())[case]]
    assert [tokenizer.encode(text, special=special) for text in texts_of(case)] == wanted


@pytest.mark.parametrize(
    ("case", "note"),
    [
        ("pre", "no tokenizer.ggml.pre: words are cut in a way that may not be the model's"),
        ("ids", "no tokenizer.ggml.eos_token_id: answers end at '</s>', '<|im_end|>'"),
        ("types", "no tokenizer.ggml.token_type: control tokens are known by their spelling alone"),
        ("types of SentencePiece", "no tokenizer.ggml.token_type: control tokens are known by"),
        ("pre that says default", None),
        ("add_bos", None),
        ("nothing of SentencePiece", None),
        ("ids of SentencePiece", None),  # <s> and </s> can be nothing else
    ],
)
def test_what_was_guessed_is_noted(case: str, note: str | None) -> None:
    notes = Tokenizer.from_metadata(CASES[case]).notes
    assert len(notes) == (note is not None)
    assert not notes or notes[0].startswith(note or "")


def test_scores_that_are_missing_follow_the_order() -> None:
    with_scores = Tokenizer.from_metadata(spm(PIECES))
    without = Tokenizer.from_metadata(spm(PIECES, scores=None))
    assert without.notes == (
        "no tokenizer.ggml.scores: pieces are joined in the order of the vocabulary",
    )
    for text in TEXTS:
        assert without.encode(text) == with_scores.encode(text)


def test_bytes_of_a_file_without_types_are_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(spm(PIECES, token_type=None))
    assert tokenizer.decode(tokenizer.encode("é\n")) == "é\n"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.is_special(0)


def test_gemma_names_its_tokens_otherwise() -> None:
    metadata = spm({}, bos_token_id=None, eos_token_id=None)
    metadata["tokenizer.ggml.tokens"][:3] = ["<pad>", "<eos>", "<bos>"]
    tokenizer = Tokenizer.from_metadata(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)


def test_bos_that_a_file_asks_for_and_does_not_name() -> None:
    tokenizer = build(pre="llama-bpe", eos_token_id=0)
    assert not tokenizer.add_bos
    assert tokenizer.notes == (
        "no tokenizer.ggml.bos_token_id: texts begin without the token that the model expects",
    )


def test_no_end_at_all_is_noted() -> None:
    assert build().notes == ("no tokenizer.ggml.eos_token_id: answers end at no token",)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suppress_tokens", [3]),
        ("normalizer.lowercase", True),
        ("remove_extra_whitespaces", True),
        ("add_sep_token", True),
    ],
)
def test_keys_that_would_make_other_tokens_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"tokenizer.ggml.{key} is .*not built"):
        build(**{key: value})
    assert build(**{key: type(value)()}).n_vocab == 256  # what it is without the key


# --- end marks ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER])
@pytest.mark.parametrize("mark", sorted(END_MARKS))
def test_a_mark_ends_a_turn_whatever_its_type(mark: str, kind: int) -> None:
    tokenizer = build(added=((mark, kind), ("<|x|>", CONTROL)), eos_token_id=257)
    assert tokenizer.eos_ids == {256, 257}
    assert tokenizer.decode([65, 256, 66]) == "AB"  # never in the text
    assert tokenizer.encode(mark, special=True, bos=False) == [256]
    assert 256 not in tokenizer.encode(mark)


def test_what_is_merged_from_letters_is_text() -> None:
    """Qwen's vocabularies have `</s>`, which HTML has, too."""
    options = {"merges": "<+/ </+s </s+>", "eos_token_id": 259}
    tokenizer = build(**options, added=(("<|x|>", CONTROL),))
    assert tokenizer.eos_ids == {259}
    assert tokenizer.decode([65, 258, 66]) == "A</s>B"
    assert build(**options | {"eos_token_id": 258}).eos_ids == {258}  # the file says it


def test_pieces_do_not_join_to_a_mark() -> None:
    tokenizer = Tokenizer.from_metadata(
        spm({**dict.fromkeys("<eos>", -9.0), "<e": -1.0, "<eos>": 0.0})
    )
    mark = tokenizer.n_vocab - 1
    assert mark in tokenizer.eos_ids
    assert mark not in tokenizer.encode("<eos>")


def test_several_end_ids() -> None:
    added = (("<A>", CONTROL), ("<B>", NORMAL))
    assert build(added=added, eos_token_ids=[256, 257]).eos_ids == {256, 257}
    with pytest.raises(ModelFileError, match="token 300 is outside the vocabulary of 258"):
        build(added=added, eos_token_ids=[256, 300])


@pytest.mark.parametrize("others", [("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>")])
def test_the_end_of_one_message_of_several_goes_on(others: tuple[str, ...]) -> None:
    added = tuple((text, CONTROL) for text in ("<|end|>", *others))
    assert build(added=added).eos_ids == {257, 258}
    assert build(added=added[:2]).eos_ids == {256, 257}


def test_html_in_gemmas_vocabulary_is_text() -> None:
    added = (("<eos>", CONTROL), ("</s>", USER))
    tokenizer = build(added=added)
    assert tokenizer.eos_ids == {256}
    assert tokenizer.decode(tokenizer.encode("a</s>b")) == "a</s>b"
    assert build(added=(("<eos>", CONTROL), ("</s>", CONTROL))).eos_ids == {256, 257}
