"""Decode at a depth, by how keys and values are kept, edge beside its peers.

    python tests/bench/make_shape.py Q4_0 build/phi-4.gguf --layers 4
    python tests/bench/depth.py build/phi-4.gguf --peer-python llama.cpp=build/peer/bin/python

Types take turns inside a round, and so do the runtimes of a type, each in a fresh process: ratios
to a peer (which keeps them in the type nearest to ours) and to f16 are taken inside a round. The
context is filled to its depth by prompts; few layers keep that short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from table import add_peer_python, numbers, peers_of

from edge.bench import KV_TYPES, Case, Settings, measure
from edge.device.cores import cpu_name

#: (kv, depth, runtime) -> tokens per second of each round, or why there are none.
Speeds = dict[tuple[str, int, str], list[float] | str]


def one_round(model: str, settings: Settings, speeds: Speeds, builds: dict[str, str]) -> None:
    """Measure all depths with one type, once."""
    (measured,) = measure(model, settings)
    for name, (outcome,) in measured.rounds.items():
        if outcome.error is None:
            builds[name] = outcome.build
        for i, case in enumerate(settings.cases):
            key = (settings.kv, case.depth, name)
            if outcome.error is not None:
                speeds[key] = outcome.error
            elif isinstance(so_far := speeds.setdefault(key, []), list):
                so_far.append(outcome.speeds[i])


def ratio(speeds: Speeds, ours: tuple[str, int, str], other: tuple[str, int, str]) -> str:
    """The median of the rounds' ratios, and the extremes; or why there is none."""
    a, b = speeds[ours], speeds[other]
    if isinstance(a, str) or isinstance(b, str):
        return (b if isinstance(b, str) else str(a)).replace("|", "/")
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"**{statistics.median(ratios):.2f}** ({spread})"


def markdown(speeds: Speeds, peers: list[str]) -> str:
    """A row for each depth and type: edge's speed, and its ratios."""
    lines = [
        "| depth | keys and values | edge, tokens/s | to f16 | "
        + "".join(f"{name}, tokens/s | to {name} | " for name in peers).rstrip(),
        f"| ---: | --- | ---: | ---: |{' ---: | ---: |' * len(peers)}",
    ]
    for kv, depth, name in sorted(speeds, key=lambda key: (key[1], list(KV_TYPES).index(key[0]))):
        ours, f16 = (kv, depth, "edge"), ("f16", depth, "edge")
        if name != "edge":
            continue
        cells = [f"{depth:,}", kv, median(speeds[ours])]
        cells.append(ratio(speeds, ours, f16) if kv != "f16" and f16 in speeds else "")
        for peer in peers:
            theirs = (kv, depth, peer)
            cells += [median(speeds[theirs]), ratio(speeds, ours, theirs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def median(rounds: list[float] | str) -> str:
    """A speed for the table."""
    return "" if isinstance(rounds, str) else f"{statistics.median(rounds):.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL.gguf")
    add_peer_python(parser)
    parser.add_argument("--kv", default="f16,q8,q4", metavar="TYPE,...", help=", ".join(KV_TYPES))
    parser.add_argument("--depth", type=numbers, default=(4096, 16384), metavar="N,N")
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all rounds here")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, keep the rounds."""
    args = arguments()
    kvs, peers = args.kv.split(","), peers_of(args.peer_python, "")
    cases = tuple(Case("decode", args.decode, depth) for depth in args.depth)
    speeds: Speeds = {}
    builds: dict[str, str] = {}
    for i in range(args.rounds):
        for j in range(len(kvs)):
            kv = kvs[(i + j) % len(kvs)]
            print(f"round {i + 1}/{args.rounds}, {kv}", file=sys.stderr)
            one_round(args.model, Settings(cases, (args.threads,), 1, peers, kv), speeds, builds)
        if args.json:
            rows: list[dict[str, Any]] = [
                {"kv": kv, "depth": depth, "runtime": name, "tokens_per_second": rounds}
                for (kv, depth, name), rounds in speeds.items()
            ]
            result = {"model": args.model, "cpu": cpu_name(), "threads": args.threads}
            args.json.write_text(json.dumps(result | {"builds": builds, "results": rows}, indent=1))
    print(f"- CPU: {cpu_name()}, {args.threads} threads")
    print(f"- {args.rounds} rounds, medians")
    print("\n".join(f"- {name}: {build}" for name, build in builds.items()) + "\n")
    print(markdown(speeds, [peer.name for peer in peers]))


if __name__ == "__main__":
    main()
