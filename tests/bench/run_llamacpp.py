"""Prompt and decode speed of llama.cpp, in this process: one JSON line. See compare.py.

    run_llamacpp.py MODEL THREADS N_PROMPT N_DECODE REPETITIONS

Needs `llama-cpp-python`, compiled for this CPU. The steps are those of run_edge.py: the same
tokens, an empty cache each time, logits of the last token only.
"""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import sys
import time
from typing import Any

import llama_cpp as llama

BATCH = 512


def run(context: Any, tokens: list[int]) -> None:
    """Append `tokens` to the cache and wait for the logits of the last one."""
    for first in range(0, len(tokens), BATCH):
        part = tokens[first : first + BATCH]
        ids = (llama.llama_token * len(part))(*part)  # the batch points into it
        batch = llama.llama_batch_get_one(ids, len(part))
        status = llama.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
    llama.llama_synchronize(context)


def prompt_seconds(context: Any, tokens: list[int]) -> float:
    """Seconds to run `tokens` through an empty cache up to the logits of the last one."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    start = time.perf_counter()
    run(context, tokens)
    return time.perf_counter() - start


def decode_seconds(context: Any, tokens: list[int]) -> float:
    """Seconds to run `tokens` one by one, with logits for each, behind a first token."""
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    run(context, [1])
    start = time.perf_counter()
    for token in tokens:
        run(context, [token])
    return time.perf_counter() - start


def load(path: str, threads: int, n_context: int) -> tuple[Any, int]:
    """A context over the model (f16 cache, otherwise defaults) and the vocabulary's size."""
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_context, BATCH, BATCH
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    return context, llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))


def main(path: str, threads: int, n_prompt: int, n_decode: int, repetitions: int) -> None:
    """Measure after one unmeasured repetition and print the medians."""
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    start = time.perf_counter()
    context, n_vocab = load(path, threads, max(1024, n_prompt, n_decode + 1))
    load_seconds = time.perf_counter() - start
    prompt = [(7 * i + 11) % n_vocab for i in range(n_prompt)]
    decode = [(13 * i + 5) % n_vocab for i in range(n_decode)]
    prompts, decodes = [], []
    for repetition in range(repetitions + 1):
        seconds = prompt_seconds(context, prompt), decode_seconds(context, decode)
        if repetition:
            prompts.append(n_prompt / seconds[0])
            decodes.append(n_decode / seconds[1])
    system = " ".join(llama.llama_print_system_info().decode().split())
    result = {
        "runtime": "llama.cpp",
        "build": f"llama-cpp-python {llama.__version__}, {system}",
        "prompt_tps": statistics.median(prompts),
        "decode_tps": statistics.median(decodes),
        "load_seconds": load_seconds,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
