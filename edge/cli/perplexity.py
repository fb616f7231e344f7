"""`edge-run perplexity`: how well a model predicts a text, alone or compared with a base model."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.answer import open_model
from edge.cli.options import (
    LOADING,
    chunks_option,
    layout_option,
    lora_option,
    memory_options,
    model_argument,
    open_text,
    threads_option,
    window_option,
)
from edge.cli.terminal import Interrupt, Progress, mebibytes, note
from edge.device import memory
from edge.errors import CancelledError

if TYPE_CHECKING:
    from edge.files.text_file import TextFile
    from edge.model import Model
    from edge.perplexity import Divergence, Perplexity


@click.command(short_help=COMMANDS["perplexity"])
@model_argument
@click.option("-f", "--file", required=True, metavar="FILE", help="The text, a UTF-8 file.")
@window_option
@click.option(
    "--session-context",
    type=click.IntRange(min=8),
    metavar="N",
    show_default="a window",
    help="Tokens that a session may hold: which LongRoPE factors are used goes by it.",
)
@chunks_option
@click.option(
    "--kl",
    "base",
    metavar="BASE",
    help="Compare with this model, such as the F16 file that MODEL was quantised from.",
)
@memory_options
@layout_option
@lora_option
@threads_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def perplexity(
    model: str | None, file: str, base: str | None, as_json: bool, **options: Any
) -> None:
    """Measure how well a model predicts a text: lower is better.

    The method is that of llama.cpp's llama-perplexity with its defaults: windows of --context
    tokens that do not overlap, the second half of each scored. With --kl also how far the model
    is from a base model with the same vocabulary: KL divergence, and how often both have the same
    most likely token; --lora is of MODEL alone. A number behind ± is a standard error.
    """
    text = open_text(file)
    with ExitStack() as stack:
        loading = {key: options[key] for key in LOADING}
        loading["context"] = options["session_context"] or options["context"]
        paths = (model, *([base] if base else []))
        adapted = [loading | {"lora": options["lora"]}, loading]
        loaded = [
            stack.enter_context(open_model(path, **how))
            for path, how in zip(paths, adapted, strict=False)
        ]
        measured = _measure(loaded, text, options)
        result = _as_dict(loaded, file, options["context"], measured)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(measured)))
        note(_figures(result))


def _measure(
    models: list[Model], file: TextFile, options: dict[str, Any]
) -> Perplexity | Divergence:
    """Measure the one model, or compare the first with the second. Ctrl-C exits with code 130."""
    from edge import perplexity as library
    from edge.native.cancel import Cancel

    cancel, context, chunks = Cancel(), options["context"], options["chunks"]
    try:
        with Interrupt(cancel.set), Progress("measuring") as progress:
            text = library.read(file, models, context, chunks)
            windows = library.cut(models[0], text, context=context, chunks=chunks, cancel=cancel)
            del text
            if len(models) == 1:
                return library.measure(models[0], windows, progress=progress, cancel=cancel)
            return library.compare(models[0], models[1], windows, progress=progress, cancel=cancel)
    except CancelledError:
        raise click.exceptions.Exit(130) from None


def _as_dict(
    models: list[Model], file: str, context: int, measured: Perplexity | Divergence
) -> dict[str, Any]:
    """The result as JSON values: the model's figures, then `base` and `divergence` with --kl."""
    from edge.perplexity import Divergence

    def row(model: Model, p: Perplexity) -> dict[str, Any]:
        facts = {"model": model.engine.path, **asdict(p)}
        if adapters := model.info().get("adapters"):
            facts["adapters"] = adapters
        return {**facts, "tokens_per_second": p.tokens_per_second}

    engine = models[0].engine
    result: dict[str, Any] = {"file": file, "context": context}
    if isinstance(measured, Divergence):
        facts = asdict(measured)
        del facts["model"], facts["base"]
        result |= row(models[0], measured.model)
        result |= {"base": row(models[1], measured.base), "divergence": facts}
    else:
        result |= row(models[0], measured)
    return result | {
        "isa": engine.isa,
        "threads": engine.threads,
        "peak_bytes": memory.peak(),
    }


def _lines(measured: Perplexity | Divergence) -> list[str]:
    """The result as lines for people."""
    from edge.perplexity import Perplexity

    if isinstance(measured, Perplexity):
        return [f"perplexity {measured.perplexity:.4f} ± {measured.error:.4f}"]
    d = measured
    rows = {
        "perplexity": f"{d.model.perplexity:.4f} ± {d.model.error:.4f}",
        "perplexity of the base": f"{d.base.perplexity:.4f} ± {d.base.error:.4f}",
        "ratio": f"{d.ratio:.5f} ± {d.ratio_error:.5f}",
        "KL divergence": f"{d.kl:.6f} ± {d.kl_error:.6f}",
        "median, 99 %, largest": f"{d.kl_median:.6f}, {d.kl_99:.6f}, {d.kl_max:.6f}",
        "same most likely token": f"{100 * d.top1:.2f} ± {100 * d.top1_error:.2f} %",
    }
    return [f"{name:<24}{value}" for name, value in rows.items()]


def _figures(result: dict[str, Any]) -> str:
    """One line: windows, tokens/s, peak memory, kernels."""
    parts = [
        f"{result['n_windows']} windows of {result['context']} tokens, "
        f"{result['n_scored']:,} scored, {result['tokens_per_second']:.1f}/s"
    ]
    if peak := result["peak_bytes"]:
        parts.append(f"peak memory {mebibytes(peak)}")
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    return "; ".join([*parts, f"kernels {result['isa']}, {threads}"])
