"""What other work on the machine costs: decode with and without busy processes beside it.

    python tests/bench/busy.py MODEL.gguf --peer-python llama.cpp=build/peer/bin/python

Rounds of quiet and of noise take turns. A runtime that loses no more than its share of the CPUs
keeps CPUs / (tasks + threads) of its quiet speed; one whose threads wait for each other keeps less.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from table import add_peer_python, measure, peers_of

from edge.bench import Case, Settings


@contextlib.contextmanager
def noise(n_tasks: int) -> Iterator[None]:
    """n_tasks processes that do nothing but compute."""
    spin = [sys.executable, "-c", "while True: pass"]
    tasks = [subprocess.Popen(spin) for _ in range(n_tasks)]
    try:
        yield
    finally:
        for task in tasks:
            task.kill()
            task.wait()


def speeds(model: str, settings: Settings) -> dict[str, float | str]:
    """Runtime -> tokens per second of one round, or why there is none."""
    (measured,) = measure(model, settings)
    outcomes = {name: rounds[0] for name, rounds in measured.rounds.items()}
    return {name: o.error or o.speeds[0] for name, o in outcomes.items()}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    add_peer_python(parser)
    parser.add_argument("--tasks", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=16)
    args = parser.parse_args()
    cases, peers = (Case("decode", args.decode),), peers_of(args.peer_python, "")
    settings = Settings(cases, (args.threads,), 1, peers)
    quiet: list[dict[str, float | str]] = []
    noisy: list[dict[str, float | str]] = []
    for i in range(args.rounds):
        print(f"round {i + 1}/{args.rounds}", file=sys.stderr)
        quiet.append(speeds(args.model, settings))
        with noise(args.tasks):
            noisy.append(speeds(args.model, settings))
    cpus = os.cpu_count() or 1
    share = min(1.0, cpus / (args.tasks + args.threads))
    print(f"{args.tasks} busy tasks, {args.threads} threads, {cpus} CPUs: the share is {share:.0%}")
    print("\n| runtime | quiet, tokens/s | busy, tokens/s | kept |\n| --- | ---: | ---: | ---: |")
    for name in quiet[0]:
        both = [(a[name], b[name]) for a, b in zip(quiet, noisy, strict=True)]
        good = [(a, b) for a, b in both if isinstance(a, float) and isinstance(b, float)]
        if good:
            a, b = (statistics.median(values) for values in zip(*good, strict=True))
            kept = statistics.median(after / before for before, after in good)
            print(f"| {name} | {a:.1f} | {b:.1f} | {kept:.0%} |")
        else:
            print(f"| {name} | {both[0][0]} | | |")


if __name__ == "__main__":
    main()
