"""From a question to streamed text: what `chat` and `complete` share."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import click

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
    """Load a model, the default one where path is None, with a bar on a terminal."""
    import edge

    gc.disable()  # a vocabulary is a million objects, and none of them garbage
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
    """On stderr, if that was asked for: what runs the model."""
    if settings.explain:
        from edge.cli.report import explain_lines

        note("\n".join(explain_lines(model.engine)))


def stream(
    source: Any, prompt: str | Message, *, show: bool = True, quiet: bool = False, **options: Any
) -> Completion:
    """Stream the answer of a Session or Chat to stdout; return what it was.

    options: as for its stream(). Ctrl-C stops the answer (finish_reason "cancelled"), a second
    one raises KeyboardInterrupt. show: write the text. quiet: do not say how far it is.
    """
    with (
        Interrupt(source.cancel) as interrupt,
        Progress("reading the prompt") as progress,
        Status(options.get("max_tokens"), shown=show, quiet=quiet) as status,
    ):
        writer = Writer()
        pieces = source.stream(prompt, progress=progress, **options)
        if interrupt.hit:  # before there was anything to cancel
            pieces.cancel()
        for piece in pieces:
            progress.clear()
            if show:
                writer.write(piece.text)
            status(writer.column, piece.token, pieces.usage.prompt_tokens)
    completion: Completion = pieces.completion
    return completion


def report(model: Model, completion: Completion, settings: AnswerSettings) -> None:
    """On stderr, as was asked for: the figures of an answer, why it ended where that is news, and
    what was planned.
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


def once(
    model: Model,
    source: Any,
    prompt: str,
    settings: AnswerSettings,
    *,
    as_json: bool,
    newline: bool,
    **options: Any,
) -> None:
    """One answer of a Session or Chat for a program that ends with it: streamed, or as JSON at the
    end. Ctrl-C leaves with what came. newline: end the text with one. options: as for its stream().
    """
    completion = stream(source, prompt, show=not as_json, quiet=settings.quiet, **options)
    if newline and not as_json:
        click.echo()
    report(model, completion, settings)
    if completion.finish_reason == "cancelled":
        raise click.exceptions.Exit(130)  # as for Ctrl-C anywhere else
    if as_json:
        import json

        click.echo(json.dumps(as_dict(completion, model.tokenizer), ensure_ascii=False))
