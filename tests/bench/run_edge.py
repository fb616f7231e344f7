"""Prompt and decode speed of edge, in this process: one JSON line. See compare.py.

run_edge.py MODEL THREADS N_PROMPT N_DECODE REPETITIONS
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge.engine import Engine


def prompt_seconds(engine: Engine, tokens: list[int]) -> float:
    """Seconds to run `tokens` through an empty cache up to the logits of the last one."""
    cache = engine.cache()
    start = time.perf_counter()
    for first in range(0, len(tokens), engine.chunk):
        last = first + engine.chunk >= len(tokens)
        engine.run(cache, tokens[first : first + engine.chunk], logits="last" if last else "none")
    seconds = time.perf_counter() - start
    cache.close()
    return seconds


def decode_seconds(engine: Engine, tokens: list[int]) -> float:
    """Seconds to run `tokens` one by one, with logits for each, behind a first token."""
    cache = engine.cache()
    engine.run(cache, [1])
    start = time.perf_counter()
    for token in tokens:
        engine.run(cache, [token])
    seconds = time.perf_counter() - start
    cache.close()
    return seconds


def main(path: str, threads: int, n_prompt: int, n_decode: int, repetitions: int) -> None:
    """Measure after one unmeasured repetition and print the medians."""
    start = time.perf_counter()
    import edge
    from edge.engine import Engine

    engine = Engine.load(path, context=max(1024, n_prompt, n_decode + 1), threads=threads)
    load = time.perf_counter() - start
    prompt = [(7 * i + 11) % engine.n_vocab for i in range(n_prompt)]
    decode = [(13 * i + 5) % engine.n_vocab for i in range(n_decode)]
    prompts, decodes = [], []
    for repetition in range(repetitions + 1):
        seconds = prompt_seconds(engine, prompt), decode_seconds(engine, decode)
        if repetition:
            prompts.append(n_prompt / seconds[0])
            decodes.append(n_decode / seconds[1])
    result = {
        "runtime": "edge",
        "build": f"edge {edge.__version__}, {engine.isa}",
        "prompt_tps": statistics.median(prompts),
        "decode_tps": statistics.median(decodes),
        "load_seconds": load,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
