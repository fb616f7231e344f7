"""Text to token ids and back, from what a GGUF file, or a tokenizer.json, says.

    metadata -> vocabulary.py (checked) -> backend.py (a Hugging Face `tokenizers` object)
    folder -> huggingface.py (the same) -> decoder.py (ids to text, never half a character)

presplit.py is the table of `tokenizer.ggml.pre`. Importing this package does not import
`tokenizers`; building a Tokenizer does.
"""

from __future__ import annotations

from edge.tokenizer.decoder import StreamDecoder
from edge.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
