"""`edge-run devices`: the execution providers of onnxruntime, and which of them work here."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click

from edge.cli import COMMANDS
from edge.cli.terminal import plain


@click.command(short_help=COMMANDS["devices"])
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def devices(as_json: bool) -> None:
    """List what ONNX models can run on, and what is missing.

    The names are those that --ep takes. GGUF models run without any of them.
    """
    from edge.onnx.providers import providers

    rows = [_facts(row) for row in providers.PROVIDERS.values()]
    simulated = providers.is_simulated() and any(r["name"] == "qnn" and r["here"] for r in rows)
    if as_json:
        facts = {
            "providers": rows,
            "socs": list(providers.SOCS),
            "simulated": simulated,
        }
        click.echo(json.dumps(facts))
        return
    for row in rows:
        click.echo(_lines(row))
    if simulated:
        click.echo(f"\nqnn is simulated on this machine: --soc {', '.join(providers.SOCS)}")


def _facts(row: Any) -> dict[str, Any]:
    availability = row.look()
    return {
        "name": row.name,
        "here": availability.missing is None,
        "package": row.package or None,
        "version": availability.version,
        "sdk": availability.sdk,
        "devices": list(availability.devices),
        "missing": availability.missing,
        "dialect": row.dialect,
    }


def _lines(row: dict[str, Any]) -> str:
    head = f"{row['name']:<9} {'here' if row['here'] else 'missing':<8} "
    if row["here"]:
        sdk = f" (SDK {row['sdk']})" if row["sdk"] else ""
        text = f"{', '.join(row['devices'])}: {row['package']} {row['version']}{sdk}"
    else:
        text = row["missing"]
    return textwrap.fill(plain(text), 100, initial_indent=head, subsequent_indent=" " * len(head))
