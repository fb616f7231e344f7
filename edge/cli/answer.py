"""Streaming an answer to the terminal: the part that `chat` and `complete` share."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edge.cli.models import model_path
from edge.cli.single import as_dict
from edge.cli.status import Status
from edge.cli.terminal import Interrupt, Progress, Writer, figures, note

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edge.cli.options import AnswerSettings
    from edge.loading import LoadOptions
    from edge.model import Model
    from edge.session.chat import Message
    from edge.session.results import Completion


def open_model(path: str | None, **options: Unpack[LoadOptions]) -> Model:
    """Load a model, and show a progress bar on a terminal. path: a MODEL; None: the default."""
    import edge

    path = path and model_path(path, options.get("memory"))
    gc.disable()  # a vocabulary makes a million objects, and none of them is garbage
    try:
        with Progress("loading") as progress:
            model = edge.load(path, progress=progress, **options)
        try:
            _ = model.tokenizer
        except BaseException:
            model.close()
            raise
        gc.freeze()
    finally:
        gc.enable()
    return model


def explain(model: Model, settings: AnswerSettings) -> None:
    """With --explain, say on stderr what runs the model."""
    if settings.explain:
        from edge.cli.report import explain_lines

        note("\n".join(explain_lines(model.engine)))


def stream(
    source: Any, prompt: str | Message, *, show: bool = True, quiet: bool = False, **options: Any
) -> Completion:
    """Stream the answer of a Session or Chat to stdout, and return the completion.

    source: the Session or Chat. options: arguments of its stream(). show: write the text.
    quiet: show no status. Ctrl-C stops the answer (finish_reason "cancelled"); a second Ctrl-C
    raises KeyboardInterrupt.
    """
    with (
        Interrupt(source.cancel) as interrupt,
        Progress("reading the prompt") as progress,
        Status(options.get("max_tokens"), shown=show, quiet=quiet) as status,
    ):
        writer = Writer()
        pieces = source.stream(prompt, progress=progress, **options)
        if interrupt.hit:  # Ctrl-C came before the stream existed
            pieces.cancel()
        for piece in pieces:
            progress.clear()
            if show:
                writer.write(piece.text)
            status(writer.column, piece.token, pieces.usage.prompt_tokens)
    completion: Completion = pieces.completion
    return completion


def report(model: Model, completion: Completion, settings: AnswerSettings) -> None:
    """Write to stderr the figures of an answer, and why it ended if the context is full.

    With --report, also write what was planned. With --quiet, leave the figures out.
    """
    if settings.report:
        from edge.cli.report import lines

        note("\n".join(lines(model.engine, completion.usage)))
    if settings.quiet:
        return
    if completion.finish_reason == "context":
        limit = model.engine.config.n_context
        full = f"the context of {limit} tokens is full; --context asks for more"
        if settings.when_full == "slide":
            full = "the positions that the model was made for are used up: begin anew"
        note(full)
    seed = "" if completion.seed is None else f"; seed {completion.seed}"
    note(figures(completion.usage, model.engine) + seed)


@dataclass(frozen=True)
class Output:
    """How `once` writes an answer. as_json: as one JSON object at the end, instead of streamed
    text. newline: end the text with a newline.
    """

    as_json: bool
    newline: bool


def once(
    model: Model,
    source: Any,
    prompt: str,
    settings: AnswerSettings,
    output: Output,
    **options: Any,
) -> None:
    """Write the one answer of a command that then ends.

    source: a Session or Chat. options: arguments of its stream(). After Ctrl-C the exit code is
    130, and the text so far stays.
    """
    completion = stream(source, prompt, show=not output.as_json, quiet=settings.quiet, **options)
    if output.newline and not output.as_json:
        click.echo()
    report(model, completion, settings)
    if completion.finish_reason == "cancelled":
        raise click.exceptions.Exit(130)  # as for Ctrl-C anywhere else
    if output.as_json:
        import json

        click.echo(json.dumps(as_dict(completion, model.tokenizer), ensure_ascii=False))
