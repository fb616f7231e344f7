"""`edge-run quantize`: a model in other types."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import memory_option, model_argument, threads_option
from edge.cli.status import duration
from edge.cli.terminal import Progress, mebibytes, note
from edge.errors import InputError

if TYPE_CHECKING:
    from edge.quantizer.job import Quantized


class Quantizing(Progress):
    """A bar for the weights of a model, or first for the damage that types do, with the time that
    is left.
    """

    def __init__(self) -> None:
        super().__init__("quantising")
        self._began: tuple[float, int] | None = None  # when the first call came, and its weights
        self._last = 0

    def text(self, done: int, total: int) -> str:
        """`quantising [##........]  20 %, 1:19 left`."""
        now = time.monotonic()
        if self._began is None or done < self._last:  # or the weights begin
            self._began = now, done  # what an earlier run did counts for no speed
        self._last = done
        seconds, n = now - self._began[0], done - self._began[1]
        left = f", {duration((total - done) * seconds / n)} left" if n > 0 else ""
        return super().text(done, total) + left


@click.command(short_help=COMMANDS["quantize"])
@model_argument
@click.option("-o", "--output", metavar="FILE", help="The file to write.")
@click.option("--type", "type", metavar="TYPE", help="One type for all matrices, as Q4_0.")
@click.option(
    "--recipe",
    metavar="RECIPE",
    help="Which type each matrix gets: a mix of llama.cpp as Q4_K_M, a recipe that ships as "
    "dynamicgate-low, or a TOML file.",
)
@click.option("--size", metavar="SIZE", help="The most that the file may take, as 1.9GB.")
@click.option(
    "--bits",
    type=click.FloatRange(min=0, max=32, min_open=True),
    metavar="N",
    help="The most bits for each weight on average.",
)
@click.option(
    "--for-memory",
    metavar="SIZE",
    help="The most memory that the model may take when it runs, as 2GB.",
)
@click.option(
    "--min-speed",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="With these three: tokens/s on this machine, at least.",
)
@click.option(
    "--imatrix",
    "importance",
    metavar="MATRIX",
    help="The importance matrix, a file of edge-run imatrix or llama-imatrix.",
)
@click.option(
    "--calibration",
    multiple=True,
    metavar="TEXT",
    help="A text for --rounding feedback, a UTF-8 file that the model runs; may be repeated.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "feedback"]),
    metavar="HOW",
    show_default="feedback with --calibration, else nearest",
    help="How weights are rounded: nearest, each alone to the nearest value; feedback, such that "
    "later columns make up for the errors of earlier ones.",
)
@memory_option
@threads_option
@click.option(
    "--explain",
    metavar="RECIPE.toml",
    help="Write no model, but the type of each matrix as a recipe; - writes it to stdout.",
)
@click.option("--force", is_flag=True, help="Replace FILE when it is there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def quantize(
    model: str | None, output: str | None, explain: str | None, force: bool, **options: Any
) -> None:
    """Write a model in other types, of fewer bits.

    MODEL should be the F16 or BF16 file; one that is quantised already loses twice. Say either
    --type or --recipe. A run that was cut goes on where it was when the same command is run again.
    """
    from edge.quantizer import job

    as_json = options.pop("as_json")
    if (output is None) == (explain is None):
        raise click.UsageError("say either --output or --explain")
    target = output if explain is None else explain
    if target != "-" and os.path.lexists(str(target)) and not force:
        raise InputError(f"{target} is there already: --force replaces it")
    path = model_path(model)
    if output is None:
        with Quantizing() as progress:
            result = job.explain(path, progress=progress, **options)
        if explain != "-":
            _write(Path(str(explain)), result.recipe)
    else:
        result = _run(path, output, options)
    if as_json:
        click.echo(json.dumps(asdict(result) | {"types": result.types}, ensure_ascii=False))
    elif explain == "-":
        click.echo(result.recipe, nl=False)
    else:
        click.echo("\n".join(_lines(str(target), result)))


def _run(path: str, output: str, options: dict[str, Any]) -> Quantized:
    """Write the model. Ctrl-C says how to go on."""
    from edge.quantizer import job

    try:
        with Quantizing() as progress:
            return job.quantize(path, output, progress=progress, **options)
    except KeyboardInterrupt:
        note("cut: the same command goes on from here")
        raise


def _write(path: Path, text: str) -> None:
    from edge.disk.atomic import replacing, write_all

    with replacing(path, f".{path.name}.") as file:
        write_all(file, text.encode())


def _lines(target: str, result: Quantized) -> list[str]:
    """The result for people."""
    kinds = ", ".join(f"{name} {n}" for name, n in result.types.items())
    lines = [f"{target}: {mebibytes(result.bytes)}, {result.bits_per_weight:.2f} bits a weight"]
    lines.append(f"tensors: {kinds}")
    if result.n_continued:
        lines.append(
            f"{result.n_continued} of {len(result.tensors)} were there from an earlier run"
        )
    if result.to_nearest:
        lines.append(f"{len(result.to_nearest)} matrices have rows that feedback did not improve")
    if result.path:
        lines.append(f"took {duration(result.seconds)}")
    return lines
