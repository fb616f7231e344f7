"""`edge-run complete`: continue a text."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge.cli import COMMANDS
from edge.cli.options import AnswerSettings, model_options, open_text, read_prompt, sampling_options
from edge.cli.single import check, not_empty, single_options, stream_options
from edge.files.text_file import TextFile, utf8


@click.command(short_help=COMMANDS["complete"])
@model_options
@click.argument("source", required=False, metavar="[-]", type=click.Choice(["-"]))
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("--special", is_flag=True, help="Read control tokens, such as <|im_start|>, as such.")
@single_options
@sampling_options()
def complete(
    model: str | None,
    source: str | None,
    prompt: str | None,
    file: str | None,
    **flags: Any,
) -> None:
    """Continue a text, without a chat template.

    The text comes from --prompt, --file or, with - or in a pipe, from standard input (less the
    newline at its end, if it has one). The continuation is streamed to standard output as it is,
    figures go to standard error.
    """
    from edge.cli.answer import Output, explain, once, open_model

    if model == "-" and source is None:
        model, source = None, "-"
    check(flags)
    text = _text(prompt, file, source)
    settings = AnswerSettings.take(flags)
    options = stream_options(flags, settings) | {"special": flags["special"]}
    with open_model(model, **settings.loading) as loaded:
        explain(loaded, settings)
        if isinstance(text, TextFile):
            text = not_empty(_stripped(read_prompt(text, loaded)))
        session = loaded.session(settings.when_full or "stop")
        output = Output(as_json=flags["as_json"], newline=sys.stdout.isatty())
        once(loaded, session, text, settings, output, **options)


def _text(prompt: str | None, file: str | None, source: str | None) -> str | TextFile:
    """The text to continue, from exactly one source; a TextFile where a long one is not read yet.

    Raises InputError, UsageError.
    """
    n_given = sum(x is not None for x in (prompt, file, source))
    if n_given > 1 or (n_given == 0 and sys.stdin.isatty()):
        raise click.UsageError("Give the text with one of --prompt TEXT, --file FILE or -.")
    if prompt is not None:
        return not_empty(utf8(prompt, "the prompt"))
    text = open_text(file)
    return not_empty(_stripped(text.read() or "")) if text.ended else text


def _stripped(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
