"""`edge-run`: one file per command, imported when the command is called.

This module alone turns errors into a line on stderr and an exit code: 1 for an EdgeError, 2 for
wrong usage, 130 for Ctrl-C. At the top, modules import no package but click. Commands import slow
packages (numpy, the engine, the tokenizer) inside their functions.
"""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
import warnings
from typing import Any, TextIO

import click

from edge.binding import library
from edge.errors import EdgeError, EdgeWarning

__all__ = ["COMMANDS", "cli", "main"]

#: Command -> the first line of its help: `edge-run --help` needs no command's module.
COMMANDS = {
    "chat": "Talk with a model, or ask it one question.",
    "complete": "Continue a text, without a chat template.",
    "info": "Say what a model file is, from its header alone.",
    "plan": "Say what memory a model will take, and how fast it will be.",
    "advise": "Say which file of a model to take on this device.",
    "tune": "Measure the best number of threads, and keep it for this machine.",
    "bench": "Measure prompt and decode speed.",
    "perplexity": "Measure how well a model predicts a text: lower is better.",
    "imatrix": "Measure an importance matrix: which inputs a text uses most.",
    "compare": "Compare files of a model: size, quality, speed and memory of each.",
    "pack": "Write a packed file, which starts without packing.",
    "quantize": "Write a model in other types, of fewer bits.",
    "export": "Write a model as ONNX graphs, for NPUs and for onnxruntime.",
    "cache": "List or clear packed models and compiled graphs.",
    "devices": "List what ONNX models can run on, and what is missing.",
    "pull": "Fetch a model: the default one, one of the hub, or of a URL.",
    "list": "List the models on this machine.",
    "remove": "Remove a model that was fetched.",
}


class _EdgeRun(click.Group):
    """The group of commands: it imports them lazily, and shows an error as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]  # `list` is a command here, once it is imported

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"edge.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the error for an unknown name suggests one."""
        name = args[0]
        if name not in COMMANDS and not ctx.resilient_parsing:
            hint = ""
            if near := difflib.get_close_matches(name, COMMANDS, 1):
                hint = f" Did you mean {near[0]!r}?"
            elif name.endswith((".gguf", ".onnx")) or os.path.exists(name):
                hint = f" To talk with that model: edge-run chat {name}"
            ctx.fail(f"No such command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])

    def main(self, *args: Any, **options: Any) -> Any:
        """Run, then exit with 0, 1 (an error), 2 (wrong usage) or 130 (Ctrl-C)."""
        _prepare()
        options |= {"prog_name": "edge-run", "standalone_mode": False}
        try:
            code = super().main(*args, **options)
        except click.ClickException as e:
            e.show()
            code = e.exit_code
        except click.Abort:  # click's word for KeyboardInterrupt
            code = 130
        except Exception as e:
            if sys.flags.dev_mode:  # python -X dev -m edge.cli ...: the whole traceback
                raise
            complain(e)
            code = 1
        sys.exit(code or 0)


def _prepare() -> None:
    """Set what holds for the whole process, before numpy is imported."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads: unused, cost memory
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", EdgeWarning)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # ? for what it cannot encode
            stream.reconfigure(errors="replace")
    if os.environ.get("EDGE_TRACE") == "1":
        _show_traces()
    if not sys.flags.dev_mode:
        library.on_bus_error = (
            "edge-run: a file in use was cut short, or its disk failed: see that the model is "
            "whole, and start again\n"
        )


def _show_traces() -> None:
    """Send the engine's log of its runs to stderr, unchanged."""
    import logging

    class ToStderr(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(record.getMessage(), err=True)

    log = logging.getLogger("edge.trace")
    log.handlers, log.propagate = [ToStderr()], False


def complain(error: BaseException) -> None:
    """Write an error to stderr as one line, `edge-run: ...`, safe for a terminal."""
    if isinstance(error, EdgeError):
        text = str(error)
    elif isinstance(error, MemoryError) or str(error) == "can't start new thread":
        text = "out of memory"
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif isinstance(error, ImportError):  # no memory for a library, or a broken installation
        text = f"a part of edge cannot be loaded: {_root(error)}"
    else:
        text = f"a bug of ours, please report it: {type(error).__name__}: {error}"
    _say(text)


_show_python_warning = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning of edge as one line, and other warnings as Python does."""
    if issubclass(category, EdgeWarning):
        _say(f"warning: {message}")
    else:
        _show_python_warning(message, category, filename, lineno, file, line)


def _say(text: str) -> None:
    """Write a line to stderr, safe for a terminal."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    click.echo(_fit(f"edge-run: {text}"), err=True)


def _fit(line: str) -> str:
    """The line; where stderr is a terminal, broken into rows of its width."""
    if not sys.stderr.isatty():
        return line
    from edge.cli.terminal import fit

    return fit(line)


def _root(error: BaseException) -> BaseException:
    """The first error of the chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import edge

        click.echo(f"edge-run {edge.__version__}")
        ctx.exit()


@click.group("edge-run", cls=_EdgeRun, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """Run language models on small devices.

    MODEL is a GGUF file, or a packed one (see `edge-run pack`), or a name that `edge-run pull`
    takes, such as qwen3-0.6b or owner/repo:Q4_K_M, which is fetched where it is not here; without
    one, the default model is used.
    """


def main() -> None:
    """The `edge-run` program."""
    cli.main()
