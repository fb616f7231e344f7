"""`edge-run cache`: packed models and compiled graphs in the cache."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from edge.cli import COMMANDS
from edge.cli.terminal import mebibytes, plain
from edge.sizes import show

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help=COMMANDS["cache"])
@click.option("--clear", "is_clear", is_flag=True, help="Remove packed models and compiled graphs.")
@click.option("--all", "is_all", is_flag=True, help="With --clear: the fetched model too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def cache(is_clear: bool, is_all: bool, as_json: bool) -> None:
    """List or clear packed models and compiled graphs.

    The first run of a model packs its weights and keeps them in the cache; later runs map them.
    Graphs that were compiled for an NPU are kept, too. When either are more than the limit, those
    not used for longest go. EDGE_CACHE_SIZE sets the limit (such as 8GB; 0: keep none); else it is
    half of what the disk could give, 20 GiB at most.
    """
    if is_all and not is_clear:
        raise click.UsageError("--all needs --clear.")
    from edge.disk import pull, room
    from edge.onnx.providers import compiled
    from edge.weights import packed_cache

    fetched = room.cache_dir() / pull.DEFAULT.file
    if is_clear:
        n_bytes = packed_cache.clear() + compiled.clear()
        if is_all and fetched.is_file():
            n_bytes += fetched.stat().st_size
            fetched.unlink()
        click.echo(json.dumps({"removed": n_bytes}) if as_json else f"removed {mebibytes(n_bytes)}")
        return
    facts = _facts(packed_cache.limit(), fetched)
    click.echo(json.dumps(facts, ensure_ascii=False) if as_json else "\n".join(_lines(facts)))


def _facts(limit: int, fetched: Path) -> dict[str, Any]:
    """The content of the cache as JSON values; sizes in bytes, times in seconds since 1970."""
    from edge.onnx.providers import compiled
    from edge.weights import packed_cache

    graphs = [
        {"folder": entry.path.name, "bytes": entry.n_bytes, "used": entry.used}
        for entry in compiled.entries()
    ]
    files: list[dict[str, Any]] = [
        {"file": file.path.name, "model": file.model, "bytes": file.n_bytes, "used": file.used}
        for file in packed_cache.files()
    ]
    has_fetched = fetched.is_file()
    return {
        "folder": str(packed_cache.folder()),
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "limit": limit,
        "compiled": graphs,
        "fetched": {"path": str(fetched), "bytes": fetched.stat().st_size} if has_fetched else None,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{plain(file['file'])}  {plain(file['model'] or '?')}  {mebibytes(file['bytes'])}  "
        f"{_day(file['used'])}"
        for file in facts["files"]
    ]
    total, limit = mebibytes(facts["bytes"]), show(facts["limit"])
    lines.append(f"{len(facts['files'])} packed in {facts['folder']}: {total} of at most {limit}")
    for row in facts["compiled"]:
        size, used = mebibytes(row["bytes"]), _day(row["used"])
        lines.append(f"compiled: {plain(row['folder'])}  {size}  {used}")
    if facts["fetched"]:
        lines.append(f"fetched: {facts['fetched']['path']}, {mebibytes(facts['fetched']['bytes'])}")
    return lines


def _day(used: float) -> str:
    return f"used {time.strftime('%Y-%m-%d %H:%M', time.localtime(used))}"
