"""Threads: the same bits on any number of them, cancel, many of them and many engines."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native_plan import ISAS, Plan, Spec, rows_weight
from test_kernels import moderate, normal

from edge import native
from edge.device.cores import Choice
from edge.engine.engine import Engine
from edge.engine.ops import F32, LOGITS
from edge.errors import CancelledError, NativeError
from edge.native import ffi, lib
from edge.native.cancel import Cancel

pytestmark = [pytest.mark.native, pytest.mark.any_isa]


def small_plan() -> Plan:
    """Seven stages, the widest of 20 panels."""
    spec = Spec(ISAS[-1], max_tokens=8)
    h = spec.given(normal(8, 64))
    for seed in range(2):
        weight = moderate("Q8_0", 64 * 5, 64, seed)[0], moderate("F32", 64, 320, seed)[0]
        up = spec.op("matmul", (spec.quantized(h),), spec.buffer(F32, 320), weight[:1])
        h = spec.op("matmul", (up, h), spec.buffer(F32, 64), weight[1:])
    h = spec.op("gather", (h,), spec.buffer(F32, 64, logit_rows=True))
    spec.op("matmul", (h,), spec.buffer(LOGITS, 9), [rows_weight(normal(9, 64))])
    return Plan(spec)


@pytest.mark.parametrize("threads, runs", [(1, 20), (2, 1000), (4, 2000), (7, 300)])
def test_many_small_runs_give_the_same_bits(threads: int, runs: int) -> None:
    plan = small_plan()
    want = plan.run(range(8), n_logits=8)
    for i in range(runs):
        n = i % 8 + 1
        got = plan.run(range(n), n_logits=n, threads=threads)
        np.testing.assert_array_equal(got, want[:n])


@pytest.mark.parametrize("threads", [-1, 0, 257, 2**31 - 1])
def test_thread_counts_out_of_range_are_refused(threads: int) -> None:
    out, error = ffi.new("edge_threads **"), ffi.new("edge_error *")
    assert lib.edge_threads_new(threads, ffi.NULL, 0, out, error) == lib.EDGE_BAD_ARGUMENT
    assert native.text(error.text) == f"{threads} threads: from 1 to 256"
    assert out[0] == ffi.NULL
    assert lib.edge_threads_new(1, ffi.NULL, 0, ffi.NULL, ffi.NULL) == lib.EDGE_BAD_ARGUMENT
    lib.edge_threads_free(ffi.NULL)


def test_threads_come_and_go() -> None:
    """Freed at once, asleep or after work, with no thread left behind."""
    gc.collect()  # engines of earlier tests
    plan, before = small_plan(), n_threads()
    out, error = ffi.new("edge_threads **"), ffi.new("edge_error *")
    step = ffi.new("edge_step *", {"n_tokens": 1, "n_ops": -1})
    step.tokens = tokens = ffi.new("int32_t[]", [3])
    for i in range(50):
        native.check(lib.edge_threads_new(i % 7 + 1, ffi.NULL, 0, out, error), error)
        for _ in range(i % 3):
            native.check(lib.edge_run(plan.handle, out[0], plan.cache.handle, step, error), error)
        lib.edge_threads_free(out[0])
    assert n_threads() <= before
    del tokens


def n_threads() -> int:
    """Threads of this process, 0 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 0


def test_the_most_threads_that_may_be_asked_for() -> None:
    plan = small_plan()
    out, error = ffi.new("edge_threads **"), ffi.new("edge_error *")
    status = lib.edge_threads_new(256, ffi.NULL, 0, out, error)
    if status == lib.EDGE_NO_THREADS:  # a limit of the system: nothing may be left behind
        assert out[0] == ffi.NULL and "refused thread" in native.text(error.text)
        return
    native.check(status, error)
    step = ffi.new("edge_step *", {"n_tokens": 1, "n_ops": -1})
    step.tokens = tokens = ffi.new("int32_t[]", [3])
    native.check(lib.edge_run(plan.handle, out[0], plan.cache.handle, step, error), error)
    lib.edge_threads_free(out[0])
    del tokens


def test_a_plan_of_no_ops_runs() -> None:
    plan = small_plan()
    step = ffi.new("edge_step *", {"n_tokens": 1, "n_ops": 0})
    step.tokens = tokens = ffi.new("int32_t[]", [3])
    from native_plan import shared_threads

    assert (
        lib.edge_run(plan.handle, shared_threads(2), plan.cache.handle, step, ffi.NULL)
        == lib.EDGE_OK
    )
    del tokens


# ---- cancel --------------------------------------------------------------------------------------


@pytest.fixture
def slow(tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that takes a while for a chunk."""
    monkeypatch.setenv("EDGE_ISA", "scalar")
    wide = {"dim": 128, "ffn": 512, "n_layers": 3, "context": 512}
    engine = Engine.load(tiny_gguf(type="Q4_0", **wide), threads=2)
    yield engine
    engine.close()


def test_cancel_from_another_thread(slow: Engine) -> None:
    cache, cancel, prompt = slow.cache(), Cancel(), list(range(3, 10))
    prefill = [7] * slow.chunk
    slow.run(cache, prompt)
    set_at = []

    def cancel_soon() -> None:
        set_at.append(time.monotonic())
        cancel.set()

    timer = threading.Timer(0.05, cancel_soon)
    timer.start()
    with pytest.raises(CancelledError):
        for _ in range(10_000):  # a fast machine needs a few
            slow.run(cache, prefill, logits="none", cancel=cancel)
            cache.trim(len(prompt))
    took = time.monotonic() - set_at[0]
    timer.join()
    assert took < 10  # a chunk of work takes some milliseconds, far more on a busy machine
    assert cache.length == len(prompt)
    assert_goes_on(slow, cache, prompt, cancel)


def test_cancel_that_is_set_already(slow: Engine) -> None:
    cache, cancel = slow.cache(), Cancel()
    slow.run(cache, [3, 4, 5])
    cancel.set()
    assert cancel.is_set()
    with pytest.raises(CancelledError):
        slow.run(cache, [6], cancel=cancel)
    assert cache.length == 3
    assert_goes_on(slow, cache, [3, 4, 5], cancel)


def assert_goes_on(engine: Engine, cache: object, prompt: list[int], cancel: Cancel) -> None:
    """After a cancelled run, the next one gives what a fresh cache gives."""
    cancel.clear()
    got = engine.run(cache, [10, 11], logits="all", cancel=cancel)
    want = engine.run(engine.cache(), [*prompt, 10, 11], logits="all")
    np.testing.assert_array_equal(got, want[len(prompt) :])


# ---- at once -------------------------------------------------------------------------------------


def test_two_engines_in_two_threads(tiny_gguf: Callable[..., Path]) -> None:
    paths = [tiny_gguf(type="Q4_0"), tiny_gguf("phi3", type="Q8_0")]
    engines = [Engine.load(path, threads=2) for path in paths]
    tokens = list(range(20))

    def run(engine: Engine) -> list[np.ndarray]:
        return [engine.run(engine.cache(), tokens, logits="all") for _ in range(20)]

    alone = [run(engine)[0] for engine in engines]
    with ThreadPoolExecutor(2) as executor:
        together = list(executor.map(run, engines))
    for want, results in zip(alone, together, strict=True):
        for got in results:
            np.testing.assert_array_equal(got, want)
    for engine in engines:
        engine.close()


def test_one_engine_in_four_threads(tiny_gguf: Callable[..., Path]) -> None:
    engine = Engine.load(tiny_gguf(type="Q4_1"), threads=2)
    prompts = [[i, 3 * i + 1, 7] for i in range(40)]

    def run(prompt: list[int]) -> np.ndarray:
        return engine.run(engine.cache(), prompt)

    alone = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as executor:
        for got, want in zip(executor.map(run, prompts), alone, strict=True):
            np.testing.assert_array_equal(got, want)
    engine.close()


def test_plan_errors_do_not_stop_the_threads() -> None:
    plan = small_plan()
    want = plan.run([1, 2], n_logits=2, threads=3)
    with pytest.raises(NativeError):
        plan.run(range(9), threads=3)
    np.testing.assert_array_equal(plan.run([1, 2], n_logits=2, threads=3), want)


# ---- which CPUs ----------------------------------------------------------------------------------

linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")


def where(thread: int) -> set[int]:
    """CPUs that a thread of this process may run on; its number is the system's."""
    return os.sched_getaffinity(thread)


@pytest.fixture
def threads_on() -> Iterator[Callable[..., Any]]:
    """threads_on(n, cpus) -> edge_threads and the system's numbers of the new ones."""
    made = []

    def make(n: int, cpus: list[int]) -> tuple[Any, set[int]]:
        before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        made.append(native.new_threads(n, cpus))
        after = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        return made[-1], after - before

    yield make
    for threads in made:
        ffi.release(threads)


@linux
def test_threads_stay_on_their_cpus(threads_on: Callable[..., Any]) -> None:
    """Their own for good, the caller's during a run alone."""
    mine = where(0)
    cpu = max(mine)
    threads, numbers = threads_on(3, [cpu])
    assert len(numbers) == 2 and all(where(number) == {cpu} for number in numbers)
    assert where(0) == mine and native.refused(threads) is None
    data = np.ones(1 << 20, np.uint8)
    ns = ffi.new("int64_t *")
    assert lib.edge_measure_read(threads, ffi.from_buffer("uint8_t[]", data), data.size, ns) == 0
    assert where(0) == mine and native.refused(threads) is None


@linux
def test_caller_moves_for_a_run() -> None:
    """A callback is not at hand: a run long enough to be looked at from another thread."""
    cpu, mine, me = min(where(0)), where(0), threading.get_native_id()
    threads, seen, done = native.new_threads(1, [cpu]), set[frozenset[int]](), threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(frozenset(where(me)))

    watcher = threading.Thread(target=look)
    watcher.start()
    macs, ns = ffi.new("int64_t *"), ffi.new("int64_t *")
    while frozenset({cpu}) not in seen:
        native.check(lib.edge_measure_dot(threads, native.isa_index(), macs, ns))
    done.set()
    watcher.join()
    assert where(0) == mine
    ffi.release(threads)


@linux
def test_a_refusal_is_told_and_stops_nothing(threads_on: Callable[..., Any]) -> None:
    mine = where(0)
    absent = next(cpu for cpu in range(1023, 0, -1) if cpu not in mine)
    threads, numbers = threads_on(2, [absent])
    assert native.refused(threads) == os.strerror(errno.EINVAL)
    assert where(0) == mine and all(where(number) == mine for number in numbers)
    plan = small_plan()
    step = ffi.new("edge_step *", {"n_tokens": 1, "n_ops": -1})
    step.tokens = tokens = ffi.new("int32_t[]", [3])
    assert lib.edge_run(plan.handle, threads, plan.cache.handle, step, ffi.NULL) == lib.EDGE_OK
    del tokens


@pytest.mark.parametrize("cpu", [-1, 1024, 2**31 - 1])
def test_cpus_that_cannot_be(cpu: int) -> None:
    with pytest.raises(NativeError, match=f"CPU {cpu}: from 0 to 1023"):
        native.new_threads(1, [cpu])
    out, error = ffi.new("edge_threads **"), ffi.new("edge_error *")
    assert lib.edge_threads_new(1, ffi.NULL, 1, out, error) == lib.EDGE_BAD_ARGUMENT
    assert lib.edge_threads_new(1, ffi.NULL, -1, out, error) == lib.EDGE_BAD_ARGUMENT


@linux
def test_an_engine_says_where_it_runs(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = min(where(0))
    monkeypatch.setattr("edge.device.cores.choose", lambda wanted: Choice(2, (cpu,), "a test"))
    engine = Engine.load(tiny_gguf(type="Q4_0"))
    want = engine.run(engine.cache(), [1, 2, 3])
    assert (engine.threads, engine.cores.cpus, engine.refused) == (2, (cpu,), None)
    engine.close()
    monkeypatch.setattr("edge.device.cores.choose", lambda wanted: Choice(2, (1023,), "a test"))
    engine = Engine.load(tiny_gguf(type="Q4_0"))
    np.testing.assert_array_equal(engine.run(engine.cache(), [1, 2, 3]), want)
    assert engine.refused and engine.refused in engine.cores.lines(engine.refused)[0]
    engine.close()
    assert engine.refused is None
