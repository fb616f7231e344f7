"""`edge-run imatrix`: an importance matrix, measured on a text."""

from __future__ import annotations

import os
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import (
    chunks_option,
    memory_option,
    model_argument,
    threads_option,
    window_option,
)
from edge.cli.terminal import Interrupt, Progress, mebibytes, note
from edge.device import memory
from edge.errors import CancelledError, InputError
from edge.files.text_file import TextFile
from edge.graph.ops import shown_name

if TYPE_CHECKING:
    from edge.quantizer.imatrix import Importance


@click.command(short_help=COMMANDS["imatrix"])
@model_argument
@click.option(
    "-f",
    "--file",
    "files",
    required=True,
    multiple=True,
    metavar="FILE",
    help="A text, a UTF-8 file; may be repeated.",
)
@click.option("-o", "--output", metavar="FILE", required=True, help="The file to write.")
@window_option
@chunks_option
@click.option("--process-output", is_flag=True, help="Measure what the output matrix reads, too.")
@click.option(
    "--attention-mixed",
    is_flag=True,
    help="For matrices of values, measure their inputs as attention mixes them: better than what "
    "llama-imatrix measures.",
)
@memory_option
@threads_option
@click.option("--force", is_flag=True, help="Replace the file when it is there.")
def imatrix(model: str | None, output: str, force: bool, **options: Any) -> None:
    """Measure an importance matrix: which inputs a text uses most.

    Quantisers weigh the errors of weights by it. The file is that of llama.cpp's llama-imatrix,
    and so is the method: windows of --context tokens that do not overlap, each run from an empty
    cache. MODEL should be the one that will be quantised, in F16, BF16 or Q8_0. Take a text of
    several kinds, of 50,000 tokens or more.
    """
    if os.path.lexists(output) and not force:
        raise InputError(f"{output} is there already: --force replaces it")
    files = [TextFile.open(name) for name in options["files"]]
    path = model_path(model, options["memory"])
    try:
        importance, figures = _measure(path, files, options)
    except CancelledError:
        raise click.exceptions.Exit(130) from None
    importance.datasets = options["files"]
    importance.write(output)
    for name, experts in importance.unreached().items():
        note(f"{shown_name(name)}: no token reached experts {', '.join(map(str, experts))}")
    click.echo(f"{output}: {len(importance.inputs)} matrices")
    note(figures)


def _measure(path: str, files: list[TextFile], options: dict[str, Any]) -> tuple[Importance, str]:
    """The importance matrix, and a line of figures. Ctrl-C raises CancelledError."""
    from edge.native.cancel import Cancel
    from edge.quantizer.activations import Activations
    from edge.quantizer.squares import measure

    cancel, how = Cancel(), {key: options[key] for key in ("context", "threads", "memory")}
    with ExitStack() as stack:
        with Progress("loading") as progress:
            activations = stack.enter_context(Activations.open(path, progress=progress, **how))
        with Interrupt(cancel.set), Progress("measuring") as progress:
            texts = activations.read(files)
            windows = activations.cut(texts, chunks=options["chunks"], cancel=cancel)
            del texts
            start = perf_counter()
            importance = measure(
                activations,
                windows,
                head=options["process_output"],
                mixed=options["attention_mixed"],
                progress=progress,
                cancel=cancel,
            )
        seconds, n = perf_counter() - start, len(windows.tokens) * windows.context
        return importance, (
            f"{len(windows.tokens)} windows of {windows.context} tokens, {n / seconds:.1f}/s; "
            f"peak memory {mebibytes(memory.peak() or 0)}"
        )
