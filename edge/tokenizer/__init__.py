"""Text to token ids and back, by the vocabulary of a GGUF file or of a tokenizer.json.

    presplit.py     how each byte-level BPE cuts text into words: the table of `tokenizer.ggml.pre`
    cost.py         the memory that a tokenizer takes
    marks.py        tokens that end an answer, by their spelling
    vocabulary.py   the tokens and what a GGUF file says about them, checked
    pieces.py       where a long text can be cut
    backend.py      a vocabulary to objects of Hugging Face's `tokenizers`, which do the merging
    huggingface.py  the vocabulary of a folder
    spelling.py     the bytes that each token stands for
    decoder.py      ids to text, never half a character
    tokenizer.py    the Tokenizer

Each imports from those above it. Importing this package does not import `tokenizers`; building a
Tokenizer does.
"""

from __future__ import annotations

from edge.tokenizer.decoder import StreamDecoder
from edge.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
