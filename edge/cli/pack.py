"""`edge-run pack`: a packed file to ship."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import model_argument, threads_option
from edge.cli.terminal import Progress, mebibytes
from edge.errors import InputError
from edge.loading import LAYOUTS


@click.command(short_help=COMMANDS["pack"])
@model_argument
@click.option("-o", "--output", metavar="FILE", required=True, help="The file to write.")
@click.option(
    "--layout",
    type=click.Choice([name for name in LAYOUTS if name != "auto"]),
    default="fast",
    show_default=True,
    metavar="LAYOUT",
    help="How IQ weights lie in memory: fast; compact, which is smaller.",
)
@threads_option
@click.option("--force", is_flag=True, help="Replace FILE when it is there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def pack(model: str | None, output: str, force: bool, as_json: bool, **options: Any) -> None:
    """Write a packed file, which starts without packing.

    FILE holds the weights as they lie in memory, and everything else of the model: it serves
    wherever a MODEL does, on every machine, and the model itself is not needed any more. It is
    for this version of edge: keep the model to pack it again.
    """
    from edge.engine.describe import pack as write

    if os.path.lexists(output) and not force:
        raise InputError(f"{output} is there already: --force replaces it")
    path = model_path(model)
    with Progress("packing") as progress:
        n_bytes = write(path, output, progress=progress, **options)
    if as_json:
        result = {"path": output, "bytes": n_bytes, "model": path, "layout": options["layout"]}
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo(f"{output}: {mebibytes(n_bytes)}")
