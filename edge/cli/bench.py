"""`edge-run bench`: speeds of a model, compared with the machine's limits and other runtimes."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.models import model_path
from edge.cli.options import (
    PROVIDER,
    layout_option,
    memory_option,
    model_argument,
    plot_path,
    provider_options,
)
from edge.cli.terminal import Progress, mebibytes
from edge.device import memory
from edge.loading import KV_TYPES

if TYPE_CHECKING:
    from edge.bench import Peer


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:
    """`128,512` -> (128, 512); () for an option that is not given."""
    if value is None:
        return ()
    parts = value.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,2.")
    numbers = tuple(dict.fromkeys(int(part) for part in parts))
    if parameter.name == "threads" and 0 in numbers:
        raise click.BadParameter("0 threads cannot run anything.")
    return numbers


def _names(ctx: click.Context, _: click.Parameter, value: str | None) -> tuple[str, ...]:
    """`llama.cpp,ik` -> names of peers."""
    from edge.bench.runner import PEERS

    names = tuple(dict.fromkeys(value.split(","))) if value else ()
    for name in names:
        if name not in PEERS:
            raise click.BadParameter(f"{name!r} is no peer. There are: {', '.join(PEERS)}.")
    return names


def _by_name(ctx: click.Context, _: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=PATH` flags -> name to path."""
    pairs = [value.partition("=") for value in values]
    if not all(name and path for name, _, path in pairs):
        raise click.BadParameter("write a peer's name, an equals sign and a path.")
    return {name: path for name, _, path in pairs}


@click.command(short_help=COMMANDS["bench"])
@model_argument
@click.option(
    "--prompt",
    "prompts",
    callback=_numbers,
    default="512",
    show_default=True,
    metavar="N,N,...",
    help="Tokens of prompts; 0: none.",
)
@click.option(
    "--decode",
    "n_decode",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens to decode one by one; 0: none.",
)
@click.option(
    "--depth",
    "depths",
    callback=_numbers,
    default="0",
    show_default=True,
    metavar="N,N,...",
    help="Tokens in the context before those that are decoded.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="Rounds, after a warm-up that does not count.",
)
@click.option(
    "-t",
    "--threads",
    callback=_numbers,
    metavar="N,N,...",
    show_default="the cores that help",
    help="Thread counts to measure.",
)
@click.option(
    "--against",
    callback=_names,
    metavar="NAME,...",
    help="Measure these runtimes beside: llama.cpp, ik, ik-repacked.",
)
@click.option(
    "--peer-python",
    "pythons",
    multiple=True,
    callback=_by_name,
    metavar="NAME=PATH",
    help="The Python that has this runtime's package; this one unless told.",
)
@click.option(
    "--peer-model",
    "models",
    multiple=True,
    callback=_by_name,
    metavar="NAME=PATH",
    help="The file that this runtime loads, where it cannot load MODEL.",
)
@click.option(
    "--plot",
    "plot_path",
    callback=plot_path,
    metavar="FILE",
    help="Draw the roofline, as .svg or .png (needs matplotlib).",
)
@click.option(
    "--kv",
    type=click.Choice(KV_TYPES),
    default="f16",
    show_default=True,
    metavar="TYPE",
    help="How keys and values are kept, by the other runtimes too: f16, q8, q4.",
)
@memory_option
@layout_option
@provider_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def bench(model: str | None, as_json: bool, plot_path: str | None, **flags: Any) -> None:
    """Measure prompt and decode speed.

    Tokens per second of the engine alone: the median of the rounds, the slowest and the fastest.
    Decode reads all weights for each token, so it is held against the bandwidth at which this
    machine reads memory, measured between the rounds; a prompt is held against its peak of int8
    multiply-adds. MODEL may be a folder of ONNX graphs, which onnxruntime runs: what it reads and
    multiplies is then not counted.

    --against measures other runtimes in the same rounds, each in a fresh process: llama.cpp
    through the package llama-cpp-python, ik_llama.cpp through ik-llama-cpp-python.
    """
    prompts = [n for n in flags["prompts"] if n]
    if not prompts and not flags["n_decode"]:
        raise click.UsageError("--prompt 0 and --decode 0 leave nothing to measure.")
    if flags["threads"] and os.environ.get("EDGE_THREADS"):
        raise click.UsageError("EDGE_THREADS is set and comes before --threads: unset it.")
    peers = _peers(flags["against"], flags["pythons"], flags["models"])
    from edge.bench import Case, Report, Settings, measure, plot

    if plot_path:
        plot.require()  # before minutes of measuring
    cases = [Case("prompt", n) for n in prompts]
    cases += [Case("decode", flags["n_decode"], d) for d in flags["depths"] if flags["n_decode"]]
    options = {name: flags[name] for name in ("layout", "memory", *PROVIDER)}
    threads, rounds = flags["threads"] or (None,), flags["repeat"]
    settings = Settings(tuple(cases), threads, rounds, peers, flags["kv"], options)
    path = model_path(model, flags["memory"])
    with _Bars() as bars:
        report = Report(path, measure(path, settings, bars), settings)
    if plot_path:
        plot.roofline([report], plot_path)
    peak = memory.peak()
    if as_json:
        click.echo(json.dumps({**report.json(), "peak_bytes": peak}))
    else:
        first, *rest = report.lines()
        first += f", peak memory {mebibytes(peak)}" if peak and not peers else ""
        click.echo("\n".join([first, *rest]))


def _peers(
    names: tuple[str, ...], pythons: dict[str, str], models: dict[str, str]
) -> tuple[Peer, ...]:
    """The peers to measure.

    Raises UsageError for a name that --against does not have, and for a path that does not exist.
    """
    from edge.bench import Peer

    for flag, paths in (("--peer-python", pythons), ("--peer-model", models)):
        for name, path in paths.items():
            if name not in names:
                raise click.UsageError(f"{flag} {name}: --against does not name it.")
            if not os.path.isfile(path):
                raise click.UsageError(f"{flag} {name}: {path} is not a file.")
    return tuple(Peer(n, pythons.get(n, sys.executable), models.get(n)) for n in names)


class _Bars:
    """Progress bars: a new one for each task that is reported."""

    def __init__(self) -> None:
        self._label = ""
        self._bar: Progress | None = None
        self._stack = ExitStack()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._label or self._bar is None:
            self._stack.close()
            self._label, self._bar = what, self._stack.enter_context(Progress(what))
        self._bar(done, total)

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
