"""`edge-run info`: what a GGUF file is, from its header alone."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.terminal import mebibytes
from edge.errors import EdgeError

if TYPE_CHECKING:
    from edge.gguf import GGUF

#: Our word -> the key in the metadata, after `<architecture>.`.
_NUMBERS = {
    "context": "context_length",
    "layers": "block_count",
    "dim": "embedding_length",
    "ffn": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
}


@click.command(short_help=COMMANDS["info"])
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def info(model: str | None, as_json: bool) -> None:
    """Say what a model file is, from its header alone.

    Works for files that cannot be run too, and says why they cannot.
    """
    from edge.gguf import GGUF
    from edge.store import default_model

    with GGUF.open(model if model is not None else str(default_model())) as gguf:
        facts = describe(gguf)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(facts)))


def describe(gguf: GGUF) -> dict[str, Any]:
    """The facts as JSON values; None for what the file does not say."""
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture")
    types: dict[str, dict[str, int]] = {}
    for tensor in gguf.tensors.values():
        row = types.setdefault(tensor.type, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += math.prod(tensor.shape)
        row["bytes"] += tensor.n_bytes
    why_not = _why_not(gguf)
    return {
        "path": gguf.path,
        "bytes": gguf.n_bytes,
        "gguf_version": gguf.version,
        "name": metadata.get("general.name"),
        "architecture": architecture,
        "parameters": sum(row["parameters"] for row in types.values()),
        "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
        **{word: metadata.get(f"{architecture}.{key}") for word, key in _NUMBERS.items()},
        "vocabulary": _vocabulary(gguf),
        "tokenizer": metadata.get("tokenizer.ggml.model"),
        "pre_tokenizer": metadata.get("tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in metadata,
        "runs": why_not is None,
        "why_not": why_not,
    }


def _why_not(gguf: GGUF) -> str | None:
    """Why this build cannot run the file, or None: the graph and the layouts, nothing packed."""
    try:
        from edge.engine import describe
        from edge.tokenizer.vocabulary import Vocabulary

        describe(gguf)
        Vocabulary.from_metadata(gguf.metadata, gguf.path)
    except EdgeError as e:
        return str(e)
    return None


def _vocabulary(gguf: GGUF) -> int | None:
    """Tokens, from the embedding's rows: the list of tokens need not be decoded."""
    embedding = gguf.tensors.get("token_embd.weight")
    return embedding.shape[0] if embedding else None


def _lines(facts: dict[str, Any]) -> list[str]:
    """The facts as aligned lines, without what the file does not say."""

    def number(word: str) -> str | None:
        value = facts[word]
        return f"{value:,}" if isinstance(value, int) else value and str(value)

    heads = facts["heads"] and f"{number('heads')} ({number('kv_heads') or number('heads')} KV)"
    tokenizer = ", ".join(filter(None, map(_text, (facts["tokenizer"], facts["pre_tokenizer"]))))
    rows = {
        "file": f"{facts['path']} ({mebibytes(facts['bytes'])}, GGUF v{facts['gguf_version']})",
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
        "runs": "yes" if facts["runs"] else f"no: {facts['why_not']}",
    }
    lines = [f"{word:<14} {_text(value)}" for word, value in rows.items() if value]
    for i, (name, row) in enumerate(facts["types"].items()):
        head = "tensors" if i == 0 else ""
        n_bits = 8 * row["bytes"] / row["parameters"] if row["parameters"] else 0
        lines.append(
            f"{head:<14} {name:<8} {row['tensors']:>5} tensors  {mebibytes(row['bytes']):>10}"
            f"  {n_bits:5.2f} bits a weight"
        )
    return lines


def _text(value: Any) -> str:
    """Text out of a file, safe for a terminal and on one line."""
    text = " ".join(str(value if value is not None else "").split())
    return "".join(c if c.isprintable() else "?" for c in text)
