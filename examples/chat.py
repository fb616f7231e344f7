"""A conversation: the model remembers, and computes only what is new. Usage: chat.py [model.gguf]

Lines come from standard input; an empty line, or its end, leaves.
"""

from __future__ import annotations

import sys

import edge

path = sys.argv[1] if len(sys.argv) > 1 else None

with edge.load(path) as model:
    chat = model.chat(system="You answer in one sentence.", max_tokens=60)
    while line := sys.stdin.readline().strip():
        stream = chat.stream(line)
        for piece in stream:
            print(piece.text, end="", flush=True)
        print()
        print(
            f"{stream.usage.cached_tokens} of {stream.usage.prompt_tokens} tokens were known",
            file=sys.stderr,
        )
