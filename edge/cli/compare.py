"""`edge-run compare`: size, quality, speed and memory of a model's files, beside one another."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import (
    chunks_option,
    layout_option,
    memory_option,
    open_text,
    plot_path,
    threads_option,
    window_option,
)
from edge.cli.status import duration
from edge.cli.terminal import Interrupt, Progress, note, plain
from edge.errors import CancelledError, EdgeError
from edge.sizes import show

if TYPE_CHECKING:
    from edge.evaluate.table import Comparison, Evaluation

#: The columns of the table, and whether each is of numbers.
_COLUMNS = {
    "file": False,
    "recipe": False,
    "size": True,
    "bits": True,
    "in layers": True,
    "perplexity": True,
    "KL": True,
    "KL 99 %": True,
    "largest": True,
    "same top": True,
    "prompt/s": True,
    "decode/s": True,
    "memory": True,
}


@click.command(short_help=COMMANDS["compare"])
@click.argument("base")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-f", "--file", "text", required=True, metavar="TEXT", help="The text, in UTF-8.")
@window_option
@chunks_option
@click.option("--no-speed", is_flag=True, help="Measure no speed.")
@memory_option
@layout_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
@click.option("--markdown", is_flag=True, help="A table in Markdown.")
@click.option(
    "--plot",
    "picture_path",
    callback=plot_path,
    metavar="FILE",
    help="Draw size against KL divergence, a curve for each recipe: .png or .svg.",
)
def compare(
    base: str, files: tuple[str, ...], text: str, picture_path: str | None, **flags: Any
) -> None:
    """Compare files of a model: size, quality, speed and memory of each.

    BASE is the model that the files were made from, FILE... are the files; names of models work
    too. Quality is that of `edge-run perplexity --kl`: the perplexity of the text, the KL
    divergence from BASE (mean, 99th percentile, largest), and how often the most likely token is
    the same. Speed is that of `edge-run bench`, in rounds in which the files take turns. Memory is
    what `edge-run plan` counts for a window. Bits are per weight: of all tensors, and of the
    matrices in the layers.

    One model is in memory at a time, and where it does not fit, one part of its layers: its speed
    is not measured then. The base's logits take 4 bytes for each scored token and each token of
    the vocabulary, in the cache folder, until the end. After Ctrl-C or an error the results so far
    are shown.
    """
    if flags["as_json"] and flags["markdown"]:
        raise click.UsageError("--json and --markdown are two forms: choose one.")
    opened = open_text(text)
    from edge.evaluate import picture
    from edge.evaluate.table import Comparison, evaluate
    from edge.native.cancel import Cancel

    if picture_path:
        picture.require()  # before minutes of measuring
    comparison = Comparison(
        model_path(base, flags["memory"]),
        tuple(model_path(file, flags["memory"]) for file in files),
        flags["context"],
        flags["chunks"],
        not flags["no_speed"],
        flags["threads"],
        {"layout": flags["layout"], "memory": flags["memory"]},
    )
    cancel = Cancel()
    found: list[Evaluation] = []
    stopped: Exception | None = None
    try:
        with Interrupt(cancel.set), _TimedBars() as bars:
            for evaluation in evaluate(comparison, opened, progress=bars, cancel=cancel):
                found.append(evaluation)
    except CancelledError:
        stopped = click.exceptions.Exit(130)
    except (EdgeError, OSError) as error:
        stopped = error
    if len(found) > 1 or not stopped:
        _show(found, comparison, text, flags)
    if stopped:
        raise stopped
    if picture_path:
        picture.draw(found, picture_path)


def _show(
    found: list[Evaluation], comparison: Comparison, text: str, flags: dict[str, Any]
) -> None:
    """Write the results in the form that was asked for."""
    if flags["as_json"]:
        click.echo(json.dumps(_as_dict(found, comparison, text), ensure_ascii=False))
        return
    rows = [_cells(evaluation) for evaluation in found]
    lines = _markdown(rows) if flags["markdown"] else _table(rows)
    click.echo("\n".join(lines))
    base = found[0].perplexity
    missing = len(comparison.paths) - len(found)
    note(
        f"{base.n_windows} windows of {comparison.context} tokens, {base.n_scored:,} scored; "
        "± is a standard error"
        + (f"; {missing} file{'s' * (missing > 1)} not measured" if missing else "")
    )


def _as_dict(found: list[Evaluation], comparison: Comparison, text: str) -> dict[str, Any]:
    """The results as JSON values, the base first. Sizes are in bytes, speeds in tokens/s."""
    files = []
    for e in found:
        row = asdict(e.facts) | {"perplexity": e.perplexity.perplexity, "error": e.perplexity.error}
        if e.divergence is not None:
            divergence = asdict(e.divergence)
            del divergence["model"], divergence["base"]
            row["divergence"] = divergence
        if e.prompt_speed is not None:
            row |= {"prompt_speed": e.prompt_speed, "decode_speed": e.decode_speed}
        files.append(row)
    return {
        "text": text,
        "context": comparison.context,
        "n_windows": found[0].perplexity.n_windows,
        "n_scored": found[0].perplexity.n_scored,
        "is_complete": len(found) == len(comparison.paths),
        "files": files,
    }


def _cells(e: Evaluation) -> list[str]:
    """A row of the table, in the order of _COLUMNS."""
    facts, p, d = e.facts, e.perplexity, e.divergence
    quality = ["-"] * 4
    if d is not None:
        quality = [f"{d.kl:.5f} ± {d.kl_error:.5f}", f"{d.kl_99:.4f}", f"{d.kl_max:.4f}"]
        quality.append(f"{100 * d.top1:.2f} %")
    speeds = ["-" if s is None else f"{s:.1f}" for s in (e.prompt_speed, e.decode_speed)]
    return [
        plain(os.path.basename(facts.path).removesuffix(".gguf")),
        plain(facts.recipe) if d is not None else "(base)",
        show(facts.n_bytes),
        f"{facts.bits:.3f}",
        f"{facts.layer_bits:.3f}",
        f"{p.perplexity:.4f} ± {p.error:.4f}",
        *quality,
        *speeds,
        show(facts.memory_bytes),
    ]


def _columns(rows: list[list[str]]) -> list[list[str]]:
    """The columns, each under its name, without those that were not measured."""
    columns = zip(_COLUMNS, *rows, strict=True)
    return [[name, *cells] for name, *cells in columns if {*cells} != {"-"}]


def _table(rows: list[list[str]]) -> list[str]:
    """The table for people."""
    padded = []
    for name, *cells in _columns(rows):
        width = max(map(len, [name, *cells]))
        pad = str.rjust if _COLUMNS[name] else str.ljust
        padded.append([pad(cell, width) for cell in (name, *cells)])
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _markdown(rows: list[list[str]]) -> list[str]:
    """The table in Markdown."""
    columns = []
    for name, *cells in _columns(rows):
        rule = "---:" if _COLUMNS[name] else "---"
        columns.append([name, rule, *(cell.replace("|", "\\|") for cell in cells)])
    return [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]


class _Timed(Progress):
    """A bar with the time that is left."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._began: tuple[float, int] | None = None  # when the first call came, and what was done

    def text(self, done: int, total: int) -> str:
        """`measuring [##........]  20 %, 0:19 left`."""
        now = time.monotonic()
        self._began = self._began or (now, done)
        seconds, n = now - self._began[0], done - self._began[1]
        line = super().text(done, total)
        return f"{line}, {duration((total - done) * seconds / n)} left" if n > 0 else line


class _TimedBars:
    """One bar on the terminal at a time, for what is being done; each goes on where it stopped."""

    def __init__(self) -> None:
        self._bars: dict[str, _Timed] = {}
        self._last: _Timed | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._last is not None and self._last is not self._bars.get(what):
            self._last.clear()
        if done == 0 and what == "loading":  # each model is loaded anew
            self._bars.pop(what, None)
        self._last = self._bars.setdefault(what, _Timed(what))
        self._last(done, total)

    def __enter__(self) -> _TimedBars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._last is not None:
            self._last.clear()
