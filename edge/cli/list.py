"""`edge-run list`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.terminal import plain
from edge.errors import InputError
from edge.sizes import show

if TYPE_CHECKING:
    from edge.hub.stored import LocalModel


@click.command(short_help=COMMANDS["list"])
@click.argument("folder", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def list(folder: str | None, as_json: bool) -> None:
    """List the models on this machine.

    Those that `edge-run pull` fetched, and what Ollama and LM Studio have, which edge reads and
    never changes; each name serves wherever a MODEL does. With FOLDER: the GGUF models in that
    folder. The last lines say where all of them are kept.
    """
    from pathlib import Path

    from edge.hub import stored

    if folder is None:
        models = stored.stored()
    elif os.path.isdir(folder):
        models = stored.in_folder(Path(folder), folder, "folder", Path(folder))
    else:
        raise InputError(f"{folder}: there is no such folder")
    if as_json:
        facts = {"models": [_facts(model) for model in models]}
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(models)))


def _facts(model: LocalModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "place": model.place,
        "type": model.type or None,
        "bytes": model.n_bytes,
        "complete": model.complete,
        "folder": str(model.root),
        "paths": [str(path) for path in model.paths],
    }


def _lines(models: Sequence[LocalModel]) -> Iterator[str]:
    """A line for each model, then the folders."""
    if not models:
        yield "no models: `edge-run pull` fetches one"
        return
    rows = [(plain(m.name), plain(m.type) or "-", show(m.n_bytes), _place(m)) for m in models]
    name, kind, size = (max(len(row[i]) for row in rows) for i in range(3))
    for row in rows:
        yield f"{row[0]:<{name}}  {row[1]:<{kind}}  {row[2]:>{size}}  {row[3]}"
    for root, place in {model.root: model.place for model in models}.items():
        yield f"{place}: {plain(str(root))}"


def _place(model: LocalModel) -> str:
    if model.complete:
        return model.place
    return f"{model.place}, cut off: the same pull goes on, `edge-run remove` removes it"
