"""Long texts are encoded in pieces: the same tokens as those of the whole, and bounded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import ALPHABET, CHATML, CONTROL, NORMAL, PIECES, USER, bpe, by_merges, spm
from test_tokenizer_folder import PHI3, of_folder

from edge.errors import CancelledError, ContextError, InputError
from edge.native.cancel import Cancel
from edge.tokenizer import Tokenizer, pieces
from edge.tokenizer.pieces import GUARD
from edge.tokenizer.presplit import PRE_SPLITS

#: Characters whose neighbours matter: words, digits, apostrophes, marks, white space.
CHARACTERS = "aaabS1'\u2019. \n\t/<_\u05d0中\uff0cé\u0301\u00a0ー½\U0001f600▁" + GUARD
TEXT = st.lists(
    st.sampled_from([*CHARACTERS, *"   ab", "<think>", "<|im_end|>", "</s>", "<|user|>", "'s"]),
    max_size=40,
).map("".join)


def greedy(pre: str, **fields: Any) -> Tokenizer:
    """A byte-level BPE that merges whatever the pre-split leaves together."""
    letters = [ALPHABET[b] for b in b"abS1'. \n\t/<_"]
    pairs = list(product(letters, letters))
    merges = " ".join(f"{a}+{b}" for a, b in pairs)
    merges += "".join(f" {a}{b}+{c}" for (a, b), c in product(pairs[::3], letters[::2]))
    added = (*CHATML, ("b <", USER), ("a ", USER))
    return Tokenizer.from_metadata(bpe(merges, added, pre=pre, **fields))


#: Pieces with spaces in the middle, and with characters that are apart elsewhere.
SPACED = {**PIECES, "b▁": -1.5, "b▁a": -1.0, "1": -4.0, "▁1": -3.0, "a1": -2.0, "中": -5.0}
#: One name of each row.
ROWS = {row: name for name, row in reversed(PRE_SPLITS.items())}
TOKENIZERS = {
    **{name: greedy(name) for name in ROWS.values()},
    "gemma4": Tokenizer.from_metadata(by_merges("▁+a a+b b+▁ ▁a+b ab+▁a \n+\n \n\n+a 1+▁")),
    "spm": Tokenizer.from_metadata(spm(SPACED)),
    "spm-plain": Tokenizer.from_metadata(spm(SPACED, add_space_prefix=False)),
    "phi3": Tokenizer.from_metadata(
        spm(
            {**SPACED, **PHI3},
            token_type=[2, 3, 3] + [6] * 256 + [NORMAL] * len(SPACED) + [CONTROL] * 3 + [USER],
        )
    ),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pieces, "PIECE", 3)
    yield


def same(tokenizer: Tokenizer, text: str) -> None:
    for special, backend in ((False, "plain"), (True, "marked")):
        whole = getattr(tokenizer._backend, backend).encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=special, bos=False) == whole


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=75)
@given(text=TEXT)
def test_pieces_have_the_tokens_of_the_whole(name: str, text: str) -> None:
    same(TOKENIZERS[name], text)


@settings(deadline=None, max_examples=100)
@given(
    found=st.lists(st.text("ab1▁中", min_size=2, max_size=4), max_size=12, unique=True),
    text=st.text("aab1  中\n", max_size=40),
    prefix=st.booleans(),
)
def test_pieces_of_any_vocabulary(found: list[str], text: str, prefix: bool) -> None:
    merged = {piece: -float(i) for i, piece in enumerate(found)}
    vocabulary = {**merged, **dict.fromkeys("ab1▁", -99.0)}
    same(Tokenizer.from_metadata(spm(vocabulary, add_space_prefix=prefix)), text)


FOLDERS = {
    **{name: bpe("a+b ab+c", CHATML, pre=name) for name in ROWS.values() if name != "superbpe"},
    "spm": spm(SPACED),
    "gemma4": by_merges("▁+a a+b b+▁ ▁a+b"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_cut_too(name: str, tmp_path: Path) -> None:
    metadata = FOLDERS[name]
    tokenizer = of_folder(tmp_path, metadata)
    text = "ab 12 abc\n (ab) c'd 中\uff0ca " * 3
    same(tokenizer, text)
    assert len(list(tokenizer.pieces(text))) > 5


def test_superbpe_is_not_cut() -> None:
    """Its words are as long as the text."""
    assert len(list(TOKENIZERS["superbpe"].pieces("aaa S.S 1a " * 20))) == 1


@pytest.mark.parametrize("name", sorted({*TOKENIZERS} - {"superbpe"}))
def test_words_are_cut(name: str) -> None:
    assert len(list(TOKENIZERS[name].pieces("aaa S.S 1a " * 20))) >= 20


def test_spm_is_cut_without_spaces() -> None:
    assert len(list(TOKENIZERS["spm"].pieces("中中é" * 20))) > 10


def test_what_cannot_be_cut_is_refused() -> None:
    tokenizer, most = TOKENIZERS["gpt-2"], pieces.MOST_STRETCH
    assert len(tokenizer.encode("S " + "é" * (most // 2 - 10) + " S")) > 16000
    with pytest.raises(InputError, match="cannot be cut for 32 KiB from character 3 on"):
        tokenizer.encode("S S 1" + "é" * most)


def test_room() -> None:
    tokenizer = TOKENIZERS["gpt-2"]
    n = len(tokenizer.encode("é é " * 9))
    assert len(tokenizer.encode("é é " * 9, room=n)) == n
    with pytest.raises(ContextError) as caught:
        tokenizer.encode("é é " * 9, room=n - 1)
    assert (caught.value.needed, caught.value.limit) == (n, n - 1)


def test_what_cannot_fit_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = TOKENIZERS["gpt-2"], []
    monkeypatch.setattr(tokenizer._pieces, "of", lambda text: asked.append(text) or iter(()))
    longest = tokenizer.most_bytes(1)
    tokenizer.encode("a" * longest * 10, room=10)
    assert len(asked) == 1
    with pytest.raises(ContextError, match="at least 11 tokens, there is room for 10"):
        tokenizer.encode("a" * (longest * 10 + 1), room=10)
    assert len(asked) == 1


def test_cancel_is_heard_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, cancel, done = TOKENIZERS["gpt-2"], Cancel(), []
    of = tokenizer._pieces.of

    def watched(text: str) -> Iterator[Any]:
        for piece in of(text):
            done.append(piece)
            if len(done) == 3:
                cancel.set()
            yield piece

    monkeypatch.setattr(tokenizer._pieces, "of", watched)
    with pytest.raises(CancelledError):
        tokenizer.encode("S1 S1 " * 100, cancel=cancel)
    assert len(done) == 3
