"""Ask a model one question. Usage: hello.py [model.gguf]"""

from __future__ import annotations

import sys

import edge

path = sys.argv[1] if len(sys.argv) > 1 else None  # None: the model that `edge-run pull` fetched

with edge.load(path) as model:
    answer = model.chat().send("Name three colours.", max_tokens=40)

print(answer.text)
print(f"{answer.usage.decode_tokens_per_second:.0f} tokens/s", file=sys.stderr)
