"""What every engine counts alike of a process's memory, and what the process may have."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from edge.device import memory
from edge.errors import MemoryBudgetError
from edge.sizes import show
from edge.template.budget import Limits

__all__ = ["MARGIN_BYTES", "budget_of", "logits_bytes", "program_bytes", "text_parts"]

#: Memory for each token that the context holds, of a prompt: 64 for its id in several lists, and
#: its text, of up to 112 bytes (`Tokenizer.most_bytes`), 5 for each while it is read. Beyond that
#: what encoding a piece takes, up to 32 KiB of text (`edge.tokenizer.pieces`): 140 for each byte.
_PROMPT_TOKEN_BYTES = 640
_PIECE_BYTES = 5 << 20

#: float32 numbers per entry of the vocabulary: a row of logits, and at most 11.4 in the sampler.
_ROWS = 13

#: What is imported between drawing up the ledger and the first token: module -> bytes of it and
#: of what comes with it.
_TO_COME = {"tokenizers": 8 << 20, "edge.template.environment": 3 << 20, "edge.tokenizer": 1 << 20}

#: Where the system does not say what the process has: Python, numpy and the native library.
_PROGRAM_BYTES = 64 << 20

#: Stacks, the allocator's own, what is in a page's other half.
MARGIN_BYTES = 6 << 20


def logits_bytes(n_vocab: int) -> int:
    """Bytes of a row of logits, and of what the sampler makes of it."""
    return 4 * _ROWS * n_vocab


def text_parts(tokenizer: tuple[int, int], template: int, context: int) -> dict[str, int]:
    """Bytes of what text takes. tokenizer: bytes while it is built, and afterwards; template:
    bytes, compiled, 0: there is none.
    """
    build, rest = tokenizer
    later = {"prompt": _PROMPT_TOKEN_BYTES * context + _PIECE_BYTES}
    later["template"] = template + Limits.of_context(context).total_bytes if template else 0
    return {"tokenizer": max(rest, build - sum(later.values())), **later}


def program_bytes(more: Mapping[str, int] | None = None) -> int:
    """Bytes of the process as it is now, and of what it will import. more: module -> bytes."""
    resident = memory.resident()
    all_of_them = {**_TO_COME, **(more or {})}
    to_come = sum(size for name, size in all_of_them.items() if name not in sys.modules)
    return (_PROGRAM_BYTES if resident is None else resident) + to_come


def budget_of(stated: int | None) -> int | None:
    """Bytes that the whole process may have. Raises MemoryBudgetError for more than there is."""
    there = memory.available()
    most = None if there is None else there + (memory.resident() or 0)
    if stated is not None and most is not None and stated > most:
        raise MemoryBudgetError(
            f"a budget of {show(stated)} is more than the machine has: {show(most)} can be had now",
            needed=stated,
            budget=most,
        )
    return most if stated is None else stated
