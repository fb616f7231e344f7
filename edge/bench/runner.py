"""The steps of every measurement, and the adapter of llama.cpp and its fork ik.

    python runner.py JOB

measures a peer in this process and prints one JSON line; JOB is JSON, see `main`. This file is
started by its path, with the Python that has the peer. So it imports nothing of edge, while edge
imports the steps.

Position i of a context always holds token (7 i + 11) mod the size of the vocabulary. So cutting a
context, or adding the missing tokens, brings it to any depth.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

WARM_UP = (256, 4)  # tokens of a prompt, decode steps
BATCH = 512  # tokens that a peer computes at once

#: edge's type of keys and values -> the peers' number (ggml_type) of the nearest type.
GGML_TYPES = {"f16": 1, "q8": 8, "q4": 2}


class Case(NamedTuple):
    """A thing to measure: a prompt in an empty context, or single tokens from a depth on."""

    kind: str  # "prompt", "decode"
    tokens: int
    depth: int = 0

    def __str__(self) -> str:
        depth = f" at {self.depth}" if self.depth else ""
        return f"{self.kind} {self.tokens}{depth}"


class Runtime(Protocol):
    """A runtime to measure. n_vocab: entries of the vocabulary; batch: most tokens of one call."""

    n_vocab: int
    batch: int

    def cut(self, n_tokens: int, depth: int) -> int:
        """Select the context of a depth, and keep at most its first n_tokens tokens.

        Returns how many tokens it has.
        """

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        """Run tokens at the positions from `start` on, and wait for the end.

        last: compute the logits of the last token.
        """


def prepare(runtime: Runtime, case: Case) -> None:
    """Bring the context to the depth of a case."""
    _extend(runtime, runtime.cut(case.depth, case.depth), case.depth, runtime.batch)


def seconds(runtime: Runtime, case: Case, clock: Callable[[], float] = time.perf_counter) -> float:
    """The seconds that a case takes, measured once."""
    prepare(runtime, case)
    step = 1 if case.kind == "decode" else runtime.batch
    start = clock()
    _extend(runtime, case.depth, case.depth + case.tokens, step, logits=True)
    return clock() - start


def warm_up(runtime: Runtime, cases: Sequence[Case]) -> None:
    """Run a part of each case without measuring it."""
    for case in cases:
        most = WARM_UP[case.kind == "decode"]
        seconds(runtime, case._replace(tokens=min(case.tokens, most)))


def speed(runtime: Runtime, case: Case, enough: float, most: int) -> float:
    """Tokens per second: the median of at most `most` measurements.

    It stops earlier when the measurements took `enough` seconds in all.
    """
    times: list[float] = []
    while not times or (sum(times) < enough and len(times) < most):
        times.append(seconds(runtime, case))
    return case.tokens / statistics.median(times)


def _extend(runtime: Runtime, start: int, end: int, step: int, logits: bool = False) -> None:
    """Run the tokens start..end - 1 in calls of `step`.

    logits: compute those of the last token, and of every token where step is 1.
    """
    for first in range(start, end, step):
        stop = min(first + step, end)
        tokens = [(7 * i + 11) % runtime.n_vocab for i in range(first, stop)]
        runtime.append(tokens, first, logits and (step == 1 or stop == end))


# ---- peers -----------------------------------------------------------------------------------


class PeerApi(NamedTuple):
    """How to use a peer. module: has its C API; repacks: weights are repacked at load."""

    module: str
    repacks: bool


PEERS = {
    "llama.cpp": PeerApi("llama_cpp", repacks=False),
    "ik": PeerApi("ik_llama_cpp._ctypes_api", repacks=False),
    "ik-repacked": PeerApi("ik_llama_cpp._ctypes_api", repacks=True),
}


class PeerError(Exception):
    """The peer cannot be measured; the message says why."""


class PeerModel:
    """A model in llama.cpp or ik, with the peer's defaults except for the arguments.

    kv: one of GGML_TYPES, for both keys and values.
    """

    batch = BATCH

    def __init__(self, name: str, path: str, threads: int, context: int, kv: str = "f16") -> None:
        module, repacks = PEERS[name]
        try:
            self.api: Any = importlib.import_module(module)
        except Exception as e:  # a library that fails to load raises any type
            raise PeerError(f"cannot import {module.split('.')[0]}: {e}") from e
        self.name = name
        self.lib = getattr(self.api, "_lib", None)  # of ik alone: its bindings are incomplete
        self.errors: list[str] = []
        self._collect_errors()
        self.api.llama_backend_init()
        self.model = self._load(path, repacks)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPES[kv]
        if kv != "f16" and self.lib is None:  # without it llama.cpp keeps values only as floats
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise PeerError(self._why("cannot make a context"))
        vocab = self.api.llama_model_get_vocab(self.model)
        self.n_vocab = int(self.api.llama_vocab_n_tokens(vocab))
        self._batch = self.api.llama_batch_init(BATCH, 0, 1)
        self._length = 0

    def build(self) -> str:
        """The package, its version, and the instruction sets that it reports."""
        package = importlib.import_module(self.api.__name__.split(".")[0])
        info = self._function("llama_print_system_info", ctypes.c_char_p)()
        flags = [part.strip() for part in info.decode().replace(":", "|").split("|")]
        isas = [f.removesuffix("= 1").strip() for f in flags if f.endswith("= 1")]
        return f"{package.__name__} {package.__version__}: {' '.join(isas)}"

    def cut(self, n_tokens: int, depth: int) -> int:
        """See Runtime; one context serves all depths."""
        if self._length > n_tokens:
            if self.lib is None:
                memory = self.api.llama_get_memory(self.context)
                self.api.llama_memory_seq_rm(memory, 0, n_tokens, -1)
            else:
                remove = self._function("llama_kv_cache_seq_rm", ctypes.c_bool)
                sequence, first, end = map(ctypes.c_int32, (0, n_tokens, -1))
                remove(ctypes.c_void_p(self.context), sequence, first, end)
            self._length = n_tokens
        return self._length

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        """See Runtime."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 0
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[len(tokens) - 1] = last
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise PeerError(self._why(f"llama_decode gave {status}"))
        self._function("llama_synchronize", None)(ctypes.c_void_p(self.context))
        self._length = start + len(tokens)

    def _load(self, path: str, repacks: bool) -> Any:
        params = self.api.llama_model_default_params()
        if repacks:
            params.repack_tensors = True
        model = self.api.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise PeerError(self._why("cannot load the model"))
        return model

    def _function(self, name: str, result: Any) -> Any:
        """A function of the C API, even if the bindings lack it."""
        if self.lib is None:
            return getattr(self.api, name)
        function = getattr(self.lib, name)
        function.restype = result
        return function

    def _collect_errors(self) -> None:
        """Drop the log, but keep its errors for messages."""
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

        def keep(level: int, text: bytes, _: object) -> None:
            line = text.decode("utf-8", "replace").strip()
            if "error" in line.lower() or "fail" in line.lower():
                self.errors.append(line)

        self._log = kind(keep)
        if self.lib is None:
            self._log = self.api.llama_log_callback(keep)
        self._function("llama_log_set", None)(self._log, ctypes.c_void_p())

    def _why(self, what: str) -> str:
        return f"{what}: {self.errors[0]}" if self.errors else what


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a peer.

    job: peer, model, threads, context, kv, cases, enough, most. Returns build, load_seconds and
    speeds (tokens per second by case), or error: why the peer cannot be measured.
    """
    cases = [Case(*case) for case in job["cases"]]
    start = time.perf_counter()
    try:
        peer = PeerModel(job["peer"], job["model"], job["threads"], job["context"], job["kv"])
        load = time.perf_counter() - start
        warm_up(peer, cases)
        speeds = [speed(peer, case, job["enough"], job["most"]) for case in cases]
    except PeerError as e:
        return {"error": str(e)}
    return {"build": peer.build(), "load_seconds": load, "speeds": speeds}


if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules must not hide those that the peer imports
    print(json.dumps(main(json.loads(sys.argv[1]))))
