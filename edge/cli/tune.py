"""`edge-run tune`: the best number of threads on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import click

from edge.cli import COMMANDS
from edge.errors import UnsupportedError


@click.command(short_help=COMMANDS["tune"])
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def tune(as_json: bool) -> None:
    """Measure the best number of threads, and keep it for this machine.

    Decoding and prompts are measured with growing numbers of threads, in about two seconds; let the
    machine do nothing else meanwhile, or nothing is kept (exit code 1). The best number, which is
    the fewest threads within 3 % of the best speed, is kept in the cache folder and is what is used
    from then on, but for --threads and EDGE_THREADS.
    """
    from edge.bench import tune as measuring
    from edge.device import cores

    machine = cores.Cores.now()
    measured = measuring.measure(machine)
    rows, doubt = measured.rows, measured.doubt()
    n = measuring.best(rows)
    path = None if doubt else cores.store(n, machine)
    if as_json:
        facts = {"threads": n, "cpus": machine.cpus(n), "cpu": cores.cpu_name()}
        facts |= {"file": path and str(path), "others": measured.others, "doubt": doubt}
        click.echo(json.dumps({**facts, "rows": [asdict(row) for row in rows]}))
    else:
        click.echo(f"{cores.cpu_name()}\n\nthreads  decoding, GB/s  prompts, GMAC/s  spread")
        for row in rows:
            mark = "  best" if row.threads == n else ""
            speeds = f"{row.decode / 1e9:>16.2f}{row.prompt / 1e9:>17.2f}{row.spread:>8.0%}"
            click.echo(f"{row.threads:>7}{speeds}{mark}")
        click.echo(f"\nbest: {measuring.RULE}")
        click.echo(f"kept in {path}" if path else "nothing is kept")
        if setting := os.environ.get("EDGE_THREADS"):
            click.echo(f"EDGE_THREADS={setting} is set and comes before it")
    if doubt:
        raise UnsupportedError(
            f"{doubt}, so nothing is kept: run it again when the machine is idle, or set "
            "EDGE_THREADS to what you want",
            what="tune",
        )
