"""Time from starting `edge-run complete` to its first character, as a whole process.

    python tests/bench/first_token.py [MODEL.gguf] [--runs 7] [--threads N]

The prompt has about 20 tokens; the first run only warms the page cache and is not counted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = (
    "The lighthouse keeper climbed the stairs each evening to light the lamp, and from there he"
)


def first_token_seconds(command: list[str]) -> tuple[float, float]:
    """Seconds until the first byte on standard output, and until the process has ended."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not first:
        raise SystemExit(f"{command[0]} ended with code {process.returncode} and no text")
    return seconds, time.perf_counter() - start


def main() -> None:
    """Run it some times and print the median and the extremes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", help="the default model unless given")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    command = [sys.executable, "-m", "edge.cli", "complete", "--quiet"]
    command += ["--temperature", "0", "--max-tokens", "8", "--prompt", PROMPT]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += [args.model] if args.model else []
    runs = [first_token_seconds(command) for _ in range(args.runs + 1)][1:]
    for what, seconds in zip(
        ("first token", "whole process"), zip(*runs, strict=True), strict=True
    ):
        print(
            f"{what}: median {statistics.median(seconds):.3f} s, "
            f"{min(seconds):.3f} to {max(seconds):.3f} s in {args.runs} runs"
        )


if __name__ == "__main__":
    main()
