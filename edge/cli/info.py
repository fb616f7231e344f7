"""`edge-run info`: facts about a model, from a GGUF file's header or from ONNX graphs."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.options import layout_option, model_argument
from edge.cli.terminal import mebibytes, note, plain
from edge.errors import EdgeError
from edge.session.sampler import sampling_fields

if TYPE_CHECKING:
    from edge.loading import Layout
    from edge.tokenizer.vocabulary import Vocabulary
    from edge.weights.model_file import ModelFile
    from edge.weights.weights import Weights

#: Name of a fact -> its key in the metadata, after `<architecture>.`.
_NUMBERS = {
    "context": "context_length",
    "layers": "block_count",
    "dim": "embedding_length",
    "ffn": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
}


@click.command(short_help=COMMANDS["info"])
@model_argument
@layout_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def info(model: str | None, layout: Layout, as_json: bool) -> None:
    """Say what a model file is, from its header alone.

    Works for files that cannot be run too, the first part of a download among them, and says why
    they cannot. Of a model that is not fetched yet (`owner/repo:TYPE`) only the header is read. Of
    a folder of ONNX graphs it says what they were made for.
    """
    from edge.hub.find import open_header
    from edge.onnx import is_onnx
    from edge.weights.model_file import open_model

    with open_header(model, say=note) as (path, name):
        if is_onnx(path):
            facts = describe_graphs(path)
            lines = _lines_of_graphs(facts)
        else:
            with open_model(path, header_only=True) as file:
                facts = describe(file, layout) | {"path": name}
            lines = _lines(facts)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(lines))


def describe_graphs(path: str) -> dict[str, Any]:
    """The facts of a folder of ONNX graphs, or of one .onnx file, as JSON values.

    A fact that the files do not state is None. Raises ModelFileError, and UnsupportedError for a
    model that cannot be run.
    """
    from edge.onnx.files.folder import open_folder

    folder = open_folder(path)
    return {
        "path": path,
        "bytes": sum(file.stat().st_size for file in folder.files),
        "name": folder.name,
        "architecture": folder.architecture or None,
        "made_for": folder.made_for,
        "context": folder.context,
        "layers": folder.n_layers,
        "kv_heads": folder.n_kv_heads,
        "kv_type": folder.dtype,
        "vocabulary": folder.n_vocab,
        "graphs": {
            name: {"nodes": len(graph.nodes), "multiply_adds": sum(graph.multiply_adds().values())}
            for name, graph in folder.graphs.items()
        },
    }


def _lines_of_graphs(facts: dict[str, Any]) -> list[str]:
    """The facts as aligned lines."""
    rows = {
        "folder": f"{facts['path']} ({mebibytes(facts['bytes'])}, ONNX)",
        "name": facts["name"],
        "architecture": facts["architecture"],
        "made for": facts["made_for"],
        "context": facts["context"] and f"{facts['context']:,}",
        "layers": facts["layers"],
        "key heads": f"{facts['kv_heads']} in {facts['kv_type']}",
        "vocabulary": f"{facts['vocabulary']:,}",
    }
    lines = [f"{word:<14} {plain(value)}" for word, value in rows.items() if value]
    for i, (name, graph) in enumerate(facts["graphs"].items()):
        millions = graph["multiply_adds"] / 1e6
        line = f"{name:<10} {graph['nodes']:>5} nodes  {millions:,.1f} M multiply-adds a token"
        lines.append(f"{'graphs' if i == 0 else '':<14} {line}")
    return lines


def describe(model: ModelFile, layout: Layout = "auto") -> dict[str, Any]:
    """The facts of a GGUF file as JSON values; None for a fact that the file does not state."""
    metadata = model.metadata
    architecture = metadata.get("general.architecture")
    weights, vocabulary, keys, why_not = _parts(model, layout)
    sampling, ignored = _sampling(model)
    types = _types(model, weights)
    return {
        "path": model.path,
        "bytes": model.n_bytes,
        "whole_bytes": model.whole_bytes,
        "complete": model.n_bytes >= model.whole_bytes,
        "gguf_version": model.version,
        "packed": model.is_packed,
        "name": metadata.get("general.name"),
        "architecture": architecture,
        "parameters": sum(row["parameters"] for row in types.values()),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        "memory_bytes": weights and weights.n_bytes,
        **{word: _number(metadata.get(f"{architecture}.{key}")) for word, key in _NUMBERS.items()},
        "vocabulary": _vocabulary(model),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        **_templates(model),
        "sampling": sampling,
        "runs": why_not is None,
        "why_not": why_not,
        "notes": (*keys, *ignored, *(vocabulary.notes if vocabulary else ())),
    }


def _templates(model: ModelFile) -> dict[str, Any]:
    """Whether the file has a chat template, and the names of all that it has."""
    from edge.template.template import templates_in

    try:
        names = list(templates_in(model.metadata, model.path))
    except EdgeError:
        names = []
    return {"chat_template": bool(names), "chat_templates": names}


def _sampling(model: ModelFile) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options that the file recommends, and notes of those that are ignored."""
    from edge.engine.engine import recommended_in
    from edge.session.recommended import recommended

    options, notes = recommended(recommended_in(model.metadata))
    names = (option.name for option in sampling_fields() if option.can_be_unset)
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}, notes


def _number(value: Any) -> Any:
    """One number for a list of equal numbers, one for each layer; any other value as it is."""
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        return value[0]
    return value


def _types(model: ModelFile, weights: Weights | None) -> dict[str, dict[str, Any]]:
    """For each tensor type: tensors, parameters, bytes in the file, and the layouts and bytes in
    memory of the tensors that are loaded. Most files have no others.
    """
    types: dict[str, dict[str, Any]] = {}
    for tensor in model.tensors.values():
        empty = {"tensors": 0, "parameters": 0, "bytes": 0, "layouts": [], "memory_bytes": 0}
        row = types.setdefault(tensor.type, empty)
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.n_bytes
    for item in weights.items() if weights else ():
        row, layout = types[item.type], weights and weights.layout(item.name)
        row["memory_bytes"] += item.n_bytes
        if layout not in row["layouts"]:
            row["layouts"].append(layout)
    return types


def _parts(
    model: ModelFile, layout: Layout
) -> tuple[Weights | None, Vocabulary | None, tuple[str, ...], str | None]:
    """Weights, vocabulary, notes of unknown keys, and why this build cannot run the file; but for
    the notes, each may be None.

    Nothing is packed.
    """
    from edge.engine.describe import describe
    from edge.loading import NativeOptions
    from edge.tokenizer.vocabulary import Vocabulary

    weights = vocabulary = None
    notes: tuple[str, ...] = ()
    try:
        described = describe(model, NativeOptions(layout=layout))
        weights, notes = described.weights.model, described.config.keys.notes
        vocabulary = Vocabulary.from_metadata(model.metadata, model.path)
    except EdgeError as e:
        return weights, vocabulary, notes, str(e)
    if model.n_bytes < model.whole_bytes:
        available, whole = mebibytes(model.n_bytes), mebibytes(model.whole_bytes)
        return weights, vocabulary, notes, f"{available} of {whole} are there, fetch the rest"
    return weights, vocabulary, notes, None


def _vocabulary(model: ModelFile) -> int | None:
    """The number of tokens: the embedding has one row for each. This decodes no token list."""
    embedding = model.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else None


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts as aligned lines, without those that the file does not state."""

    def number(word: str) -> str | None:
        value = facts[word]
        return f"{value:,}" if isinstance(value, int) else value and str(value)

    heads = facts["heads"] and f"{number('heads')} ({number('kv_heads') or number('heads')} KV)"
    tokenizer = ", ".join(filter(None, map(plain, (facts["tokenizer"], facts["pre_tokenizer"]))))
    kind = "packed" if facts["packed"] else f"GGUF v{facts['gguf_version']}"
    in_memory, size = facts["memory_bytes"], mebibytes(facts["bytes"])
    if not facts["complete"]:
        size += f" of {mebibytes(facts['whole_bytes'])}"
    rows = {
        "file": f"{facts['path']} ({size}, {kind})",
        "name": facts["name"],
        "architecture": facts["architecture"],
        "parameters": number("parameters"),
        "context": number("context"),
        "layers": number("layers"),
        "dimensions": number("dim"),
        "heads": heads,
        "vocabulary": number("vocabulary"),
        "tokenizer": tokenizer,
        "chat template": "yes" if facts["chat_template"] else "no",
        "templates": len(facts["chat_templates"]) > 1 and ", ".join(facts["chat_templates"]),
        "sampling": ", ".join(f"{name} {value}" for name, value in facts["sampling"].items()),
        "weights": in_memory and f"{mebibytes(in_memory)} in memory",
        "runs": "yes" if facts["runs"] else f"no: {facts['why_not']}",
    }
    lines = [f"{word:<14} {plain(value)}" for word, value in rows.items() if value]
    lines += [f"{'note':<14} {plain(note)}" for note in facts["notes"]]
    for i, (name, row) in enumerate(facts["types"].items()):
        head = "tensors" if i == 0 else ""
        line = f"{head:<14} {name:<8} {row['tensors']:>5} tensors  {_size(row, 'bytes')}"
        if row["layouts"]:
            line += f", in memory {_size(row, 'memory_bytes')}  {' '.join(row['layouts'])}"
        lines.append(line)
    return lines


def _size(row: dict[str, Any], key: str) -> str:
    n_bits = 8 * row[key] / row["parameters"] if row["parameters"] else 0
    return f"{mebibytes(row[key]):>10}  {n_bits:5.2f} bits a weight"
