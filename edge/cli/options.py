"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge.errors import ContextError
from edge.files.text_file import TextFile
from edge.loading import KV_TYPES, LAYOUTS
from edge.onnx.providers.providers import RUNNERS
from edge.session.sampler import SamplingField, SamplingOptions, sampling_fields

if TYPE_CHECKING:
    from edge.kv.shape import WhenFull
    from edge.model import Model

#: A field's maximum from here on is only what its integers can hold: help shows no limit.
_NO_LIMIT = 2**31 - 1

#: The options that `edge.load` takes unchanged.
LOADING = ("context", "threads", "layout", "memory", "kv")

#: The options of ONNX models, see `provider_options`.
PROVIDER = ("ep", "fallback", "soc")

Command = TypeVar("Command", bound=Callable[..., Any])


def model_argument(command: Command) -> Command:
    """MODEL, of commands that read a model; shells complete it with the names of files."""
    return click.argument("model", required=False, shell_complete=_files)(command)


def _files(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def layout_option(command: Command) -> Command:
    """--layout, of commands that load a model."""
    return click.option(
        "--layout",
        type=click.Choice(LAYOUTS),
        default="auto",
        show_default=True,
        metavar="LAYOUT",
        help="How IQ weights lie in memory: fast; compact, which is smaller; auto: fast if it "
        "fits.",
    )(command)


def window_option(command: Command) -> Command:
    """--context, of commands that run a text in windows."""
    return click.option(
        "-c",
        "--context",
        type=click.IntRange(min=8),
        default=512,
        show_default=True,
        metavar="N",
        help="Tokens of a window.",
    )(command)


def chunks_option(command: Command) -> Command:
    """--chunks, of commands that run a text in windows."""
    return click.option(
        "--chunks",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="all",
        help="Use the first N windows only.",
    )(command)


def memory_option(command: Command) -> Command:
    """--memory, of commands that load a model."""
    return click.option(
        "--memory",
        metavar="SIZE",
        help="The most that the whole process may have in memory, as 1.5GB.",
        show_default="what is available",
    )(command)


def memory_options(command: Command) -> Command:
    """--memory and --kv."""
    kv = click.option(
        "--kv",
        type=click.Choice(["auto", *KV_TYPES]),
        default="f16",
        show_default=True,
        metavar="TYPE",
        help="How keys and values are kept: f16; q8 or q4, which are smaller; auto: the most "
        "precise type with which the context fits.",
    )
    return memory_option(kv(command))


def lora_option(command: Command) -> Command:
    """--lora, of commands that run a model: (path, scale) of each adapter."""
    return click.option(
        "--lora",
        multiple=True,
        metavar="FILE[:SCALE]",
        callback=_adapters,
        help="Run the model with this LoRA adapter, a GGUF file; may be repeated. Its products are "
        "multiplied by SCALE.",
    )(command)


def threads_option(command: Command) -> Command:
    """--threads, of commands that compute."""
    return click.option(
        "-t",
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads to compute with.",
        show_default="the cores that help",
    )(command)


def context_option(command: Command) -> Command:
    """--context."""
    return click.option(
        "-c",
        "--context",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens a session may hold.",
        show_default="the model's own limit, at most 4096",
    )(command)


def explained_provider_options(command: Command) -> Command:
    """The options of `provider_options`, and --explain."""
    explain = click.option(
        "--explain",
        is_flag=True,
        help="Say what runs the model, and how much of it.",
    )
    return provider_options(explain(command))


def provider_options(command: Command) -> Command:
    """--ep, --fallback and --soc, of commands that run ONNX models."""
    for decorate in (
        click.option(
            "--soc",
            metavar="NAME",
            help="The chip to compile an ONNX model for, where the provider cannot tell.",
        ),
        click.option(
            "--fallback",
            is_flag=True,
            help="Let the CPU run what the provider cannot, or all of it where that is missing.",
        ),
        click.option(
            "--ep",
            metavar="NAME",
            help=f"Run an ONNX model on this execution provider: {', '.join(RUNNERS)}; auto: "
            "on its own, or else the CPU.",
            show_default="the one that it was made for",
        ),
    ):
        command = decorate(command)
    return command


def model_options(command: Command) -> Command:
    """MODEL, the options of loading it and of a session, --max-tokens, --quiet and --report."""
    for decorate in (
        click.option(
            "--report",
            is_flag=True,
            help="Say what was planned, of memory and speed, and what was.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            help="No figures, neither beside the answer nor after it.",
        ),
        click.option(
            "-n",
            "--max-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help="Stop after N tokens.",
            show_default="when the model ends, or the context is full",
        ),
        click.option(
            "--no-model-sampling",
            "model_sampling",
            is_flag=True,
            flag_value=False,
            default=True,
            help="Ignore what the model recommends of how tokens are chosen.",
        ),
        click.option(
            "--prefix-cache",
            metavar="FOLDER",
            help="Keep computed system messages there, for the next start.",
        ),
        explained_provider_options,
        lora_option,
        layout_option,
        threads_option,
        memory_options,
        click.option(
            "--when-full",
            type=click.Choice(["stop", "slide"]),
            metavar="HOW",
            help="When the context is full: stop; slide, which forgets all but the first 64 tokens "
            "and the last ones.",
            show_default="stop",
        ),
        context_option,
        model_argument,
    ):
        command = decorate(command)
    return command


def template_options(command: Command) -> Command:
    """--chat-template and --template-var (template_var), of commands that render a template."""
    for decorate in (
        click.option(
            "--template-var",
            multiple=True,
            metavar="NAME=JSON",
            callback=_variables,
            help="A variable of the chat template, as enable_thinking=false; may be repeated.",
        ),
        click.option(
            "--chat-template",
            metavar="NAME",
            help="Which of the model's chat templates to take.",
            show_default="its default one",
        ),
    ):
        command = decorate(command)
    return command


def sampling_options(**defaults: Any) -> Callable[[Command], Command]:
    """One flag for each field of SamplingOptions, with the field's own help and range.

    defaults: replace the defaults of these fields.
    """

    def decorate(command: Command) -> Command:
        for option in reversed(sampling_fields()):
            default = defaults.get(option.name, option.default)
            command = _flag(option._replace(default=default))(command)
        return command

    return decorate


@dataclass(frozen=True)
class AnswerSettings:
    """The values of `model_options` (but for MODEL), `template_options` and `sampling_options`."""

    loading: dict[str, Any]  # arguments of `edge.load`
    when_full: WhenFull | None
    max_tokens: int | None
    quiet: bool
    report: bool
    sampling: SamplingOptions
    explain: bool = False
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template

    @classmethod
    def take(cls, flags: dict[str, Any]) -> AnswerSettings:
        """Take these values out of a command's flags; its other flags stay. Raises InputError."""
        sampling = {option.name: flags.pop(option.name) for option in sampling_fields()}
        loading = {name: flags.pop(name) for name in (*LOADING, *PROVIDER, "lora", "prefix_cache")}
        loading["model_sampling"] = flags.pop("model_sampling")
        loading["chat_template"] = flags.pop("chat_template", None)
        variables = flags.pop("template_var", {})
        names = ("when_full", "max_tokens", "quiet", "report", "explain")
        rest = {name: flags.pop(name) for name in names}
        return cls(loading, **rest, sampling=SamplingOptions(**sampling), variables=variables)


def _flag(option: SamplingField) -> Callable[[Command], Command]:
    name = "--" + option.name.replace("_", "-")
    if option.kind is dict:
        return click.option(
            name, multiple=True, metavar="ID=BIAS", callback=_biases, help=option.help
        )
    number: Any = click.IntRange if option.kind is int else click.FloatRange
    limited = option.max is not None and option.max < _NO_LIMIT
    return click.option(
        name,
        type=number(option.min, option.max if limited else None, min_open=option.min_open),
        default=None if option.can_be_unset else option.default,
        show_default=f"{option.default}, or what the model recommends"
        if option.can_be_unset
        else True,
        metavar="N",
        help=option.help,
    )


def _biases(ctx: click.Context, _: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """`ID=BIAS` flags -> token id to bias."""
    biases = {}
    for value in values:
        token, _equals, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise click.BadParameter(
                f"{value!r} is not a token id, an equals sign and a number."
            ) from None
    return biases


def _adapters(
    ctx: click.Context, _: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, float]]:
    """`FILE[:SCALE]` flags -> path and scale. What follows the last colon is a scale if it is a
    number.
    """
    adapters = []
    for value in values:
        path, _colon, scale = ("", "", "") if os.path.exists(value) else value.rpartition(":")
        try:
            adapters.append((path, float(scale)) if path else (value, 1.0))
        except ValueError:
            adapters.append((value, 1.0))
    return adapters


def _variables(ctx: click.Context, _: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=JSON` flags -> name to value."""
    variables = {}
    for value in values:
        name, _equals, text = value.partition("=")
        try:
            variables[name] = json.loads(text)
        except (ValueError, RecursionError):
            raise click.BadParameter(
                f"{value!r} is not a name, an equals sign and a JSON value, such as false, 3 or "
                '"text" in double quotes.'
            ) from None
    return variables


def plot_path(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """The name of a picture, checked before what it shows is measured."""
    if value is not None and not value.lower().endswith((".svg", ".png")):
        raise click.BadParameter(f"{value!r} ends neither in .svg nor in .png.")
    return value


def open_text(path: str | None) -> TextFile:
    """A text file; standard input where path is None. Raises InputError."""
    if path is None:
        return TextFile(sys.stdin.buffer, "standard input")
    return TextFile.open(path)


def read_prompt(file: TextFile, model: Model) -> str:
    """The text of a prompt. Raises ContextError for more than the context can hold, InputError."""
    context = model.engine.config.n_context
    most_bytes = model.tokenizer.most_bytes(context)
    text = file.read(most_bytes)
    if text is None:
        raise ContextError(
            f"{file.name} has more than {most_bytes} bytes: no text of so many fits a context of "
            f"{context} tokens: shorten it, or take a larger --context",
            needed=context + 1,
            limit=context,
            at_least=True,
        )
    return text
