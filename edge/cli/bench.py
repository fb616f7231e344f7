"""`edge-run bench`: tokens per second of the engine alone, on random tokens."""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.terminal import Progress, mebibytes, peak_memory

if TYPE_CHECKING:
    from edge.engine import Engine
    from edge.kv import KVCache


def _counts(ctx: click.Context, _: click.Parameter, value: str | None) -> tuple[int | None, ...]:
    """`1,2` -> (1, 2); None: the engine's own choice."""
    if value is None:
        return (None,)
    parts = value.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of thread counts, such as 1,2.")
    return tuple(int(part) for part in parts)


@click.command(short_help=COMMANDS["bench"])
@click.argument("model", required=False)
@click.option(
    "--prompt",
    "n_prompt",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of a prompt; 0: do not measure.",
)
@click.option(
    "--decode",
    "n_decode",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens to decode one by one, from an empty context; 0: do not measure.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Measurements, after one that does not count.",
)
@click.option(
    "-t",
    "--threads",
    callback=_counts,
    metavar="N,N,...",
    show_default="the cores that help",
    help="Thread counts to measure.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def bench(
    model: str | None,
    n_prompt: int,
    n_decode: int,
    repeat: int,
    threads: tuple[int | None, ...],
    as_json: bool,
) -> None:
    """Measure prompt and decode speed.

    Tokens per second of the engine alone, on random tokens: the median of the measurements, and
    the slowest and fastest of them.
    """
    if not n_prompt and not n_decode:
        raise click.UsageError("--prompt 0 and --decode 0 leave nothing to measure.")
    from edge.engine import Engine
    from edge.store import default_model

    path = model if model is not None else str(default_model())
    tests = [test for test in (("prompt", n_prompt), ("decode", n_decode)) if test[1]]
    rows: list[dict[str, Any]] = []
    for n_threads in threads:
        with Progress("loading") as progress:
            engine = Engine.load(
                path, context=max(n_prompt, n_decode), threads=n_threads, progress=progress
            )
        try:
            facts = {"isa": engine.isa, "packed_bytes": engine.packed_bytes}
            rows += _measure(engine, tests, repeat)
        finally:
            engine.close()
    result = {"model": path, **facts, "peak_bytes": peak_memory(), "results": rows}
    click.echo(json.dumps(result) if as_json else "\n".join(_lines(result)))


def _measure(engine: Engine, tests: list[tuple[str, int]], repeat: int) -> list[dict[str, Any]]:
    """One row per test; the tests take turns, so that a slow minute hits both."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name, _ in tests}
    cache = engine.cache()
    n_rounds = repeat + 1
    try:
        with Progress(f"measuring, threads {engine.threads}") as progress:
            for i_round in range(n_rounds):
                for i, (name, n) in enumerate(tests):
                    tokens = [rng.randrange(engine.n_vocab) for _ in range(n)]
                    seconds[name].append(_time(engine, cache, tokens, at_once=name == "prompt"))
                    progress(i_round * len(tests) + i + 1, n_rounds * len(tests))
    finally:
        cache.close()
    rows = []
    for name, n in tests:
        speeds = [n / s for s in seconds[name][1:]]
        rows.append(
            {
                "threads": engine.threads,
                "test": name,
                "tokens": n,
                "median": statistics.median(speeds),
                "min": min(speeds),
                "max": max(speeds),
                "tokens_per_second": speeds,
            }
        )
    return rows


def _time(engine: Engine, cache: KVCache, tokens: list[int], *, at_once: bool) -> float:
    """Seconds to run the tokens from an empty cache: in chunks, or one by one."""
    cache.trim(0)
    step = engine.chunk if at_once else 1
    start = time.perf_counter()
    for i in range(0, len(tokens), step):
        last = not at_once or i + step >= len(tokens)
        engine.run(cache, tokens[i : i + step], logits="last" if last else "none")
    return time.perf_counter() - start


def _lines(result: dict[str, Any]) -> list[str]:
    peak = f", peak memory {mebibytes(result['peak_bytes'])}" if result["peak_bytes"] else ""
    packed = mebibytes(result["packed_bytes"])
    lines = [
        f"{result['model']}: kernels {result['isa']}, packed weights {packed}{peak}",
        f"{'test':<12}{'threads':>8}{'median':>12}{'min':>12}{'max':>12}   tokens/s",
    ]
    for row in result["results"]:
        name = f"{row['test']} {row['tokens']}"
        speeds = "".join(f"{row[key]:12,.1f}" for key in ("median", "min", "max"))
        lines.append(f"{name:<12}{row['threads']:>8}{speeds}")
    return lines
