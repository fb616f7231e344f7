"""Options of a single answer, which `complete` and `chat --prompt` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge.cli.options import AnswerSettings
from edge.errors import InputError

if TYPE_CHECKING:
    from edge.session.results import Completion
    from edge.tokenizer import Tokenizer

Command = TypeVar("Command", bound=Callable[..., Any])


def single_options(command: Command) -> Command:
    """--file, --stop, --json (as_json) and --logprobs."""
    for decorate in (
        click.option(
            "--logprobs",
            type=click.IntRange(min=1),
            metavar="N",
            help="With --json: the log-probability of each token, and those of the N likeliest.",
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="One JSON object at the end, for programs."
        ),
        click.option(
            "--stop", multiple=True, metavar="TEXT", help="Stop before TEXT; may be repeated."
        ),
        click.option("-f", "--file", metavar="FILE", help="As --prompt, from a UTF-8 file."),
    ):
        command = decorate(command)
    return command


def check(flags: dict[str, Any]) -> None:
    """Raise UsageError for options that exclude each other."""
    if flags["logprobs"] is not None and not flags["as_json"]:
        raise click.UsageError("--logprobs needs --json.")


def stream_options(flags: dict[str, Any], settings: AnswerSettings) -> dict[str, Any]:
    """The options of a session's `stream`."""
    return {
        "stop": flags["stop"],
        "logprobs": flags["logprobs"] or 0,
        "max_tokens": settings.max_tokens,
        "sampling": settings.sampling,
    }


def not_empty(prompt: str) -> str:
    """The prompt. Raises InputError when it is empty."""
    if not prompt:
        raise InputError("the prompt is empty")
    return prompt


def as_dict(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion as JSON values, with its log-probabilities if it has any."""
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
