"""Time from starting `edge-run complete` to its first character, as a whole process.

    python tests/bench/first_token.py [MODEL.gguf] [--prompt 20] [--runs 7] [--threads N]

The first run packs the model where the cache does not have it yet, and warms the page cache; it is
not counted. Peak memory is what the process says of itself (mapped weights count).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
TEXT = ROOT / "tests" / "data" / "english.txt"
#: Prints as many tokens of the text as asked; a process of its own, so that ours stays small.
CUT = """
import sys
from edge.weights.model_file import open_model
from edge.disk.pull import default_model
from edge.tokenizer import Tokenizer
tokenizer = Tokenizer.from_metadata(open_model(sys.argv[1] or default_model()).metadata)
ids = tokenizer.encode(open(sys.argv[2], encoding="utf-8").read())
sys.stdout.buffer.write(tokenizer.decode(ids[: int(sys.argv[3])]).encode())
"""


def prompt(model: str, n_tokens: int) -> str:
    """About n_tokens tokens of text: they may join differently without what followed."""
    command = [sys.executable, "-c", CUT, model, str(TEXT), str(n_tokens)]
    return subprocess.run(command, env=ENV, check=True, stdout=subprocess.PIPE).stdout.decode()


def first_token(command: list[str]) -> tuple[float, float, int]:
    """Seconds until the first byte on standard output, and until the end; peak memory in MiB."""
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=ENV, bufsize=0, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        said = process.stderr.read().decode()
    if process.returncode or not first:
        raise SystemExit(f"it ended with code {process.returncode} and no text: {said}")
    peak = re.search(r"peak memory ([0-9,]+) MiB", said)
    return seconds, time.perf_counter() - start, int(peak[1].replace(",", "")) if peak else 0


def main() -> None:
    """Run it some times and print the median and the extremes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="", help="the default model unless given")
    parser.add_argument("--prompt", type=int, default=20, help="tokens of the prompt")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    command = [sys.executable, "-m", "edge.cli", "complete", "--temperature", "0"]
    command += ["--max-tokens", "8", "--prompt", prompt(args.model, args.prompt)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += [args.model] if args.model else []
    runs = [first_token(command) for _ in range(args.runs + 1)][1:]
    first, whole, peaks = zip(*runs, strict=True)
    for what, seconds in (("first token", first), ("whole process", whole)):
        print(
            f"{what}: median {statistics.median(seconds):.3f} s, "
            f"{min(seconds):.3f} to {max(seconds):.3f} s in {args.runs} runs"
        )
    print(f"peak memory: {max(peaks)} MiB")


if __name__ == "__main__":
    main()
