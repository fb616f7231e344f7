"""edge.tokenizer: what the metadata says is what text becomes, and back."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import InputError, ModelFileError, UnsupportedError
from edge.tokenizer import Tokenizer
from edge.tokenizer.pieces import GUARD
from edge.tokenizer.presplit import PRE_SPLITS
from edge.tokenizer.spelling import _BYTES
from edge.tokenizer.vocabulary import TokenType

ALPHABET = sorted(_BYTES, key=lambda c: _BYTES[c])  # byte b is spelled ALPHABET[b], and is id b
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = (int(t) for t in list(TokenType)[1:])


def bpe(merges: str = "", added: tuple[tuple[str, int], ...] = (), **fields: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE: 256 bytes, the merges (left+right, in order), added tokens."""
    pairs = [m.split("+") for m in merges.split()]
    tokens = [*ALPHABET, *("".join(p) for p in pairs), *(text for text, _ in added)]
    types = [NORMAL] * (256 + len(pairs)) + [kind for _, kind in added]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": types,
        "merges": [" ".join(p) for p in pairs],
        **fields,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def spm(pieces: dict[str, float], **fields: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece BPE: unk, bos, eos, 256 bytes, the pieces with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + list(pieces.values()),
        "token_type": [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **fields,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def by_merges(merges: str = "", **fields: Any) -> dict[str, Any]:
    """Metadata of Gemma 4's kind of BPE: pad, eos, bos, unk, 256 bytes, letters, then merges."""
    pairs = [m.split("+") for m in merges.split(" ") if m]
    letters = dict.fromkeys(["▁", "\n", "a", "b", *(c for pair in pairs for c in "".join(pair))])
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += dict.fromkeys([*letters, *("".join(p) for p in pairs)])
    metadata = {
        "model": "gemma4",
        "tokens": tokens,
        "token_type": [CONTROL] * 4 + [BYTE] * 256 + [NORMAL] * (len(tokens) - 260),
        "merges": [" ".join(p) for p in pairs],
        "bos_token_id": 2,
        "eos_token_id": 1,
        **fields,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


CHATML = (("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL), ("<think>", USER))
PIECES = {"▁": -9.0, "a": -8.0, "b": -7.0, "▁a": -2.0, "ab": -1.0, "▁ab": -3.0, "▁▁": -4.0}


def words(tokenizer: Tokenizer, text: str, **options: Any) -> list[str]:
    return [tokenizer.token_text(i) for i in tokenizer.encode(text, **options)]


def build(**fields: Any) -> Tokenizer:
    return Tokenizer.from_metadata(bpe(**fields))


# --- byte-level BPE -------------------------------------------------------------------------


def test_merges_apply_in_their_order() -> None:
    assert words(build(merges="a+b b+c ab+c"), "abc") == ["abc"]
    assert words(build(merges="b+c a+b"), "abc") == ["a", "bc"]


def test_bytes_are_the_first_tokens() -> None:
    assert build().encode("é\n") == [0xC3, 0xA9, 0x0A]


WORDS = {  # which of these are one word, so that they merge: per pre-split
    "12": ("gpt-2", "llama-bpe", "gpt-4o"),
    "1234": ("gpt-2",),
    "'S": ("llama-bpe", "qwen2", "gpt-4o"),
    "!\n": ("llama-bpe", "qwen2", "gpt-4o"),
    "!\n/": ("gpt-4o",),
    "n't": ("gpt-4o",),
    "aB": ("gpt-2", "smollm", "llama-bpe", "qwen2"),
    "Ab": ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o"),
    "a's": ("gpt-4o",),
    "\ta": ("llama-bpe", "qwen2", "gpt-4o"),
    "क्": ("gpt-4o",),  # a letter and a combining mark
}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o"])
@pytest.mark.parametrize("text", WORDS)
def test_pre_split(pre: str, text: str) -> None:
    spelled = "".join(ALPHABET[b] for b in text.encode())
    merges = " ".join(f"{spelled[:i]}+{spelled[i]}" for i in range(1, len(spelled)))
    tokenizer = build(merges=merges, pre=pre)
    assert (words(tokenizer, text) == [text]) == (pre in WORDS[text])


@pytest.mark.parametrize("pre", PRE_SPLITS)
def test_every_pre_split_keeps_every_character(pre: str) -> None:
    text = "  Hi\t\r\n\n 12345 don't สวัสดี नमस्ते\u200d \U0001f9d1\u200d\U0001f680 ½ﬁ...//\n x"
    tokenizer = build(pre=pre)
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_unknown_pre_lists_the_known() -> None:
    with pytest.raises(UnsupportedError, match=r"klingon.*gpt-2.*gpt-4o"):
        build(pre="klingon")


@pytest.mark.parametrize("pre", ["qwen2", "deepseek-r1-qwen", "qwen35", "stablelm2", "command-r"])
def test_characters_are_composed_first(pre: str) -> None:
    assert build(pre=pre).encode("e\u0301") == [0xC3, 0xA9]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "gpt-4o", "deepseek-v3", "dbrx"])
def test_characters_are_left_as_they_are(pre: str) -> None:
    tokenizer = build(pre=pre)
    assert tokenizer.encode("e\u0301") == [0x65, 0xCC, 0x81]


@pytest.mark.parametrize(
    ("pre", "whole"),
    [
        *((pre, True) for pre in ("llama-bpe", "falcon3", "lfm2", "glm4", "tekken", "minicpm5")),
        *((pre, False) for pre in ("gpt-4o", "chatglm-bpe", "dbrx", "smaug-bpe", "qwen2")),
    ],
)
def test_words_that_are_tokens_stay_whole(pre: str, whole: bool) -> None:
    tokenizer = build(pre=pre, added=(("abc", NORMAL),))
    assert words(tokenizer, "abc") == (["abc"] if whole else ["a", "b", "c"])


def cut(pre: str, text: str) -> list[str]:
    """The words of a text, by a vocabulary in which any two neighbours merge."""
    spelled = "".join(ALPHABET[b] for b in text.encode())
    spans = combinations(range(len(spelled) + 1), 3)
    merges = {f"{spelled[i:j]}+{spelled[j:k]}" for i, j, k in spans}
    return words(build(merges=" ".join(sorted(merges)), pre=pre), text, bos=False)


CUTS = {  # beside those that llama.cpp cuts in the same way: see test_tokenizer_files.py
    ("gpt-4o", "ÉTÉété"): ["ÉTÉété"],
    ("gpt-4o", "étéÉTÉ"): ["été", "ÉTÉ"],
    ("tekken", "étéÉTÉ12"): ["été", "ÉTÉ", "1", "2"],
    ("tekken", "कि it's"): ["कि", " it", "'s"],
    ("llama-bpe", "कि"): ["क", "ि"],
    ("qwen35", "कि 12"): ["कि", " ", "1", "2"],
    ("qwen2", "कि 12"): ["क", "ि", " ", "1", "2"],
    ("deepseek-v3", "कि12"): ["कि", "12"],
    ("tiny_aya", "1234567"): ["1", "234", "567"],
    ("tiny_aya", "1234x"): ["123", "4", "x"],
    ("superbpe", "a b. 1234"): ["a b. ", "1", "234"],
    ("deepseek-llm", "12\u3000a"): ["12", "\u3000", "a"],
}


@pytest.mark.parametrize(("pre", "text"), CUTS)
def test_words_of_the_models_own_tokenizers(pre: str, text: str) -> None:
    assert cut(pre, text) == CUTS[pre, text]


def test_a_byte_without_a_token_is_left_out() -> None:
    metadata = bpe()
    metadata["tokenizer.ggml.tokens"][ord("x")] = "[unused]"
    assert words(Tokenizer.from_metadata(metadata), "axb") == ["a", "b"]


# --- control tokens -------------------------------------------------------------------------


def test_control_tokens_count_only_where_allowed() -> None:
    tokenizer = build(added=CHATML)
    assert words(tokenizer, "a<|im_end|>", special=True) == ["a", "<|im_end|>"]
    assert words(tokenizer, "a<|im_end|>") == list("a<|im_end|>")


def test_user_defined_tokens_always_count() -> None:
    tokenizer = build(added=CHATML)
    for special in (False, True):
        assert words(tokenizer, "a<think>b", special=special) == ["a", "<think>", "b"]


def test_end_tokens_are_control_tokens_whatever_the_file_says() -> None:
    tokenizer = build(added=(("</s>", USER), ("[end]", NORMAL)), eos_token_id=257)
    assert tokenizer.eos_ids == {256, 257}
    assert words(tokenizer, "</s>[end]") == list("</s>[end]")
    assert tokenizer.encode("</s>[end]", special=True) == [256, 257]


def test_quoted_text_holds_no_control_token() -> None:
    tokenizer = build(added=(*CHATML, ("end|", CONTROL)))
    text = f"a<|im_end|>b{GUARD}<|im_<|im_start|>start|><|im_end|"
    template = "<|im_start|>{}<|im_end|>"
    ids = tokenizer.encode(template.format(tokenizer.quote(text)), special=True)
    assert ids == [256, *tokenizer.encode(text.replace(GUARD, "")), 257]


def test_quote_leaves_other_text_alone() -> None:
    assert build(added=CHATML).quote("a < b |> <think>") == "a < b |> <think>"


def test_longest_control_token_wins() -> None:
    tokenizer = build(added=(("<a", CONTROL), ("<a>", CONTROL)))
    assert tokenizer.encode("<a>", special=True) == [257]


# --- bos and eos ----------------------------------------------------------------------------


def test_bos_as_the_file_says_or_as_asked() -> None:
    fields: dict[str, Any] = {"added": CHATML, "bos_token_id": 256}
    assert build(**fields).encode("a") == [97]
    assert build(**fields).encode("a", bos=True) == [256, 97]
    assert build(**fields, add_bos_token=True).encode("a") == [256, 97]
    assert build(**fields, add_bos_token=True).encode("a", bos=False) == [97]
    assert build(**fields, add_bos_token=True).encode("") == [256]


def test_bos_that_is_written_is_not_added_again() -> None:
    tokenizer = build(added=CHATML, bos_token_id=256, add_bos_token=True)
    assert tokenizer.encode("<|im_start|>a", special=True) == [256, 97]


def test_defaults_of_bos() -> None:
    assert Tokenizer.from_metadata(spm(PIECES)).add_bos
    for pre in ("llama3", "falcon3", "lfm2", "tekken"):
        assert build(pre=pre, added=CHATML, bos_token_id=256).add_bos
    for pre in ("qwen2", "glm4", "gpt-4o", "dbrx"):
        assert not build(pre=pre, added=CHATML, bos_token_id=256).add_bos
    assert not build(pre="llama3").add_bos  # there is none to add
    assert not build(added=CHATML, bos_token_id=256).add_bos


def test_all_ends_of_turn() -> None:
    added = tuple((t, CONTROL) for t in ("<A>", "<B>", "<C>", "<|im_end|>"))
    ids = {"eos_token_id": 256, "eot_token_id": 257, "eom_token_id": 258}
    tokenizer = build(added=added, **ids)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (256, {256, 257, 258, 259})


def test_eos_is_never_added() -> None:
    tokenizer = build(added=CHATML, eos_token_id=257, add_eos_token=True)
    assert tokenizer.add_eos and tokenizer.encode("a") == [97]


# --- SentencePiece --------------------------------------------------------------------------


def sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """The referee: join the neighbours with the best score, leftmost first, until none join."""
    tokens, scores = (metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores"))
    ids = {t: i for i, t in enumerate(tokens) if i >= 259}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        unions = map("".join, pairwise(parts))
        joins = [(-scores[ids[u]], i) for i, u in enumerate(unions) if u in ids]
        if not joins:
            break
        i = min(joins)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for p in parts for i in ([ids[p]] if p in ids else [b + 3 for b in p.encode()])]


@settings(deadline=None)
@given(st.text("ab é\n", max_size=30))
def test_spm_is_sentencepiece(text: str) -> None:
    assert SPM.encode(text, bos=False) == sentencepiece(spm(PIECES), text)


SPM = Tokenizer.from_metadata(spm(PIECES))


def test_spm_joins_by_score_not_by_order() -> None:
    assert words(SPM, "ab", bos=False) == [" ab"]
    other = Tokenizer.from_metadata(spm({**PIECES, "▁a": -0.5}))
    assert words(other, "ab", bos=False) == [" ab"]
    assert words(SPM, "aab", bos=False) == [" a", "ab"]


def test_spm_spells_unknown_characters_in_bytes() -> None:
    assert SPM.encode("é", bos=False) == [259, 3 + 0xC3, 3 + 0xA9]


def test_spm_without_space_prefix() -> None:
    tokenizer = Tokenizer.from_metadata(spm(PIECES, add_space_prefix=False))
    assert words(tokenizer, "ab", bos=False) == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab", bos=False)) == " ab"


def test_spm_continued_text_keeps_its_space() -> None:
    ids = SPM.encode("a a", bos=False)
    assert SPM.decode(ids) == "a a"
    assert SPM.decoder(after=ids[0]).push(ids[1]) == " a"
    assert SPM.decoder(after=SPM.bos_id).push(ids[1]) == "a"


def test_spm_marks_give_back_what_was_put_in() -> None:
    ids = SPM.encode("a<s> b</s>a", special=True, bos=False)
    assert SPM.decode(ids, special=True) == "a<s> b</s>a"
    assert SPM.decode(ids) == "a ba"


def test_phi3_marks_swallow_the_space_after_them() -> None:
    marks = ("<|user|>", "<|assistant|>", "<|end|>")
    metadata = spm({**PIECES, **dict.fromkeys(marks, -100.0)})
    metadata["tokenizer.ggml.token_type"][-3:] = [CONTROL] * 3
    tokenizer = Tokenizer.from_metadata(metadata)
    with_space = tokenizer.encode("<|user|>\n a<s>\n", special=True)
    assert with_space == tokenizer.encode("<|user|>a<s>\n", special=True)
    assert with_space[-1] == 3 + ord("\n")


# --- Gemma 4: SentencePiece's spelling, merges in their order --------------------------------

GEMMA4 = Tokenizer.from_metadata(by_merges("▁+a a+b ▁a+b \n+\n \n\n+\n"))


def test_gemma4_merges_in_their_order_across_words() -> None:
    assert words(GEMMA4, "ab ab", bos=False) == ["ab", " ab"]
    other = Tokenizer.from_metadata(by_merges("b+▁ b▁+a a+b"))
    assert words(other, "ab ab", bos=False) == ["a", "b a", "b"]


def test_gemma4_joins_new_lines() -> None:
    assert words(GEMMA4, "a\n\n\nb\n\n", bos=False) == ["a", "\n\n\n", "b", "\n\n"]


def test_gemma4_spells_unknown_characters_in_bytes() -> None:
    ids = GEMMA4.encode("é\0", bos=False)
    assert ids == [4 + 0xC3, 4 + 0xA9, 4]
    decoder = GEMMA4.decoder()
    assert [decoder.push(i) for i in ids] == ["", "é", "\0"]
    assert [decoder.push(4 + 0xE2), decoder.push(260)] == ["", "\ufffd "]


def test_gemma4_begins_with_bos_whatever_the_file_says() -> None:
    for said in (None, True, False):
        tokenizer = Tokenizer.from_metadata(by_merges("", add_bos_token=said))
        assert tokenizer.add_bos and tokenizer.encode("a") == [2, 262]
    named = by_merges("", bos_token_id=None, eos_token_id=None)
    tokenizer = Tokenizer.from_metadata(named)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1)


def test_gemma4_puts_no_space_before_a_text() -> None:
    tokenizer = Tokenizer.from_metadata(by_merges("▁+a", add_space_prefix=True))
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"
    assert tokenizer.encode("a", bos=False) == [262]


def test_gemma4_needs_merges() -> None:
    metadata = by_merges()
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(ModelFileError, match="missing"):
        Tokenizer.from_metadata(metadata)


# --- back to text ---------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=40))
def test_round_trip(text: str) -> None:
    for tokenizer in (BPE, SPM, GEMMA4):
        if "▁" not in text:  # SentencePiece cannot tell it from a space
            assert tokenizer.decode(tokenizer.encode(text)) == text


BPE = build(merges="a+b Ġ+a", added=CHATML, eos_token_id=259)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=30))
def test_stream_gives_whole_characters(ids: list[int]) -> None:
    decoder = BPE.decoder()
    pieces = [decoder.push(i) for i in ids]
    text = "".join(pieces) + decoder.flush()
    assert text == BPE.decode(ids)
    if not any(map(BPE.is_special, ids)):
        assert text == b"".join(map(BPE.token_bytes, ids)).decode("utf-8", "replace")


def test_emoji_comes_in_one_piece() -> None:
    decoder = BPE.decoder()
    assert [decoder.push(b) for b in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert decoder.flush() == ""


def test_hopeless_bytes_do_not_hold_up_the_stream() -> None:
    decoder = BPE.decoder()
    assert [decoder.push(b) for b in b"\xff\xf0\x9fa"] == ["\ufffd", "", "", "\ufffda"]


def test_unfinished_character_ends_with_flush_or_mark() -> None:
    decoder = BPE.decoder()
    assert [decoder.push(0xF0), decoder.flush(), decoder.flush()] == ["", "\ufffd", ""]
    assert [decoder.push(0xF0), decoder.push(259)] == ["", "\ufffd"]


def test_control_tokens_are_hidden_unless_asked_for() -> None:
    ids = BPE.encode("a<|im_end|><think>", special=True)
    assert BPE.decode(ids) == "a<think>"
    assert BPE.decode(ids, special=True) == "a<|im_end|><think>"


def test_token_bytes_and_text() -> None:
    assert BPE.token_bytes(0xC3) == b"\xc3" and BPE.token_text(0xC3) == "\ufffd"
    assert BPE.token_bytes(257) == b" a"
    assert SPM.token_bytes(3 + 0xC3) == b"\xc3" and SPM.token_text(262) == " a"


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 1000])
def test_bad_id(token: int) -> None:
    with pytest.raises(InputError, match="outside the vocabulary"):
        BPE.decode([token])


def test_text_that_is_not_unicode() -> None:
    with pytest.raises(InputError, match="surrogate"):
        BPE.encode("a\udc80")


BAD = {
    "model": [None, 3],
    "pre": [3, ["gpt-2"]],
    "tokens": [None, [], "abc", [1, 2], [*ALPHABET, b"x"]],
    "token_type": [[1], "x", ["1"] * 257, [1.0] * 257, [9] * 257, [[]] * 257],
    "merges": [None, ["ab"], ["a b c"], ["a zz"], [3], ["a c"]],
    "bos_token_id": [-5, 257, 1 << 40, "x", [1]],
    "eos_token_id": [257, 1.0],
    "eot_token_id": [257],
    "add_bos_token": [1, "yes"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_bad_metadata_names_its_field(key: str, value: Any) -> None:
    field = f"tokenizer.ggml.{key}"
    metadata = {**bpe("a+b"), field: value}
    if value is None:
        del metadata[field]
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_metadata(metadata, "x.gguf")
    assert (caught.value.path, caught.value.field) == ("x.gguf", field)
    assert "\n" not in str(caught.value)


def test_a_merge_that_makes_no_token(capfd: pytest.CaptureFixture[str]) -> None:
    metadata = bpe("a+b", tokens=["a", "b"], token_type=None)
    with pytest.raises(ModelFileError, match="the merge of 'a' and 'b' makes no token"):
        Tokenizer.from_metadata(metadata)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("scores", [[1.0], ["x"] * 266, [float("nan")] * 266, [0] * 266])
def test_bad_scores(scores: Any) -> None:
    with pytest.raises(ModelFileError, match="scores"):
        Tokenizer.from_metadata(spm(PIECES, scores=scores))


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("bert", r"'bert' \(WordPiece\) is not built"),
        ("t5", r"'t5' \(Unigram of SentencePiece\) is not built"),
        ("rwkv", "'rwkv' is unknown"),
    ],
)
def test_models_that_are_not_built(model: str, what: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"{what}.*gpt2, llama, gemma4"):
        build(model=model)


def test_all_bits_set_means_no_token() -> None:
    assert build(bos_token_id=0xFFFFFFFF).bos_id is None


def test_missing_types_are_normal() -> None:
    assert not build(token_type=None).is_special(0)


# --- the package ----------------------------------------------------------------------------


def test_import_is_light() -> None:
    code = "import sys, edge.tokenizer, edge.template.template\n"
    code += "print({'tokenizers', 'jinja2'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_threads_share_a_tokenizer() -> None:
    wrong: list[str] = []

    def work(i: int) -> None:
        text = f"ab {i} <|im_end|>" * 50
        for special in (True, False):
            if BPE.decode(BPE.encode(text, special=special), special=True) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.model
def test_smollm2(smollm2: Path) -> None:
    from edge.files.gguf import GGUF

    with GGUF.open(smollm2) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata, gguf.path)
    assert tokenizer.n_vocab == 49152
    assert tokenizer.eos_ids == {0, 2, 4}  # the last: <reponame>, where another file begins
    assert words(tokenizer, "It's 2024, hello") == [
        "It",
        "'s",
        " ",
        "2",
        "0",
        "2",
        "4",
        ",",
        " hello",
    ]
    assert tokenizer.encode("<|im_start|>user\n", special=True) == [1, 4093, 198]
    text = "def f(x):\n    return 'नमस्ते 😀'\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
