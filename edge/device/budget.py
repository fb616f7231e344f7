"""The parts of a process's memory that every engine counts alike, and the process's budget."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from edge.device import memory
from edge.errors import MemoryBudgetError
from edge.sizes import show
from edge.template.budget import Limits
from edge.tokenizer.cost import TokenizerBytes

__all__ = ["MARGIN_BYTES", "budget_of", "logits_bytes", "program_bytes", "text_parts"]

#: Bytes for each token of a prompt that fills the context: 64 for its id in several lists, and 5
#: for each byte of its text while that is read, up to 112 bytes (`Tokenizer.most_bytes`).
#: _PIECE_BYTES: encoding a piece of text, of up to 32 KiB (`edge.tokenizer.pieces`), takes 140
#: bytes for each byte.
_PROMPT_TOKEN_BYTES = 640
_PIECE_BYTES = 5 << 20

#: float32 numbers per entry of the vocabulary: a row of logits, and at most 11.4 in the sampler.
_ROWS = 13

#: Modules that are imported between counting the memory and the first token: module -> bytes of it
#: and of the modules that it imports.
_TO_COME = {"tokenizers": 8 << 20, "edge.template.environment": 3 << 20, "edge.tokenizer": 1 << 20}

#: Python, numpy and the native library, where the system does not say how much the process has.
_PROGRAM_BYTES = 64 << 20

#: Stacks, the allocator's own memory, unused halves of pages.
MARGIN_BYTES = 6 << 20


def logits_bytes(n_vocab: int) -> int:
    """Bytes of a row of logits, and of the sampler's copies of it."""
    return 4 * _ROWS * n_vocab


def text_parts(tokenizer: TokenizerBytes, template: int, context: int) -> dict[str, int]:
    """Bytes that text takes, by part. template: bytes when compiled, 0: there is none."""
    later = {"prompt": _PROMPT_TOKEN_BYTES * context + _PIECE_BYTES}
    later["template"] = template + Limits.of_context(context).total_bytes if template else 0
    return {"tokenizer": max(tokenizer.built, tokenizer.building - sum(later.values())), **later}


def program_bytes(more: Mapping[str, int] | None = None) -> int:
    """Bytes of the process now, and of the modules that it will import. more: module -> bytes."""
    resident = memory.resident()
    module_bytes = {**_TO_COME, **(more or {})}
    to_come = sum(size for name, size in module_bytes.items() if name not in sys.modules)
    return (_PROGRAM_BYTES if resident is None else resident) + to_come


def budget_of(stated: int | None) -> int | None:
    """Bytes that the whole process may have: `stated`, else all that it can get; None: unknown.

    Raises MemoryBudgetError for a stated budget that is more than it can get.
    """
    available = memory.available()
    most = None if available is None else available + (memory.resident() or 0)
    if stated is not None and most is not None and stated > most:
        raise MemoryBudgetError(
            f"a budget of {show(stated)} is more than the machine has: {show(most)} can be had now",
            needed=stated,
            budget=most,
        )
    return most if stated is None else stated
