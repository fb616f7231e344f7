"""A made-up byte-level BPE vocabulary of any size, as tokenizers want it: consistent, no two alike.

Every token but the bytes and the control tokens is made by one merge of two earlier ones. Words
are drawn letter by letter, in English proportions, and built by halves, so that text becomes
tokens of a few letters.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import gguf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import byte_characters

SPACE = "\u0120"  # as GPT-2 spells it
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
WEIGHTS = (127, 91, 82, 75, 70, 67, 63, 61, 60, 43, 40, 28, 28, 24, 24, 22, 20, 20, 19, 15, 10, 8)
N_CONTROL = 66
NAMED = {1: "<|endoftext|>", 21: "<|assistant|>", 22: "<|end|>", 23: "<|user|>", 24: "<|system|>"}
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make(n_vocab: int) -> tuple[list[str], list[str]]:
    """n_vocab tokens, control tokens last, and the merges, one for each token in between."""
    rng = random.Random(0)
    tokens = byte_characters()
    known, merges = set(tokens), list[str]()
    n_plain = n_vocab - N_CONTROL

    def build(word: str) -> None:
        if word in known or len(tokens) == n_plain:
            return
        half = len(word) // 2
        left, right = word[:half], word[half:]
        build(left)
        build(right)
        if len(tokens) < n_plain:
            known.add(word)
            tokens.append(word)
            merges.append(f"{left} {right}")

    weights = (*WEIGHTS, *[1] * (len(LETTERS) - len(WEIGHTS)))
    while len(tokens) < n_plain:
        letters = "".join(rng.choices(LETTERS, weights, k=rng.randint(2, 10)))
        build(SPACE + letters if rng.random() < 0.7 else letters)
    tokens += [NAMED.get(i, f"<|control_{i}|>") for i in range(N_CONTROL)]
    return tokens, merges


def add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """Write the vocabulary's keys, a chat template too."""
    tokens, merges = make(n_vocab)
    kinds = [gguf.TokenType.NORMAL] * (n_vocab - N_CONTROL) + [gguf.TokenType.CONTROL] * N_CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    first = n_vocab - N_CONTROL
    writer.add_bos_token_id(first + 1)
    writer.add_eos_token_id(first + 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
