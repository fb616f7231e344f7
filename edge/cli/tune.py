"""`edge-run tune`: the best number of threads on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import click

from edge.cli import COMMANDS


@click.command(short_help=COMMANDS["tune"])
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def tune(as_json: bool) -> None:
    """Measure the best number of threads, and keep it for this machine.

    Decoding and prompts are measured with growing numbers of threads, in about two seconds; let the
    machine do nothing else meanwhile. The best number is kept in the cache folder and is what is
    used from then on, but for --threads and EDGE_THREADS.
    """
    from edge import cores
    from edge.bench import tune as measuring

    machine = cores.Cores.now()
    rows = measuring.measure(machine)
    n = measuring.best(rows)
    path = cores.store(n, machine)
    if as_json:
        facts = {"threads": n, "cpus": machine.cpus(n), "cpu": cores.cpu_name(), "file": str(path)}
        click.echo(json.dumps({**facts, "rows": [asdict(row) for row in rows]}))
        return
    click.echo(f"{cores.cpu_name()}\n\nthreads  decoding, GB/s  prompts, GMAC/s")
    for row in rows:
        mark = "  best" if row.threads == n else ""
        click.echo(f"{row.threads:>7}{row.decode / 1e9:>16.2f}{row.prompt / 1e9:>17.2f}{mark}")
    click.echo(f"\nkept in {path}")
    if setting := os.environ.get("EDGE_THREADS"):
        click.echo(f"EDGE_THREADS={setting} is set and comes before it")
