"""Digests of logits, as JSON: the same on every machine. Run with MODEL:KV[:LAYOUT]... by any
Python that has edge and numpy; {instruction set: {argument: digest}}, EDGE_ISAS of all usable."""

from __future__ import annotations

import hashlib
import json
import os
import sys

import numpy as np

from edge import native
from edge.engine.engine import Engine

N_PROMPT, N_DECODED, CHUNKS = 70, 4, (9, 32, 64)


def digest(path: str, kv: str, layout: str = "fast") -> str:
    """SHA-256 of the logits of a prompt in uneven chunks and of tokens after it, one by one."""
    engine = Engine.load(path, kv=kv, layout=layout, threads=2, context=128)
    tokens = np.random.default_rng(0).integers(0, engine.n_vocab, N_PROMPT + N_DECODED).tolist()
    cache, parts, at = engine.cache(), [], 0
    for end in (*CHUNKS, *range(N_PROMPT, N_PROMPT + N_DECODED + 1)):
        parts.append(engine.run(cache, tokens[at:end], logits="all"))
        at = end
    engine.close()
    logits = np.concatenate(parts)
    assert np.isfinite(logits).all() and logits.std() > 0.01
    return hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()


def main() -> None:
    """Print them."""
    out = {}
    for isa in native.isas():
        os.environ["EDGE_ISA"] = isa
        out[isa] = {case: digest(*case.split(":")) for case in sys.argv[1:]}
    print(json.dumps(out))


main()
