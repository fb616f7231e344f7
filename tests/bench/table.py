"""The table of README.md: models, tests and thread counts, edge beside its peers.

    python tests/bench/table.py --peer-python llama.cpp=build/peer/bin/python \\
        --peer-python ik=build/ik/bin/python --json build/table.json \\
        MODEL.gguf PHI.gguf=PHI-LLAMA.gguf...

MODEL=TWIN: ik loads TWIN, which holds the same matrices in an architecture that it knows. Each
round runs every runtime in a fresh process; a ratio is taken inside a round, so that a machine
that drifts hits both. After each model the JSON and the plot are written anew. edge is that of
this source tree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from edge.bench import KV_TYPES, PEERS, Case, Peer, Report, Settings, measure, plot
from edge.errors import EdgeError

Row = dict[str, Any]


def figure(row: Row) -> str:
    """What a row of edge reached of the roof that holds it."""
    if row["test"] == "decode":
        return f"{row['gigabytes_per_second']:.1f} GB/s, {row['bandwidth_share']:.0%}"
    return f"{row['gmacs_per_second']:.0f} GMAC/s, {row['peak_share']:.0%}"


def ratio(row: Row) -> str:
    """A peer's speed, and how many times as fast edge is."""
    if "error" in row:
        return row["error"].replace("|", "/")
    spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
    return f"{row['median']:.1f}: **{row['ratio']:.2f}** ({spread})"


def markdown(reports: list[Report], peers: list[str]) -> str:
    """The table, with what was measured above it."""
    results = [report.json() for report in reports]
    first = results[0]
    roofs = [roof for result in results for roof in result["roofs"]]
    lines = [f"- CPU: {first['cpu']}", f"- {first['rounds']} rounds, medians; tokens/s"]
    lines.append(f"- keys and values: {first['kv']}, of all runtimes")
    builds = {name: build for result in results for name, build in result["builds"].items()}
    lines += [f"- {name}: {build}" for name, build in builds.items()]
    for threads in dict.fromkeys(roof["threads"] for roof in roofs):
        own = [roof for roof in roofs if roof["threads"] == threads]
        low, high = min(r["read_min"] for r in own), max(r["read_max"] for r in own)
        peak = max(r["dot"] for r in own)
        lines.append(
            f"- {threads} threads: read bandwidth {low / 1e9:.1f} to {high / 1e9:.1f} GB/s in the "
            f"course of it, int8 peak {peak / 1e9:.0f} GMAC/s"
        )
    titles = ["model", "threads", "test", "edge", "of the machine", *peers]
    lines += [
        "",
        f"| {' | '.join(titles)} |",
        f"| --- | ---: | --- |{' ---: |' * (2 + len(peers))}",
    ]
    for result in results:
        lines += _lines(Path(result["model"]).stem, result["results"], peers)
    return "\n".join(lines)


def _lines(model: str, rows: list[Row], peers: list[str]) -> list[str]:
    lines = []
    for row in rows:
        if row["runtime"] != "edge":
            continue
        key = [row[name] for name in ("threads", "test", "tokens", "depth")]
        beside = {
            other["runtime"]: ratio(other)
            for other in rows
            if other["runtime"] != "edge"
            and [other[name] for name in ("threads", "test", "tokens", "depth")] == key
        }
        test = str(Case(row["test"], row["tokens"], row["depth"]))
        cells = [model, str(row["threads"]), test, f"{row['median']:.1f}", figure(row)]
        lines.append(f"| {' | '.join([*cells, *(beside[name] for name in peers)])} |")
    return lines


def numbers(text: str) -> tuple[int, ...]:
    """`1,2` -> (1, 2)."""
    return tuple(int(part) for part in text.split(","))


def pair(text: str) -> tuple[str, str]:
    """`NAME=PATH`."""
    name, _, path = text.partition("=")
    return name, path


def peers_of(pythons: list[tuple[str, str]], twin: str) -> tuple[Peer, ...]:
    """The peers to measure; twin: the file for ik, "" for the same."""
    return tuple(
        Peer(name, python, twin if twin and name.startswith("ik") else None)
        for name, python in pythons
    )


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """--peer-python, of all who measure peers."""
    parser.add_argument(
        "--peer-python",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"measure this peer ({', '.join(PEERS)}) with the Python that has it",
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", type=pair, nargs="+", metavar="MODEL.gguf[=TWIN.gguf]")
    add_peer_python(parser)
    parser.add_argument("--threads", type=numbers, default=(1, 2), metavar="N,N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=numbers, default=(512,), metavar="N,N")
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--depth", type=numbers, default=(0,), metavar="N,N")
    parser.add_argument("--kv", default="f16", choices=tuple(KV_TYPES))
    parser.add_argument("--layout", default="auto", choices=("auto", "fast", "compact"))
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--plot", type=Path, help="write the roofline here, .svg or .png")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, keep the rounds. A model that edge cannot run is left out."""
    args = arguments()
    cases = [Case("prompt", n) for n in args.prompt if n]
    cases += [Case("decode", args.decode, depth) for depth in args.depth if args.decode]
    names = [name for name, _ in args.peer_python]
    reports: list[Report] = []
    for path, twin in args.models:
        peers = peers_of(args.peer_python, twin)
        options = {"layout": args.layout}
        settings = Settings(tuple(cases), args.threads, args.rounds, peers, args.kv, options)

        def progress(what: str, done: int, total: int, stem: str = Path(path).stem) -> None:
            print(f"{stem}: {what}, {done}/{total}", file=sys.stderr)

        try:
            reports.append(Report(path, measure(path, settings, progress), settings))
        except EdgeError as e:
            print(f"{path} is left out: {e}", file=sys.stderr)
            continue
        if args.json:
            args.json.write_text(json.dumps([report.json() for report in reports], indent=1))
        if args.plot:
            plot.roofline(reports, args.plot)
    if not reports:
        raise SystemExit("no model could be measured")
    print(markdown(reports, names))


if __name__ == "__main__":
    main()
