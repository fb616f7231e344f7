"""`edge-run complete`: continue a text."""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.options import (
    Settings,
    model_options,
    read_file,
    read_stdin,
    sampling_options,
    utf8,
)

if TYPE_CHECKING:
    from edge.results import Completion
    from edge.tokenizer import Tokenizer


@click.command(short_help=COMMANDS["complete"])
@model_options
@click.argument("source", required=False, metavar="[-]", type=click.Choice(["-"]))
@click.option("-p", "--prompt", metavar="TEXT", help="The text to continue.")
@click.option("-f", "--file", metavar="FILE", help="A UTF-8 file with the text to continue.")
@click.option("--special", is_flag=True, help="Read control tokens, such as <|im_start|>, as such.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end, for programs.")
@click.option(
    "--logprobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --json: the log-probability of each token, and those of the N likeliest.",
)
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
    if model == "-" and source is None:
        model, source = None, "-"
    if flags["logprobs"] is not None and not flags["as_json"]:
        raise click.UsageError("--logprobs needs --json.")
    text = _text(prompt, file, source)
    from edge.cli.answer import explain, once, open_model, stream

    settings, as_json = Settings.take(flags), flags["as_json"]
    options = {name: flags[name] for name in ("special", "stop")}
    options |= {"max_tokens": settings.max_tokens, "sampling": settings.sampling}
    options |= {"logprobs": flags["logprobs"] or 0, "quiet": settings.quiet}
    with open_model(model, **settings.loading) as loaded:
        explain(loaded, settings)
        session = loaded.session(settings.when_full or "stop")
        ask = partial(stream, session, text, show=not as_json, **options)
        newline = sys.stdout.isatty() and not as_json
        completion = once(loaded, ask, settings, newline=newline)
        if as_json:
            click.echo(json.dumps(_as_dict(completion, loaded.tokenizer), ensure_ascii=False))


def _text(prompt: str | None, file: str | None, source: str | None) -> str:
    """The text to continue, from exactly one place. Raises InputError, UsageError."""
    from edge.cli.answer import not_empty

    n_given = sum(x is not None for x in (prompt, file, source))
    if n_given > 1 or (n_given == 0 and sys.stdin.isatty()):
        raise click.UsageError("Give the text with one of --prompt TEXT, --file FILE or -.")
    if prompt is not None:
        return not_empty(utf8(prompt, "the prompt"))
    text = read_stdin() if file is None else read_file(file)
    return not_empty(text.removesuffix("\n").removesuffix("\r"))


def _as_dict(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion as JSON values; log-probabilities where there are any."""
    result: dict[str, Any] = {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "usage": dataclasses.asdict(completion.usage),
    }

    def entry(token: int | None, logprob: float | None) -> dict[str, Any]:
        text = "" if token is None else tokenizer.token_text(token)
        return {"token": token, "text": text, "logprob": logprob}

    if completion.logprobs:
        result["logprobs"] = [
            {**entry(p.token, p.logprob), "top": [entry(*best) for best in p.top]}
            for p in completion.logprobs
        ]
    return result
