"""Peak memory of `edge-run export`, a whole process, beside the size of the model's file.

    python tests/bench/export_memory.py MODEL.gguf [--dialect cpu] [--max-ratio 1.2] [-- MORE ...]

Pages of the file that are mapped count, as long as they are in memory. What follows `--` goes to
`edge-run export`. With --max-ratio, more is an exit code of 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20


def main() -> None:
    """Export into a folder that goes with the process, and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dialect", default="cpu")
    parser.add_argument("--max-ratio", type=float, help="peak memory by the size of the file")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args, more = parser.parse_args(given[:cut]), given[cut + 1 :]
    with tempfile.TemporaryDirectory(dir=args.model.parent) as folder:
        command = [sys.executable, "-m", "edge.cli", "export", str(args.model), "-o"]
        command += [f"{folder}/out", "--dialect", args.dialect, *more]
        start = time.perf_counter()
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        seconds = time.perf_counter() - start
        written = sum(file.stat().st_size for file in Path(folder, "out").iterdir())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    size = args.model.stat().st_size
    print(
        f"{args.model.name}: {size / MIB:,.0f} MiB; peak memory {peak / MIB:,.0f} MiB, "
        f"{peak / size:.2f} of it; {written / MIB:,.0f} MiB written in {seconds:.0f} s "
        f"({used.ru_utime + used.ru_stime:.0f} s of CPU)"
    )
    if args.max_ratio is not None and peak > args.max_ratio * size:
        raise SystemExit(f"more than {args.max_ratio} of the file")


if __name__ == "__main__":
    main()
