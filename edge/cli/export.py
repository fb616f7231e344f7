"""`edge-run export`: a model as ONNX graphs."""

from __future__ import annotations

import json
from typing import Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import context_option, model_argument
from edge.cli.terminal import Progress, mebibytes
from edge.onnx.providers.providers import RUNNERS, WEIGHT_FORMS


@click.command(short_help=COMMANDS["export"])
@model_argument
@click.option("-o", "--output", metavar="DIR", required=True, help="The folder to write.")
@click.option(
    "--dialect",
    type=click.Choice(["cpu", "npu"]),
    required=True,
    help="cpu: for onnxruntime and onnxruntime-genai on a processor; npu: static graphs of plain "
    "operators.",
)
@context_option
@click.option(
    "--ep",
    type=click.Choice(RUNNERS),
    help="npu: the execution provider that the graphs are made for.",
    show_default="qnn",
)
@click.option(
    "--chunk",
    type=click.Choice(["64", "128"]),
    help="npu: tokens of a prompt that go through at once.",
    show_default="64",
)
@click.option(
    "--weights",
    type=click.Choice(WEIGHT_FORMS),
    help="npu: the form of the weights.",
    show_default="the best that the provider takes",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="npu: a text on which int8 finds the ranges of activations.",
    show_default="edge's own",
)
@click.option(
    "--soc",
    "socs",
    multiple=True,
    metavar="NAME",
    help="npu: compile for this SoC ahead of time, as sm8650; may be given again.",
)
@click.option("--force", is_flag=True, help="Replace DIR when it is an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def export(model: str | None, output: str, force: bool, as_json: bool, **options: Any) -> None:
    """Write a model as ONNX graphs, for NPUs and for onnxruntime.

    Exporting needs the package onnx, running an export onnxruntime; `edge-run devices` says how to
    get them. DIR is new or empty. It gets the tokenizer, too, and serves wherever a MODEL does;
    onnxruntime-genai loads dialect cpu. Weights stay as they are in MODEL, but for
    those that an NPU wants in another form.
    """
    from edge.onnx.export.export import Recipe
    from edge.onnx.export.export import export as write

    if options["chunk"] is not None:
        options["chunk"] = int(options["chunk"])
    options["socs"] = options["socs"] or None
    recipe = Recipe(**options)
    path = model_path(model)
    with Progress("exporting") as progress:
        facts = write(path, output, recipe, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps({"path": output, "model": path, **facts}, ensure_ascii=False))
    else:
        click.echo(f"{output}: {mebibytes(facts['bytes'])}")
