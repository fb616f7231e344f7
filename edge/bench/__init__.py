"""Benchmarks: speeds beside what the machine can do, and beside other runtimes.

    settings = Settings((Case("prompt", 512), Case("decode", 64)), threads=(1, 2))
    report = Report("model.gguf", measure("model.gguf", settings), settings)
    print("\\n".join(report.lines()))

rounds.py takes the measurements with the steps of runner.py, machine.py finds the roofs, report.py
makes rows, a table and JSON of them, plot.py the roofline.
"""

from __future__ import annotations

from edge.bench.report import Report
from edge.bench.rounds import Peer, Settings, measure
from edge.bench.runner import PEERS, Case
from edge.loading import KV_TYPES

__all__ = ["KV_TYPES", "PEERS", "Case", "Peer", "Report", "Settings", "measure"]
