"""Compare edge's tokens with those of real vocabularies' own tokenizers. The vocabularies are too
large for this repository, so this is run by hand:

    python tests/compare_tokenizers.py vectors FOLDER
        FOLDER has the files ggml-vocab-NAME.gguf, .inp and .out of llama.cpp's `models/`: texts,
        and the tokens that each model's own tokenizer makes of them. Of qwen35's, three texts
        differ: their tokens are llama.cpp's, which composes no characters.
    python tests/compare_tokenizers.py json MODEL PRE tokenizer.json
        A tokenizer.json as metadata of a GGUF file, with this `tokenizer.ggml.model` and `.pre`,
        against the same file read by the package `tokenizers`.
    python tests/compare_tokenizers.py file model.gguf tokenizer.json
        The vocabulary of a GGUF file against the tokenizer.json of its model. Texts with a token
        that the file lacks, or takes for a control token, are left out.

Prints each text whose tokens differ; exit code 1 if there is one.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from edge.files.gguf import GGUF
from edge.tokenizer import Tokenizer
from edge.tokenizer.vocabulary import TokenType

#: Texts with what pre-splits, merges and normalisers treat apart.
HARD = (
    "",
    " ",
    "Hello world",
    " Hello  World!!  \n",
    "1 12 123 1234 12345 123456 1234567 3.14 1,000,000 0x1F 12ab 1234_ \u0967\u0968\u0969"
    "\u096a \u00bd\u00b2",
    "I'm you'll we've he'D SHE'S it'S don't 'Tis O'Brien's l'eau \u2019s '\u017f",
    "camelCaseWord HTTPServer iPhone McDonald XMLHttpRequest ABCdef aBC",
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e\uff0c\u3002\uff01 "
    "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f \u0645\u0631\u062d"
    "\u0628\u0627\u064b \u05e9\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd",
    "e\u0301 a\u0308 o\u0302\u0301 \u212b \ufb01 \u1100\u1161 n\u0303o",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f636\u200d\U0001f32b"
    "\ufe0f\U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f",
    "\n\n\n a\r\n\r\nb \r c\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "\n" * 45 + " x",
    "\t\ttabs\tand\t \tspaces   \t   end   ",
    "    indented = { 'k': [1, 2], \"x\": f(y)->z };\n\t// comment ======---//\n#!/usr/bin/env\n/",
    "\u00a0no-break\u2003em\u3000wide\u200bzero\u0085next\x0bvt\x0cff",
    "a\u2581b \u2581 \u2581\u2581x",
    "NUL \x00 \x01\x1b[31m \x7f \u00ad \ufeff \uffff \U0010ffff \ue000",
    "\u0439\u0446\u0443\u043a\u0415\u041d \u041f\u0440\u0438\u0432\u0435\u0442 "
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u01c5 \u02b0\u02b1 \u10d0\u10d1 "
    "\u13a0",
    "https://a.b/c?d=e&f=%20#g user@host.org C:\\dir\\f.txt $HOME/.x ~/y |z| `q`",
    "!!!???...,,,;;;:::---___***///\\\\\\'''\"\"\"((()))[[[]]]{{{}}}<<<>>>",
    "a" * 300 + " " * 100 + "b",
    "<0x0A> <unk> [PAD] <s></s><|x|>",
)
_POOL = (
    "aabcABz019 \t\n\r  '\".,!?-_/\\<>|{}()$+=^~`\u00e9\u00df\u0130\u01c5\u02b0\u0301\u0308"
    "\u093f\u094d\u0928\u0e01\u0e31"
    "\u17cb\u4e2d\u65e5\u3042\u30a2\uac00\u3001\uff01\u2019\u2026\u2581\u00a0\u3000\u200d"
    "\ufe0f\U0001f600\u00bd\u0967\u05d0\u0391"
)


def texts(tokens: list[str]) -> Iterator[str]:
    """The hard texts, marks in a text, random characters and random tokens, the same each time."""
    yield from HARD
    chosen = random.Random(1)
    words = [token.replace("\u0120", " ").replace("\u2581", " ") for token in tokens if token]
    marks = [token for token in tokens if token[:1] in "<[" and token[-1:] in ">]"] or ["<x>"]
    for _ in range(3000):
        yield "".join(chosen.choices(_POOL, k=chosen.randint(1, 30)))
    for _ in range(500):
        yield "".join(chosen.choices(words, k=12))
        yield " a".join(chosen.choices([*marks, "b ", "\n"], k=5))


def report(name: str, differences: list[tuple[str, list[int], list[int]]], n: int) -> bool:
    """Print what differs; whether nothing does."""
    for text, ours, theirs in differences[:10]:
        print(f"{name}: {text[:80]!a}\n    edge     {ours[:24]}\n    original {theirs[:24]}")
    print(f"{name}: {n - len(differences)} of {n} texts have the same tokens")
    return not differences


def vectors(folder: Path) -> bool:
    """Each vocabulary against its .inp and .out."""
    same = True
    for path in sorted(folder.glob("*.gguf.inp")):
        metadata = GGUF.open(path.with_suffix("")).metadata
        name = path.name.removeprefix("ggml-vocab-").removesuffix(".gguf.inp")
        if metadata["tokenizer.ggml.model"] in ("bert", "t5"):
            print(f"{name}: left out, model {metadata['tokenizer.ggml.model']}")
            continue
        tokenizer = Tokenizer.from_metadata(metadata)
        asked = path.read_bytes().decode().split("\n__ggml_vocab_test__\n")
        lines = path.with_suffix(".out").read_text().split("\n")
        wanted = [[int(i) for i in line.split()] for line in lines[: len(asked)]]
        found = [
            (t, tokenizer.encode(t, bos=False), ids) for t, ids in zip(asked, wanted, strict=True)
        ]
        same &= report(name, [row for row in found if row[1] != row[2]], len(found))
    return same


def metadata_of(file: Path, model: str, pre: str) -> dict[str, Any]:
    """The keys that a converter would write for this tokenizer.json."""
    values = json.loads(file.read_text())
    tokens = {i: (text, TokenType.NORMAL) for text, i in values["model"]["vocab"].items()}
    for added in values["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = added["content"], kind
    rows = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(max(tokens) + 1)]
    if model == "gemma4":
        rows = [(t, TokenType.BYTE if t[:3] == "<0x" and len(t) == 6 else k) for t, k in rows]
    merges = [m if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]]
    fields = {"model": model, "pre": pre, "merges": merges, "add_bos_token": False}
    lists = {"tokens": [t for t, _ in rows], "token_type": [int(k) for _, k in rows]}
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, **lists}.items()}


def against(metadata: Any, file: Path) -> bool:
    """A vocabulary against a tokenizer.json: control tokens as letters, and as such; and back."""
    edge = Tokenizer.from_metadata(metadata)
    tokens = list(metadata["tokenizer.ggml.tokens"])
    original = tokenizers.Tokenizer.from_file(str(file))
    added = original.get_added_tokens_decoder().items()
    lacks = {t.content for i, t in added if i >= len(tokens) or tokens[i] != t.content}
    marks = {t.content for i, t in added if t.content not in lacks and not t.special}
    marks = {text for text in marks if edge.is_special(tokens.index(text))}
    same = True
    for special in (False, True):
        missing = lacks if special else lacks | marks
        original.encode_special_tokens = not special
        found = []
        for text in texts(tokens):
            if not any(token in text for token in missing):
                ids = original.encode(text, add_special_tokens=False).ids
                found.append((text, edge.encode(text, special=special, bos=False), ids))
        name = f"control tokens as {'such' if special else 'letters'}"
        same &= report(name, [row for row in found if row[1] != row[2]], len(found))
        back = [
            (text, ids, ids)
            for text, _, ids in found
            if edge.decode(ids, special=True) != original.decode(ids, skip_special_tokens=False)
        ]
        same &= report(f"{name}, back to text", back, len(found))
    return same


def main() -> int:
    what, *arguments = sys.argv[1:]
    if what == "vectors":
        return not vectors(Path(arguments[0]))
    if what == "json":
        model, pre, file = arguments
        return not against(metadata_of(Path(file), model, pre), Path(file))
    return not against(GGUF.open(arguments[0]).metadata, Path(arguments[1]))


if __name__ == "__main__":
    sys.exit(main())
