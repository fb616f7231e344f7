"""edge beside llama.cpp on the same models: a Markdown table of speeds and their ratios.

    python tests/bench/compare.py --peer-python PEER/bin/python MODEL.gguf...

Every round runs each runtime once per model and thread count, in a fresh process, one right after
the other, the first of them changing from round to round. A ratio is taken inside a round, so that
a machine that drifts hits both; the table has the median of the rounds and the extremes.
edge is that of this source tree (build it with scripts/build).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row of measurements: a model on so many threads."""

    model: Path
    threads: int


@dataclass(frozen=True)
class Round:
    """What both runtimes gave for a case, one right after the other."""

    case: Case
    edge: Result
    peer: Result


def cpu_name() -> str:
    """The CPU's name and count, as the system tells them."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} CPUs"


def runner(python: str, script: str, args: argparse.Namespace) -> Callable[[Case], Result]:
    """A function that measures one case with `script` under the interpreter `python`."""

    def measure(case: Case) -> Result:
        sizes = map(str, (case.threads, args.prompt, args.decode, args.repetitions))
        command = [python, str(HERE / script), str(case.model), *sizes]
        env = {**os.environ, "PYTHONPATH": str(ROOT)} if script == "run_edge.py" else None
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
        result: Result = json.loads(run.stdout.splitlines()[-1])
        return result

    return measure


def measure_all(args: argparse.Namespace) -> list[Round]:
    """All rounds of all cases; progress on stderr."""
    edge = runner(args.python, "run_edge.py", args)
    peer = runner(args.peer_python, "run_llamacpp.py", args)
    cases = [Case(model, threads) for model in args.models for threads in args.threads]
    rounds = []
    for i_round in range(args.rounds):
        for case in cases:
            if i_round % 2:
                theirs, ours = peer(case), edge(case)
            else:
                ours, theirs = edge(case), peer(case)
            rounds.append(Round(case, ours, theirs))
            print(
                f"round {i_round + 1}/{args.rounds} {case.model.stem} {case.threads}T: "
                + ", ".join(
                    f"{what} {ours[key]:.0f} / {theirs[key]:.0f}"
                    for what, key in (("prompt", "prompt_tps"), ("decode", "decode_tps"))
                ),
                file=sys.stderr,
            )
    return rounds


def rows(rounds: list[Round], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per case and phase: medians of both, median and extremes of the ratio."""
    table = []
    for case in dict.fromkeys(r.case for r in rounds):
        own = [r for r in rounds if r.case == case]
        for phase, key in ((f"prompt {args.prompt}", "prompt_tps"), ("decode", "decode_tps")):
            ratios = [r.edge[key] / r.peer[key] for r in own]
            table.append(
                {
                    "model": case.model.stem,
                    "threads": case.threads,
                    "phase": phase,
                    "edge_tps": statistics.median(r.edge[key] for r in own),
                    "peer_tps": statistics.median(r.peer[key] for r in own),
                    "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios),
                    "ratio_max": max(ratios),
                }
            )
    return table


def markdown(table: list[dict[str, Any]], rounds: list[Round], args: argparse.Namespace) -> str:
    """The table, with what was measured above it."""
    lines = [
        f"- CPU: {cpu_name()}",
        f"- edge: {rounds[0].edge['build']}",
        f"- llama.cpp: {rounds[0].peer['build']}",
        f"- {args.rounds} rounds, {args.repetitions} repetitions each; prompt of {args.prompt} "
        f"tokens; decode at depth 1 to {args.decode}; tokens/s, medians",
        "",
        "| model | threads | phase | edge | llama.cpp | ratio | lowest to highest |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in table:
        lines.append(
            "| {model} | {threads} | {phase} | {edge_tps:.0f} | {peer_tps:.0f} | **{ratio:.2f}** "
            "| {ratio_min:.2f} to {ratio_max:.2f} |".format(**row)
        )
    return "\n".join(lines)


def counts(text: str) -> list[int]:
    """`1,2` -> [1, 2]."""
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--python", default=sys.executable, help="interpreter for edge")
    parser.add_argument(
        "--threads", type=counts, default=[1, 2], metavar="N,N", help="1,2 unless told"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3, help="per round; their median counts")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens")
    parser.add_argument("--json", type=Path, help="write every round here too")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, keep the rounds."""
    args = arguments()
    rounds = measure_all(args)
    table = rows(rounds, args)
    print(markdown(table, rounds, args))
    if args.json:
        raw = [
            {"model": r.case.model.stem, "threads": r.case.threads, "edge": r.edge, "peer": r.peer}
            for r in rounds
        ]
        args.json.write_text(
            json.dumps({"cpu": cpu_name(), "table": table, "rounds": raw}, indent=1)
        )


if __name__ == "__main__":
    main()
