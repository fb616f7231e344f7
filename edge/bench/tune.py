"""The best number of threads on this machine, measured in about two seconds.

A chain of matmuls stands for a model. One token through more weights than the caches hold is like
decoding; some tokens through a few of these weights are like a prompt. The numbers of threads take
turns, so that a machine that slows down does so for all of them. RULE says which number is the
best; fewer threads leave cores to other programs, and run cooler.

If the machine runs other programs meanwhile, the measured speeds are too low. Two values show this:
the share of the processors' time that other programs had, and how much the rounds of one number of
threads differ (the width of their middle half, as a share of the median).
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from edge import native
from edge.device.cores import Cores
from edge.device.machine import buffer_bytes, largest_cache, written
from edge.engine.chain import Chain
from edge.native import ffi

__all__ = ["RULE", "TuneRow", "Tuning", "best", "candidates", "measure"]

SECONDS = 1.2  # for all rounds
LEAST_ROUNDS, MOST_ROUNDS = 3, 15  # that count
CLOSE = 0.97  # of the best speed
RULE = (
    f"the fewest threads whose speed, the geometric mean of both, is within {1 - CLOSE:.0%} of the "
    "best"
)
MOST_OTHERS = 0.1  # share of other programs' time above which the result is not kept
MOST_SPREAD = 0.25  # difference of the rounds above which the result is not kept
DIM = 2048
TOKENS = 32  # of the prompt
PROMPT_SECONDS = 0.01  # that a prompt should take with all threads
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)


@dataclass(frozen=True)
class TuneRow:
    """The medians of one number of threads.

    decode: bytes of weights per second. prompt: multiply-adds per second. spread: how much the
    rounds differ, the larger of both; 0.1: the middle half is a tenth of the median wide.
    """

    threads: int
    decode: float
    prompt: float
    spread: float = 0.0


@dataclass(frozen=True)
class Tuning:
    """The result. rows: one for each candidate. others: the share of the processors' time that
    other programs had meanwhile, None: the system does not report it.
    """

    rows: list[TuneRow]
    others: float | None

    def doubt(self) -> str | None:
        """Why the result should not be kept; None: it can be."""
        if self.others is not None and self.others > MOST_OTHERS:
            return f"other programs took {self.others:.0%} of the processors' time meanwhile"
        spread = max(row.spread for row in self.rows)
        if spread > MOST_SPREAD:
            return f"the rounds differ by {spread:.0%}"
        return None


def candidates(cores: Cores) -> list[int]:
    """The numbers of threads to try: 1 to 4, then in growing steps, and whole clusters."""
    numbers, n = {*_STEPS, cores.n_cpus}, 0
    for cluster in cores.clusters:
        n += cluster.n_cores
        numbers.add(n)
    return sorted(i for i in numbers if i <= cores.n_cpus)


def best(rows: list[TuneRow]) -> int:
    """The number of threads to keep."""
    decode, prompt = max(row.decode for row in rows), max(row.prompt for row in rows)
    scores = {r.threads: math.sqrt(r.decode / decode * r.prompt / prompt) for r in rows}
    return min(n for n, score in scores.items() if score >= CLOSE * max(scores.values()))


def measure(cores: Cores) -> Tuning:
    """Measure all candidates. Raises MemoryBudgetError, UnsupportedError."""
    numbers = candidates(cores)
    cpus = [cpu for cluster in cores.clusters for cpu in cluster.cpus]
    with (
        written(buffer_bytes(largest_cache(), times=2)) as block,
        Chain(block, "Q4_0", (DIM, DIM), tokens=TOKENS) as chain,
    ):
        threads_of = {n: native.new_threads(n, cores.cpus(n)) for n in numbers}
        try:
            before = Times.now(cpus)
            rows = _take_turns(chain, threads_of)
            after = Times.now(cpus)
            return Tuning(rows, after.others_since(before) if before and after else None)
        finally:
            for threads in threads_of.values():
                ffi.release(threads)


def _take_turns(chain: Chain, threads_of: dict[int, Any]) -> list[TuneRow]:
    numbers = list(threads_of)
    chain.seconds(threads_of[numbers[-1]], TOKENS, 1)  # wakes the threads
    once = chain.seconds(threads_of[numbers[-1]], TOKENS, 1)
    n_layers = max(1, min(chain.n_layers, int(PROMPT_SECONDS / once)))
    decode: dict[int, list[float]] = {n: [] for n in numbers}
    prompt: dict[int, list[float]] = {n: [] for n in numbers}
    end = time.perf_counter() + SECONDS
    for i in range(MOST_ROUNDS):
        if i >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
        for n in numbers if i % 2 else reversed(numbers):
            decode[n].append(chain.seconds(threads_of[n], 1, chain.n_layers))
            prompt[n].append(chain.seconds(threads_of[n], TOKENS, n_layers))
    macs = TOKENS * n_layers * DIM * DIM
    median = statistics.median
    return [
        TuneRow(
            n,
            chain.n_bytes / median(decode[n]),
            macs / median(prompt[n]),
            max(_spread(decode[n]), _spread(prompt[n])),
        )
        for n in numbers
    ]


def _spread(seconds: list[float]) -> float:
    """The width of the middle half of the rounds, as a share of the median."""
    first, _, third = statistics.quantiles(seconds, n=4)
    return (third - first) / statistics.median(seconds)


@dataclass(frozen=True)
class Times:
    """Seconds of some processors since the start of the system, and of this process.

    all: passed. busy: used by any program, or by another machine that shares the processor.
    own: used by this process.
    """

    all: float
    busy: float
    own: float

    @classmethod
    def now(cls, cpus: Collection[int], stat: str = "/proc/stat") -> Times | None:
        """The times of some processors; None where the system does not report them."""
        names, spent = {f"cpu{cpu}" for cpu in cpus}, list[list[int]]()
        try:
            own = time.process_time()
            with open(stat, encoding="ascii") as lines:
                for line in lines:
                    name, *numbers = line.split()
                    if name in names:  # user nice system idle iowait irq softirq steal
                        spent.append([int(number) for number in numbers[:8]])
        except (OSError, ValueError):
            return None
        if len(spent) != len(names) or any(len(numbers) < 5 for numbers in spent):
            return None
        tick = 1 / os.sysconf("SC_CLK_TCK")
        total = sum(map(sum, spent)) * tick
        return cls(total, total - sum(numbers[3] + numbers[4] for numbers in spent) * tick, own)

    def others_since(self, before: Times) -> float:
        """The share of the processors' time that other programs had since `before`, 0 to 1."""
        passed = self.all - before.all
        others = self.busy - before.busy - (self.own - before.own)
        return min(1.0, max(0.0, others / passed)) if passed > 0 else 0.0
