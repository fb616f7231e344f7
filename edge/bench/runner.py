"""The steps of every measurement, and llama.cpp and its fork ik as runtimes that take them.

    python runner.py JOB

measures a peer in this process and prints one JSON line; JOB is JSON, see `main`. It is started by
path, with the Python that has the peer, so it imports nothing of edge; edge imports the steps.

Position i of a context always holds token (7 i + 11) mod the vocabulary, whatever was measured
before. So a context is brought to any depth by cutting it or by adding what is missing.
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

#: How keys and values may be kept -> the peers' number (ggml_type) of the type nearest to it.
GGML_TYPES = {"f16": 1, "q8": 8, "q4": 2}


class Case(NamedTuple):
    """What is measured: a prompt from an empty context, or steps of one token from a depth."""

    kind: str  # "prompt", "decode"
    tokens: int
    depth: int = 0

    def __str__(self) -> str:
        at = f" at {self.depth}" if self.depth else ""
        return f"{self.kind} {self.tokens}{at}"


class Runtime(Protocol):
    """What is measured. n_vocab: entries of the vocabulary; batch: tokens to give it at once."""

    n_vocab: int
    batch: int

    def cut(self, n_tokens: int, depth: int) -> int:
        """Take the context used for tests at a depth, keep at most its first n_tokens tokens;
        returns how many it has."""

    def append(self, tokens: Sequence[int], start: int, last: bool) -> None:
        """Run tokens at the positions start.. and wait; last: the last one's logits are wanted."""


def prepare(runtime: Runtime, case: Case) -> None:
    """Bring the context to the depth of a case."""
    _extend(runtime, runtime.cut(case.depth, case.depth), case.depth, runtime.batch)


def seconds(runtime: Runtime, case: Case, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure a case once."""
    prepare(runtime, case)
    step = 1 if case.kind == "decode" else runtime.batch
    start = clock()
    _extend(runtime, case.depth, case.depth + case.tokens, step, logits=True)
    return clock() - start


def warm_up(runtime: Runtime, cases: Sequence[Case]) -> None:
    """Run a part of each case, unmeasured."""
    for case in cases:
        most = WARM_UP[case.kind == "decode"]
        seconds(runtime, case._replace(tokens=min(case.tokens, most)))


def speed(runtime: Runtime, case: Case, enough: float, most: int) -> float:
    """Tokens per second: the median of measurements until they took `enough` seconds, at most
    `most` of them."""
    taken: list[float] = []
    while not taken or (sum(taken) < enough and len(taken) < most):
        taken.append(seconds(runtime, case))
    return case.tokens / statistics.median(taken)


def _extend(runtime: Runtime, start: int, end: int, step: int, logits: bool = False) -> None:
    """Tokens start..end - 1; logits: of the prompt's last token, of every decoded one."""
    for first in range(start, end, step):
        stop = min(first + step, end)
        tokens = [(7 * i + 11) % runtime.n_vocab for i in range(first, stop)]
        runtime.append(tokens, first, logits and (step == 1 or stop == end))


# ---- peers -----------------------------------------------------------------------------------

#: Name -> the module with the C API, and whether weights are repacked at load on request.
PEERS = {
    "llama.cpp": ("llama_cpp", False),
    "ik": ("ik_llama_cpp._ctypes_api", False),
    "ik-repacked": ("ik_llama_cpp._ctypes_api", True),
}


class PeerError(Exception):
    """The peer cannot be measured; the message says why."""


class PeerModel:
    """A model in llama.cpp or ik: the defaults of the peer, but for what is given.

    kv: one of GGML_TYPES, for keys and values alike.
    """

    batch = BATCH

    def __init__(self, name: str, path: str, threads: int, context: int, kv: str = "f16") -> None:
        module, repack = PEERS[name]
        try:
            self.api: Any = importlib.import_module(module)
        except Exception as e:  # a library that does not load raises what it likes
            raise PeerError(f"cannot import {module.split('.')[0]}: {e}") from e
        self.name = name
        self.lib = getattr(self.api, "_lib", None)  # ik: what its bindings left out
        self.errors: list[str] = []
        self._collect_errors()
        self.api.llama_backend_init()
        self.model = self._load(path, repack)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML_TYPES[kv]
        if kv != "f16" and self.lib is None:  # without it llama.cpp keeps values in floats only
            params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise PeerError(self._why("cannot make a context"))
        vocab = self.api.llama_model_get_vocab(self.model)
        self.n_vocab = int(self.api.llama_vocab_n_tokens(vocab))
        self._batch = self.api.llama_batch_init(BATCH, 0, 1)
        self._length = 0

    def build(self) -> str:
        """Package, version, and the instruction sets that the library says it was compiled for."""
        package = importlib.import_module(self.api.__name__.split(".")[0])
        info = self._function("llama_print_system_info", ctypes.c_char_p)()
        flags = [part.strip() for part in info.decode().replace(":", "|").split("|")]
        on = [f.removesuffix("= 1").strip() for f in flags if f.endswith("= 1")]
        return f"{package.__name__} {package.__version__}: {' '.join(on)}"

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

    def _load(self, path: str, repack: bool) -> Any:
        params = self.api.llama_model_default_params()
        if repack:
            params.repack_tensors = True
        model = self.api.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise PeerError(self._why("cannot load the model"))
        return model

    def _function(self, name: str, result: Any) -> Any:
        """A function of the C API, also where the bindings do not have it."""
        if self.lib is None:
            return getattr(self.api, name)
        function = getattr(self.lib, name)
        function.restype = result
        return function

    def _collect_errors(self) -> None:
        """Log lines go nowhere, but errors are kept for the message."""
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
    """job: peer, model, threads, context, kv, cases, enough, most. Returns build, load_seconds
    and speeds (tokens per second by case), or error: why the peer cannot be measured."""
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
    del sys.path[0]  # this folder: its modules are not those that the peer looks for
    print(json.dumps(main(json.loads(sys.argv[1]))))
