"""Compiled graphs, kept on the disk, because an NPU's compiler takes seconds to minutes.

    <model's folder>/compiled/<soc>/        made ahead of time, see ahead.py
    <cache>/compiled/<folder's name>-<16 digits>/

An entry is one such folder. For each of the model's graphs it holds a graph of one EPContext node.
It also holds the compiled binaries, and manifest.json, which says what they were made from and the
SHA-256 of every file. A binary that differs from the manifest never reaches the provider, which
checks little and may crash. An entry is written under another name and then renamed, so it is
always complete. If the disk refuses to keep an entry, the run goes on without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge.device import cores
from edge.disk import atomic, room
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files.json_file import JsonFile
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import providers, sessions
from edge.onnx.providers.partition import Partition
from edge.onnx.providers.providers import PROVIDERS, Target

if TYPE_CHECKING:
    from edge.onnx.providers.sessions import OpenedGraph

__all__ = [
    "AHEAD",
    "Cached",
    "Checksum",
    "CompiledGraph",
    "Entry",
    "clear",
    "compile_into",
    "entries",
    "folder",
    "identity",
    "open_sessions",
]

#: The subfolder of a model's folder with graphs compiled ahead of time, a folder for each SoC.
AHEAD = "compiled"

_FORMAT = 1
_MANIFEST = "manifest.json"
_SCRATCH = ".compile-"
_BLOCK = 1 << 20
_FACTS = {  # a fact that a compiled graph depends on -> the words of a message for another one
    "model": "another model",
    "shapes": "graphs of other shapes",
    "provider": "another provider",
    "package": "another version of its package",
    "sdk": "another version of its SDK",
    "soc": "another SoC",
}


class Checksum(NamedTuple):
    """The size of a file in bytes, and its SHA-256 in hexadecimal."""

    n_bytes: int
    digest: str


class CompiledGraph(NamedTuple):
    """The file of a compiled graph, and the partition that it was compiled with."""

    file: Path
    partition: Partition


class Cached(NamedTuple):
    """A folder in the cache. used: seconds since 1970."""

    path: Path
    n_bytes: int
    used: float


@dataclass(frozen=True)
class Entry:
    """A folder of compiled graphs.

    made_from: see `identity`. is_shared: all graphs are in one binary. files and graphs: by name.
    """

    path: Path
    made_from: dict[str, Any]
    is_shared: bool
    files: dict[str, Checksum]
    graphs: dict[str, CompiledGraph]

    @classmethod
    def read(cls, path: Path) -> Entry:
        """Read the manifest of an entry. Raises ModelFileError if it is missing or damaged."""
        manifest = JsonFile.read(path / _MANIFEST)
        if manifest.whole("format") != _FORMAT:
            raise manifest.error("format", f"is of another version of edge: {_advice(path)}")
        try:
            files = {
                _plain(name): Checksum(int(n_bytes), str(digest))
                for name, (n_bytes, digest) in manifest.inside("files").values.items()
            }
            graphs = {
                name: CompiledGraph(path / _plain(facts["file"]), Partition.from_json(facts))
                for name, facts in manifest.inside("graphs").values.items()
            }
            if not {graph.file.name for graph in graphs.values()} <= files.keys():
                raise ValueError("a graph without a checksum")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ModelFileError(f"is damaged: {e}: {_advice(path)}", path=manifest.path) from e
        made_from = manifest.inside("made_from").values
        return cls(path, made_from, manifest.get("shared", bool, False), files, graphs)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.n_bytes for file in self.files.values())

    def require(self, wanted: Mapping[str, Any]) -> None:
        """Raise UnsupportedError unless the entry was made from `wanted`, see `identity`."""
        for fact, other in _FACTS.items():
            value = self.made_from.get(fact)
            if value != wanted[fact]:
                is_short = fact not in ("model", "shapes")
                values = f" ({value}, here is {wanted[fact]})" if is_short else ""
                raise UnsupportedError(
                    f"{self.path} was compiled for {other}{values}: {_advice(self.path)}",
                    what=f"{fact} {value}",
                )

    def verify(self) -> None:
        """Raise ModelFileError unless every file has the size and SHA-256 of the manifest."""
        for name, (n_bytes, digest) in self.files.items():
            file = self.path / name
            try:
                is_whole = file.stat().st_size == n_bytes and _sha256(file) == digest
            except OSError as e:
                raise ModelFileError(
                    f"cannot be read: {e.strerror or e}: {_advice(self.path)}", path=file
                ) from e
            if not is_whole:
                raise ModelFileError(
                    f"was changed since it was compiled: {_advice(self.path)}", path=file
                )

    def open(self, target: Target) -> dict[str, OpenedGraph]:
        """Sessions of the graphs. Raises ModelFileError, UnsupportedError."""
        opened = {}
        for i, (name, (file, partition)) in enumerate(self.graphs.items()):
            config = _shared(i, len(self.graphs)) if self.is_shared else {}
            loaded = sessions.open_graph(OnnxFile.read(file), target, config)
            source = f"compiled before, in {self.path}"
            opened[name] = dataclasses.replace(loaded, partition=partition, source=source)
        return opened


def identity(graphs: Mapping[str, OnnxFile], target: Target, key: bytes) -> dict[str, Any]:
    """The facts that compiled graphs depend on, as JSON values.

    key: the fingerprint of the model.
    """
    availability = target.provider.look()
    shapes = {
        name: [list(value.dims or ()) for value in graph.inputs.values()]
        for name, graph in graphs.items()
    }
    return {
        "model": key.hex(),
        "shapes": shapes,
        "provider": target.provider.name,
        "package": availability.version,
        "sdk": availability.sdk,
        "soc": target.soc or f"that of {cores.cpu_name()}",
    }


def open_sessions(
    graphs: Mapping[str, OnnxFile], target: Target, key: bytes | None = None
) -> dict[str, OpenedGraph]:
    """Sessions of the graphs of one model, by name. The graph `embedding` always runs on the CPU.

    If the provider compiles, the compiled graphs come from the model's folder, where they were
    compiled ahead of time for this SoC, or from the cache, or are compiled now.
    key: the fingerprint of the model; None: compiled graphs are not kept.
    Raises what `sessions.open_graph` raises, ModelFileError for a compiled graph that was changed,
    UnsupportedError for one that was made from other facts.
    """
    cpu = Target(PROVIDERS["cpu"], "CPU", target.threads)
    opened = {n: sessions.open_graph(g, cpu) for n, g in graphs.items() if n == sessions.ON_CPU}
    rest = {n: graph for n, graph in graphs.items() if n != sessions.ON_CPU}
    if target.provider.compiles and key is not None and rest:
        return opened | _find_or_make(rest, target, key)
    return opened | _compile(rest, target)


def _find_or_make(
    graphs: Mapping[str, OnnxFile], target: Target, key: bytes
) -> dict[str, OpenedGraph]:
    wanted = identity(graphs, target, key)
    home = next(iter(graphs.values())).path.parent
    if target.soc and (home / AHEAD / target.soc).is_dir():
        entry = _checked(home / AHEAD / target.soc, wanted)
        if not (entry.is_shared and providers.is_simulated()):  # the simulator crashes on these
            return entry.open(target)
    path = _place(home.resolve().name, wanted)
    if path is not None:
        if path.is_dir():
            return _use(path, wanted, target)
        if not target.fallback:
            return _make(path, graphs, target, wanted)
    return _compile(graphs, target)


def compile_into(
    path: Path, graphs: Mapping[str, OnnxFile], target: Target, wanted: dict[str, Any], share: bool
) -> dict[str, OpenedGraph]:
    """Compile graphs into the new folder `path`, and return their sessions.

    wanted: see `identity`. share: into one binary. Raises OSError, ModelFileError,
    UnsupportedError.
    """
    scratch = path.with_name(f"{_SCRATCH}{secrets.token_hex(8)}")
    try:
        scratch.mkdir(parents=True)

        def config(i: int, name: str) -> dict[str, str]:
            entries = {
                "ep.context_enable": "1",
                "ep.context_embed_mode": "0",
                "ep.context_file_path": os.fspath(scratch / f"{name}.onnx"),
            }
            return entries | (_shared(i, len(graphs)) if share else {})

        opened = _compile(graphs, target, config)
        partitions = {name: graph.partition for name, graph in opened.items()}
        _seal(scratch, wanted, partitions, share)
        scratch.rename(path)
        atomic.sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    source = f"compiled now, kept in {path}"
    return {name: dataclasses.replace(graph, source=source) for name, graph in opened.items()}


def _compile(
    graphs: Mapping[str, OnnxFile],
    target: Target,
    config: Callable[[int, str], dict[str, str]] = lambda i, name: {},
) -> dict[str, OpenedGraph]:
    return {
        name: sessions.open_graph(graph, target, config(i, name))
        for i, (name, graph) in enumerate(graphs.items())
    }


def _shared(i: int, n: int) -> dict[str, str]:
    """The configuration of session i of n sessions whose graphs are in one binary."""
    last = {"ep.stop_share_ep_contexts": "1"} if i == n - 1 else {}
    return {"ep.share_ep_contexts": "1", **last}


def _seal(
    scratch: Path, wanted: dict[str, Any], partitions: Mapping[str, Partition], share: bool
) -> None:
    """Write the manifest, and flush all files to the disk. Raises OSError."""
    files = {}
    for file in sorted(scratch.iterdir()):
        files[file.name] = Checksum(file.stat().st_size, _sha256(file))
        with open(file, "r+b") as written:
            os.fsync(written.fileno())
    graphs = {name: {"file": f"{name}.onnx", **p.to_json()} for name, p in partitions.items()}
    manifest = {
        "format": _FORMAT,
        "made_from": wanted,
        "shared": share,
        "files": files,
        "graphs": graphs,
    }
    with open(scratch / _MANIFEST, "x", encoding="utf-8") as out:
        json.dump(manifest, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as data:
        while block := data.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _checked(path: Path, wanted: Mapping[str, Any]) -> Entry:
    entry = Entry.read(path)
    entry.require(wanted)
    entry.verify()
    return entry


def _plain(name: str) -> str:
    """The name of a file in the same folder. Raises ValueError for any other path."""
    if not name or name != os.path.basename(name) or "\\" in name or name in (".", ".."):
        raise ValueError("a file that is not beside it")
    return name


def _advice(path: Path) -> str:
    """The advice of a message about an entry that cannot be used."""
    if path.parent == folder():
        return "remove it with `edge-run cache --clear`"
    return "export the model anew with --soc, or remove the folder"


# ---- the cache -------------------------------------------------------------------------------


def folder() -> Path:
    """The folder of the cached entries, which may not exist.

    Raises UnsupportedError, as `cache_dir` does.
    """
    return room.cache_dir() / "compiled"


def entries() -> list[Cached]:
    """The cached entries, the last used one first."""
    cached = []
    for path in _paths():
        with contextlib.suppress(OSError):
            cached.append(Cached(path, _size(path), path.stat().st_mtime))
    return sorted(cached, key=lambda entry: -entry.used)


def clear() -> int:
    """Remove all cached entries. Returns the bytes that were removed. Raises OSError."""
    if not folder().is_dir():
        return 0
    with atomic.only_one(folder() / ".lock") as is_only:
        room.sweep(folder(), _SCRATCH, is_only, _delete)
        return sum(_remove(path) for path in _paths())


def limit() -> int:
    """Bytes that cached entries may take. Raises InputError for a bad EDGE_CACHE_SIZE, OSError."""
    return room.limit(folder(), sum(map(_size, _paths())))


def _place(name: str, wanted: Mapping[str, Any]) -> Path | None:
    """The path of an entry in the cache, whether it exists or not; None: the cache is off."""
    try:
        if limit() == 0 or not room.can_keep(folder()):
            return None
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        return folder() / f"{name[:100]}-{digest[:16]}"
    except (OSError, UnsupportedError):  # UnsupportedError: there is no home folder
        return None


def _use(path: Path, wanted: Mapping[str, Any], target: Target) -> dict[str, OpenedGraph]:
    entry = _checked(path, wanted)
    with contextlib.suppress(OSError):
        os.utime(path)  # the entries used longest ago are removed first
    return entry.open(target)


def _make(
    path: Path, graphs: Mapping[str, OnnxFile], target: Target, wanted: dict[str, Any]
) -> dict[str, OpenedGraph]:
    """Compile graphs and keep them. If another process has just done so, use its entry."""
    with contextlib.ExitStack() as lock:
        try:
            is_only = lock.enter_context(atomic.only_one(path.parent / ".lock"))
            if path.is_dir():
                return _use(path, wanted, target)
            room.sweep(folder(), _SCRATCH, is_only, _delete)
            n_bytes = sum(graph.weight_bytes for graph in graphs.values())
            oldest_first = [(old.path, old.n_bytes) for old in reversed(entries())]
            is_free = n_bytes <= shutil.disk_usage(folder()).free
            if is_free and room.make_room(n_bytes, limit(), oldest_first, _remove):
                return compile_into(path, graphs, target, wanted, share=False)
        except OSError:
            pass
        except EdgeError:  # of the model, or of a full disk: compiling again will tell
            if path.is_dir():
                raise
    return _compile(graphs, target)


def _paths() -> Iterator[Path]:
    return (path for path in folder().glob("[!.]*") if path.is_dir())


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> int:
    """Remove an entry, and return its bytes. Renaming it first lets nobody find half of it."""
    n_bytes = _size(path)
    scratch = path.with_name(f"{_SCRATCH}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):
        path.rename(scratch)
        _delete(scratch)
        return n_bytes
    return 0


def _size(path: Path) -> int:
    """Bytes of the files in a folder."""
    n_bytes = 0
    with contextlib.suppress(OSError):
        for file in path.iterdir():
            n_bytes += file.lstat().st_size
    return n_bytes
