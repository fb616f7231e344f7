"""`edge-run advise`: which file of a model to take on this device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.options import context_option, memory_option, threads_option
from edge.cli.terminal import note, plain
from edge.errors import InputError
from edge.sizes import show

if TYPE_CHECKING:
    from edge.evaluate.advise import Advice, FileAdvice


@click.command(short_help=COMMANDS["advise"])
@click.argument("model", required=False)
@memory_option
@click.option(
    "--min-speed",
    type=click.FloatRange(min=0),
    metavar="N",
    help="Tokens per second that it must decode in an empty context.",
)
@context_option
@threads_option
@click.option("--verify", is_flag=True, help="Measure the files that are here and fit, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def advise(model: str | None, verify: bool, as_json: bool, **options: Any) -> None:
    """Say which file of a model to take on this device.

    MODEL is a folder, a repository (owner/repo), of which only headers are read, or a file, which
    is compared with those of its family on this machine. Without MODEL: all models on this machine.
    What fits the memory, how fast each will be in an empty context and behind 4,096 and 32,768
    tokens, from matmuls that are timed for it, and what its types cost, which is an estimate: the
    error of its weights. Then one recommendation. Exit code 1 when nothing fits.
    """
    from edge.evaluate.advise import AdviceLimits
    from edge.evaluate.advise import advise as advise_on

    found = advise_on(model, AdviceLimits(**options), verify=verify, say=note)
    if not found:
        raise InputError("there are no models here: name a repository, or see `edge-run pull`")
    if as_json:
        click.echo(json.dumps({"models": [_facts(advice) for advice in found]}))
    else:
        click.echo("\n\n".join("\n".join(_lines(advice)) for advice in found))
    if not any(advice.recommended for advice in found):
        raise click.exceptions.Exit(1)


def _facts(advice: Advice) -> dict[str, Any]:
    """JSON values."""
    return {
        "family": asdict(advice.family) if advice.family else None,
        "recommended": advice.recommended.name if advice.recommended else None,
        "reason": advice.reason,
        "files": [_file_facts(file) for file in advice.files],
    }


def _file_facts(file: FileAdvice) -> dict[str, Any]:
    ledger = file.ledger
    return {
        "name": file.name,
        "path": file.at_hand.path,
        "type": file.type or None,
        "file_bytes": file.n_bytes,
        "problem": file.problem or None,
        "fits": file.fits,
        "needed_bytes": ledger.needed if ledger else None,
        "budget_bytes": ledger.budget if ledger else None,
        "context": ledger.context if ledger else None,
        "bits_per_weight": file.bits if ledger else None,
        "weight_error_estimated": file.error,
        "tokens_per_second": {str(depth): speed for depth, speed in file.speeds},
        "measured_tokens_per_second": file.measured,
        "prediction_error": file.off,
    }


def _lines(advice: Advice) -> Iterator[str]:
    """A family for people."""
    from edge.evaluate.advise import DEPTHS

    rows = [["", "file", "memory", "bits", "error", *(f"at {depth}" for depth in DEPTHS)]]
    verified = any(file.measured is not None for file in advice.files)
    rows[0] += ["measured", "off"] if verified else []
    rows += [_row(file, verified) for file in advice.files if file.ledger is not None]
    family = advice.family
    if family is not None:
        yield plain(family.name or family.architecture)
    if len(rows) > 1:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            first = f"{row[0]:<{widths[0]}}"
            rest = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            yield "  ".join([first, *rest]).rstrip()
    for file in advice.files:
        if file.problem:
            yield f"{plain(file.name)}: {plain(file.problem)}"
    yield ""
    if advice.recommended is not None:
        yield f"Take {plain(advice.recommended.name)}"
    yield f"{plain(advice.reason)}."


def _row(file: FileAdvice, verified: bool) -> list[str]:
    from edge.evaluate.advise import DEPTHS

    assert file.ledger is not None
    speeds = dict(file.speeds)
    row = [plain(file.name), show(file.n_bytes), show(file.ledger.needed), f"{file.bits:.2f}"]
    row.append("?" if file.error is None else f"{file.error:.1%}")
    row += [f"{speeds[depth]:.1f}" if depth in speeds else "-" for depth in DEPTHS]
    if not file.fits:
        row[5] = "too large"
    if verified:
        row.append("-" if file.measured is None else f"{file.measured:.1f}")
        row.append("-" if file.off is None else f"{file.off:+.0%}")
    return row
