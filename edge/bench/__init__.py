"""Benchmarks: speeds, compared with the machine's limits and with other runtimes.

    settings = Settings((Case("prompt", 512), Case("decode", 64)), threads=(1, 2))
    report = Report("model.gguf", measure("model.gguf", settings), settings)
    print("\\n".join(report.lines()))

    runner.py    the steps of every measurement, and the adapters of other runtimes
    ours.py      the adapter of edge
    rounds.py    the rounds: edge alone in this process, or edge and others, a fresh process each
    __main__.py  one round of edge in a process of its own
    report.py    the results as rows, a table and JSON
    plot.py      the roofline
    tune.py      the best number of threads on this machine

Each file imports only from the files above it.
"""

from __future__ import annotations

from edge.bench.report import Report
from edge.bench.rounds import Peer, Settings, measure
from edge.bench.runner import PEERS, Case
from edge.loading import KV_TYPES

__all__ = ["KV_TYPES", "PEERS", "Case", "Peer", "Report", "Settings", "measure"]
