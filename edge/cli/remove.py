"""`edge-run remove`."""

from __future__ import annotations

import click

from edge.cli import COMMANDS
from edge.cli.terminal import plain
from edge.sizes import show


@click.command(short_help=COMMANDS["remove"])
@click.argument("name")
def remove(name: str) -> None:
    """Remove a model that was fetched.

    NAME is what `edge-run list` shows, a short name, or owner/repo, all of whose GGUF models go.
    What a cut download has left goes too. Files that are not GGUF stay, and the models of other
    programs.
    """
    from edge.hub import remove as library

    for model in library.remove(name):
        click.echo(f"removed {plain(model.name)}: {show(model.n_bytes)}")
