"""A text that survives the program. Usage: resume.py [model.gguf]

What is kept in a file while it is written goes on from there, with the same tokens as if there had
been no break: in this process or the next one, after a kill or a power cut.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path

import edge

path = sys.argv[1] if len(sys.argv) > 1 else None

with tempfile.TemporaryDirectory() as folder, edge.load(path) as model:
    file = Path(folder) / "story.session"
    session = model.session(max_tokens=40)
    session.autosave(file, every=8)  # from here on at most 8 tokens can be lost
    for piece in itertools.islice(session.stream("Once upon a time"), 20):
        print(piece.text, end="", flush=True)
    session.close()

    print(" ... ", end="")
    again = edge.resume(file, model, autosave=8)  # as in another process
    print(again.generate("").text)
    print(f"{len(again.tokens)} tokens in {file.stat().st_size:,} bytes", file=sys.stderr)
    again.close()
