"""`edge-run plan`: a model's memory and speed, predicted from its header alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.options import (
    context_option,
    layout_option,
    lora_option,
    memory_options,
    model_argument,
    threads_option,
)
from edge.cli.terminal import note, plain
from edge.errors import EdgeError, MemoryBudgetError
from edge.sizes import show

if TYPE_CHECKING:
    from edge.backend import MemoryPlan
    from edge.device.cores import Choice
    from edge.engine.describe import Description
    from edge.engine.engine import DescribedFile
    from edge.loading import Loading

_DEPTHS = (0, 4096, 32768)
_NOT_OF_GRAPHS = "onnxruntime runs the graphs: `edge-run bench` measures it"


@click.command(short_help=COMMANDS["plan"])
@model_argument
@memory_options
@layout_option
@lora_option
@threads_option
@context_option
@click.option(
    "--sessions",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Sessions with a context each.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Say what memory a model will take, and how fast it will be.

    From the header alone: MODEL may be the first part of a download, or a model that is not fetched
    yet (`owner/repo:TYPE`), of which only the header is read. Each part of the memory,
    the largest context for each type of keys and values, what would fit when it does not, and
    tokens per second, from the bandwidth of this machine, which is measured for it. Of a folder of
    ONNX graphs all but the speed. Exit code 1 when it does not fit.
    """
    from edge.device import cores
    from edge.hub.find import open_header
    from edge.loading import Loading

    choice = cores.choose(options["threads"])
    loading = Loading.of(options)
    with open_header(model, memory=options["memory"], say=note) as (path, name):
        ledger, facts = _facts(path, name, loading, choice)
        if as_json:
            click.echo(json.dumps(facts, ensure_ascii=False))
        else:
            click.echo("\n".join([*_lines(facts, options["memory"]), *choice.lines()]))
        ledger.require()


def _facts(
    path: str, name: str, loading: Loading, choice: Choice
) -> tuple[MemoryPlan, dict[str, Any]]:
    """The ledger of a model, and all facts as JSON values. name: of the model, for people."""
    from edge.onnx import is_onnx

    ledger: MemoryPlan
    if is_onnx(path):
        from edge.onnx.run.engine import DescribedFolder
        from edge.onnx.run.plan import plan as plan_graphs

        with DescribedFolder.open(path, loading.for_onnx()) as graphs:
            ledger, facts = graphs.ledger, plan_graphs(graphs)
        facts |= {"threads": asdict(choice), "speed": _NOT_OF_GRAPHS}
    else:
        from edge.engine.engine import DescribedFile

        native = loading.for_native(path)
        with DescribedFile.open(path, native, header_only=True) as file:
            ledger, description = file.ledger, file.description
            facts = {"model": name, **_file(file), **_memory(description)}
            facts |= {"rotary": _rotary(description), "threads": asdict(choice)}
            facts["reads_per_token"] = _reads(description)
            facts["speed"] = _speed(description, choice.threads)
    return ledger, facts


def _file(described: DescribedFile) -> dict[str, Any]:
    """How much of the file is on the disk."""
    file = described.file
    return {
        "file_bytes": file.n_bytes,
        "whole_bytes": file.whole_bytes,
        "complete": file.n_bytes >= file.whole_bytes,
    }


def _memory(description: Description) -> dict[str, Any]:
    """The ledger, and the other choices of context, keys and values, and layout."""
    from edge.kv.shape import PAGE

    ledger, weights = description.ledger, description.weights
    types = {}
    for name in ledger.types():
        other = ledger.with_kv(name)
        n_bytes = other.kv.page_bytes // PAGE
        types[name] = {"bytes_per_token": n_bytes, "largest_context": other.largest_context()}
    return {
        "fits": ledger.fits,
        "budget_bytes": ledger.budget,
        "budget_stated": ledger.is_stated,
        "needed_bytes": ledger.needed,
        "parts": {name.replace(" ", "_"): size for name, size in ledger.parts.items()},
        "context": ledger.context,
        "context_trained": ledger.most_context,
        "sessions": ledger.sessions,
        "kv": ledger.kv.type,
        "kv_types": types,
        "kv_groups": [
            {
                "layers": list(group.layers),
                "window": group.window,
                "bytes_per_token": group.shape.page_bytes // PAGE,
                "bytes": n_pages * group.shape.page_bytes,
            }
            for group, n_pages in zip(ledger.kv.groups, ledger.planned_pages, strict=True)
        ],
        "layouts": dict(Counter(map(weights.layout, weights.model.names))),
        "compact": weights.model.is_compact,
        "options": [
            {"flags": option.flags, "needed_bytes": option.needed}
            for option in ([] if ledger.fits else ledger.options() or [ledger.least()])
        ],
    }


def _rotary(description: Description) -> dict[str, Any] | None:
    """The set of LongRoPE factors that the context selects; None where the model has only one."""
    config = description.config
    names = {rope.factors for rope in description.graph.ropes}
    chosen = next((n for n in ("short", "long") if f"rope_factors_{n}.weight" in names), None)
    if chosen is None:
        return None
    original = config.keys.whole(
        "rope.scaling.original_context_length", config.n_context_train, least=2
    )
    return {"factors": chosen, "long_from_context": original + 1}


def _reads(description: Description) -> dict[str, int]:
    """Bytes of weights that a token reads, how many of them are of experts, and those of all."""
    from edge.engine import predict

    demand = predict.demand_of(description)
    return {
        "weight_bytes": demand.weights,
        "expert_bytes": demand.experts,
        "all_expert_bytes": demand.all_experts,
    }


def _speed(description: Description, threads: int) -> dict[str, Any] | str:
    """Predicted tokens per second by depth; a string says why there is no prediction."""
    from edge.engine import predict

    demand = predict.demand_of(description)
    try:
        measured = predict.Bandwidth.now(threads, demand.products)
    except MemoryBudgetError as e:
        return str(e)
    stored = True
    try:
        measured.store()
    except (EdgeError, OSError):
        stored = False
    depths = [depth for depth in _DEPTHS if depth < description.config.n_context_train]
    return {
        "threads": threads,
        "read_bytes_per_second": measured.read,
        "stored": stored,
        "weight_bytes_per_token": demand.weights,
        "tokens_per_second": {
            str(depth): predict.tokens_per_second(demand, depth, measured) for depth in depths
        },
    }


def _lines(facts: dict[str, Any], stated: str | None) -> list[str]:
    """The facts for people. stated: the budget as it was typed."""
    budget = facts["budget_bytes"]
    size = f"{show(facts['file_bytes'])}"
    if not facts["complete"]:
        size += f" of {show(facts['whole_bytes'])}: the header is there, which is enough to plan"
    sessions = f"{facts['sessions']} sessions of " if facts["sessions"] > 1 else ""
    lines = [f"{plain(facts['model'])} ({size})", ""]
    behind = {
        "weights": ", ".join(f"{n} {layout}" for layout, n in facts["layouts"].items()),
        "keys_and_values": f"{sessions}{facts['context']} tokens in {facts['kv']}",
    }
    for name, n in facts["parts"].items():
        line = f"{name.replace('_', ' '):<18}{show(n):>12}   {behind.get(name, '')}"
        lines.append(line.rstrip())
    lines.append(f"{'in all':<18}{show(facts['needed_bytes']):>12}")
    if budget is not None:
        kind = "budget" if facts["budget_stated"] else "available"
        verdict = "fits" if facts["fits"] else "too little"
        verdict = f"{plain(stated)}, {verdict}" if stated is not None else verdict
        lines.append(f"{kind:<18}{show(int(budget)):>12}   {verdict}")
    options = [f"{o['flags']} ({show(o['needed_bytes'])})" for o in facts["options"]]
    if options:
        lines.append(f"What would fit, or come nearest: {' or '.join(options)}")
    lines += ["", "keys and values    bytes/token   largest context"]
    for name, row in facts["kv_types"].items():
        context = row["largest_context"] or "none"
        lines.append(f"{name:<18}{row['bytes_per_token']:>12}{context:>18}")
    lines += _group_lines(facts["kv_groups"])
    lines += _expert_lines(facts.get("reads_per_token"))
    return [*lines, *_rotary_lines(facts), "", *_speed_lines(facts["speed"])]


def _group_lines(groups: list[dict[str, Any]]) -> list[str]:
    """What each layer group takes, where there are several."""
    if len(groups) == 1:
        return []
    lines = ["", "layers    window    bytes/token        in all"]
    for group in groups:
        window = group["window"] or "none"
        lines.append(
            f"{len(group['layers']):<10}{window:<10}{group['bytes_per_token']:>11}"
            f"{show(group['bytes']):>14}"
        )
    return lines


def _expert_lines(reads: dict[str, int] | None) -> list[str]:
    """What each token reads of a model with experts. reads: None: of graphs."""
    if reads is None or not reads["all_expert_bytes"]:
        return []
    experts, dense = reads["expert_bytes"], reads["weight_bytes"] - reads["expert_bytes"]
    return [
        "",
        f"each token reads {show(reads['weight_bytes'])} of weights: {show(dense)} that all tokens "
        f"read, {show(experts)} of the experts' {show(reads['all_expert_bytes'])}",
    ]


def _rotary_lines(facts: dict[str, Any]) -> list[str]:
    if facts["rotary"] is None:
        return []
    chosen, first = facts["rotary"]["factors"], facts["rotary"]["long_from_context"]
    whole = f"rotary factors: {chosen}, for the whole session and texts of any length"
    if first > facts["context_trained"]:
        return ["", whole]
    command = "edge-run perplexity MODEL --file TEXT --context 512"
    return [
        "",
        f"{whole}; short up to a context of {first - 1}, long from {first} on.",
        "The long set is made for long texts and may be worse at short ones. What it costs on "
        "yours:",
        f"{command}, once as it stands and once with --session-context {first}",
    ]


def _speed_lines(speed: dict[str, Any] | str) -> list[str]:
    if isinstance(speed, str):
        return [f"speed: not predicted: {speed}"]
    threads = "1 thread" if speed["threads"] == 1 else f"{speed['threads']} threads"
    read = speed["read_bytes_per_second"] / 1e9
    lines = [f"this machine reads {read:.1f} GB/s with {threads}; predicted for decoding:"]
    for depth, value in speed["tokens_per_second"].items():
        lines.append(f"{f'at {depth} tokens':<18}{value:>12.1f} tokens/s")
    return lines
