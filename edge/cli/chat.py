"""`edge-run chat`: talk with a model, or ask it one question."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge.cli import COMMANDS
from edge.cli.options import (
    AnswerSettings,
    model_options,
    open_text,
    read_prompt,
    sampling_options,
    template_options,
)
from edge.cli.single import check, not_empty, single_options, stream_options
from edge.files.text_file import TextFile, utf8


@click.command(short_help=COMMANDS["chat"])
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="Ask this, answer, and leave.")
@click.option("-s", "--system", metavar="TEXT", help="What the model is told before the talk.")
@click.option(
    "--session", metavar="FILE", help="Keep the conversation in FILE, and go on with the one there."
)
@template_options
@single_options
@sampling_options(seed=-1)
def chat(
    model: str | None,
    prompt: str | None,
    file: str | None,
    system: str | None,
    session: str | None,
    **flags: Any,
) -> None:
    """Talk with a model, or ask it one question.

    With --prompt, --file, or a question on standard input, it answers once and leaves. Else it is a
    conversation: /help lists what can be typed, Ctrl-C stops an answer, a second one leaves.
    With --session it survives the program, however that ends.
    """
    check(flags)
    if system is not None:
        system = utf8(system, "the system message")
    question = _question(prompt, file)
    if question is None and flags["as_json"]:
        raise click.UsageError("--json wants a question: --prompt, --file, or standard input.")
    settings = AnswerSettings.take(flags)
    options = stream_options(flags, settings)
    if question is None:
        from edge.cli.conversation import Conversation
        from edge.cli.keyboard import Keyboard

        with Keyboard() as keyboard, Conversation(model, settings, options) as conversation:
            conversation.begin(system, session)
            conversation.run(keyboard)
        return
    from edge.cli.answer import Output, explain, once, open_model
    from edge.cli.conversation import begin

    with open_model(model, **settings.loading) as loaded:
        explain(loaded, settings)
        if isinstance(question, TextFile):
            question = not_empty(read_prompt(question, loaded).strip())
        source = begin(loaded, system, session, settings)
        output = Output(as_json=flags["as_json"], newline=True)
        once(loaded, source, question, settings, output, **options)


def _question(prompt: str | None, file: str | None) -> str | TextFile | None:
    """The one question, or a TextFile where a long one is not read yet; None for a conversation.

    Raises InputError, UsageError.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("Give the question with one of --prompt TEXT and --file FILE.")
    if prompt is not None:
        return not_empty(utf8(prompt, "the prompt").strip())
    if file is None and sys.stdin.isatty():
        return None
    text = open_text(file)
    return not_empty((text.read() or "").strip()) if text.ended else text
