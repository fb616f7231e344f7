"""How sure the model is of each token, and what else it had in mind.

Usage: logprobs.py [model.gguf]
"""

from __future__ import annotations

import math
import sys

import edge

path = sys.argv[1] if len(sys.argv) > 1 else None

with edge.load(path) as model:
    session = model.session(sampling=edge.SamplingOptions(temperature=0))
    answer = session.generate("The capital of France is", max_tokens=5, logprobs=3)
    for piece in answer.logprobs:
        others = ", ".join(
            f"{model.tokenizer.token_text(token)!r} {math.exp(logprob):.2f}"
            for token, logprob in piece.top
        )
        print(f"{math.exp(piece.logprob or 0.0):.2f}  {piece.text!r:12} {others}")
