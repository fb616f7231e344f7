"""Stop an answer from another thread, and go on. Usage: stream_and_cancel.py [model.gguf]"""

from __future__ import annotations

import sys
import threading

import edge

path = sys.argv[1] if len(sys.argv) > 1 else None

with edge.load(path) as model:
    chat = model.chat()
    stream = chat.stream("Tell me a very long story.", max_tokens=300)
    button = threading.Timer(1.0, chat.cancel)  # a user who has heard enough
    button.start()
    for piece in stream:
        print(piece.text, end="", flush=True)
    button.cancel()
    print(f"\n({stream.finish_reason} after {stream.usage.completion_tokens} tokens)")

    answer = chat.send("What was it about?", max_tokens=30)  # the partial answer is remembered
    print(answer.text)
