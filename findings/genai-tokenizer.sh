#!/bin/sh
# onnxruntime-genai 0.18.0 encodes some texts to other tokens than the package `tokenizers` does with
# the same tokenizer.json, without a word:
#   - where the pre-tokenizer is Digits before ByteLevel (SmolLM2's): spaces before a digit are cut
#     apart, so that "  1" is three tokens instead of two;
#   - with every tokenizer: a text ends at its first NUL.
# It does not depend on the CPU. Exits with 1 when this has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --only-binary=:all: onnxruntime-genai==0.18.0 tokenizers==0.23.3
cd "$folder"
cat >show.py <<'PYTHON'
import json
import os
import sys

import onnxruntime_genai as genai
import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ["the world", "x 1", "  1", "x  2", "a\0b"]
WORDS = ["the world 1 2  12   123 x 2\n"] * 50
DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CONFIG = {
    "model": {
        "type": "llama",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
        "context_length": 64,
        "vocab_size": 320,
        "decoder": {
            "filename": "model.onnx",
            "head_size": 8,
            "hidden_size": 8,
            **dict.fromkeys(
                ("num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 1
            ),
        },
    },
    "search": {},
}


def both(name, steps):
    """Texts that the two encode differently."""
    exact = Tokenizer(models.BPE())
    exact.pre_tokenizer = pre_tokenizers.Sequence(steps)
    exact.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    exact.train_from_iterator(WORDS, trainer)
    os.mkdir(name)
    exact.save(f"{name}/tokenizer.json")
    for file, content in (
        ("genai_config.json", CONFIG),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "eos_token": "<|end|>"},
        ),
    ):
        with open(f"{name}/{file}", "w") as out:
            json.dump(content, out)
    found = genai.Tokenizer(name)
    different = []
    for text in TEXTS:
        told, wanted = list(map(int, found.encode(text))), exact.encode(text).ids
        spelled = [[exact.id_to_token(i) for i in ids] for ids in (told, wanted)]
        print(f"  {text!r:14} genai {spelled[0]}, tokenizers {spelled[1]}")
        if told != wanted:
            different.append(text)
    return different


print(f"onnxruntime-genai {genai.__version__}, tokenizers {tokenizers.__version__}")
print("pre-tokenizer ByteLevel:")
plain = both("plain", [BYTES])
print("pre-tokenizer Digits, ByteLevel:")
digits = both("digits", [DIGITS, BYTES])
as_seen = plain == ["a\0b"] and digits == ["  1", "x  2", "a\0b"]
print("as described" if as_seen else f"CHANGED: different are {plain} and {digits}")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" show.py
