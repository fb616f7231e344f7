"""Compiled graphs: an NPU's compiler takes seconds to minutes, so what it made is kept.

    <model's folder>/compiled/<soc>/        made ahead of time, see ahead.py
    <cache>/compiled/<folder's name>-<16 digits>/

Each holds a graph of one EPContext node for each of the model's graphs, the compiled binaries, and
manifest.json: what they were made from, and a SHA-256 of every file. A binary that is not what the
manifest says never reaches the provider, which checks little and may crash. An entry is whole or
not there: it is made under another name. Whatever the disk refuses, a run goes on without it.
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
from typing import TYPE_CHECKING, Any

from edge.device import cores
from edge.disk import atomic, room
from edge.errors import EdgeError, ModelFileError, UnsupportedError
from edge.files.json_file import JsonFile
from edge.onnx.files.proto import OnnxFile
from edge.onnx.providers import providers, sessions
from edge.onnx.providers.partition import Partition
from edge.onnx.providers.providers import PROVIDERS, Target

if TYPE_CHECKING:
    from edge.onnx.providers.sessions import Opened

__all__ = [
    "AHEAD",
    "Entry",
    "clear",
    "compile_into",
    "entries",
    "folder",
    "identity",
    "open_sessions",
]

#: Below a model's folder: what was compiled ahead of time, a folder for each SoC.
AHEAD = "compiled"

_FORMAT = 1
_MANIFEST = "manifest.json"
_SCRATCH = ".compile-"
_BLOCK = 1 << 20
_FACTS = {  # what a compiled graph depends on, and how a message calls it
    "model": "another model",
    "shapes": "graphs of other shapes",
    "provider": "another provider",
    "package": "another version of its package",
    "sdk": "another version of its SDK",
    "soc": "another SoC",
}


@dataclass(frozen=True)
class Entry:
    """A folder of compiled graphs. made_from: see `identity`; is_shared: the graphs are in one
    binary; files: name -> bytes, SHA-256; graphs: name -> its file, and how it was partitioned.
    """

    path: Path
    made_from: dict[str, Any]
    is_shared: bool
    files: dict[str, tuple[int, str]]
    graphs: dict[str, tuple[Path, Partition]]

    @classmethod
    def read(cls, path: Path) -> Entry:
        """Of its manifest alone. Raises ModelFileError for one that is missing or damaged."""
        manifest = JsonFile.read(path / _MANIFEST)
        if manifest.whole("format") != _FORMAT:
            raise manifest.error("format", f"is of another version of edge: {_advice(path)}")
        try:
            files = {
                _plain(name): (int(n_bytes), str(digest))
                for name, (n_bytes, digest) in manifest.inside("files").values.items()
            }
            graphs = {
                name: (path / _plain(facts["file"]), Partition.from_json(facts))
                for name, facts in manifest.inside("graphs").values.items()
            }
            if not {file.name for file, _ in graphs.values()} <= files.keys():
                raise ValueError("a graph without a checksum")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise ModelFileError(f"is damaged: {e}: {_advice(path)}", path=manifest.path) from e
        made_from = manifest.inside("made_from").values
        return cls(path, made_from, manifest.get("shared", bool, False), files, graphs)

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(n_bytes for n_bytes, _ in self.files.values())

    def require(self, want: Mapping[str, Any]) -> None:
        """Raise UnsupportedError unless it was made from just that."""
        for fact, other in _FACTS.items():
            have = self.made_from.get(fact)
            if have != want[fact]:
                is_short = fact not in ("model", "shapes")
                which = f" ({have}, here is {want[fact]})" if is_short else ""
                raise UnsupportedError(
                    f"{self.path} was compiled for {other}{which}: {_advice(self.path)}",
                    what=f"{fact} {have}",
                )

    def verify(self) -> None:
        """Raise ModelFileError unless every file is as it was written."""
        for name, (n_bytes, digest) in self.files.items():
            file = self.path / name
            try:
                right = file.stat().st_size == n_bytes and _sha256(file) == digest
            except OSError as e:
                raise ModelFileError(
                    f"cannot be read: {e.strerror or e}: {_advice(self.path)}", path=file
                ) from e
            if not right:
                raise ModelFileError(
                    f"was changed since it was compiled: {_advice(self.path)}", path=file
                )

    def open(self, target: Target) -> dict[str, Opened]:
        """Its graphs, ready to run. Raises ModelFileError, UnsupportedError."""
        opened = {}
        for i, (name, (file, partition)) in enumerate(self.graphs.items()):
            config = _shared(i, len(self.graphs)) if self.is_shared else {}
            loaded = sessions.open_graph(OnnxFile.read(file), target, config)
            source = f"compiled before, in {self.path}"
            opened[name] = dataclasses.replace(loaded, partition=partition, source=source)
        return opened


def identity(graphs: Mapping[str, OnnxFile], target: Target, key: bytes) -> dict[str, Any]:
    """What compiled graphs depend on: model, shapes, provider, versions, SoC; as JSON has it."""
    found = target.provider.look()
    shapes = {
        name: [list(value.dims or ()) for value in graph.inputs.values()]
        for name, graph in graphs.items()
    }
    return {
        "model": key.hex(),
        "shapes": shapes,
        "provider": target.provider.name,
        "package": found.version,
        "sdk": found.sdk,
        "soc": target.soc or f"that of {cores.cpu_name()}",
    }


def open_sessions(
    graphs: Mapping[str, OnnxFile], target: Target, key: bytes | None = None
) -> dict[str, Opened]:
    """Sessions of the graphs of one model, by their names; `embedding` runs on the CPU always.

    Where the provider compiles: out of what was compiled ahead of time for this SoC, or the cache,
    or now. key: what tells the model from others; None: compiled graphs are not kept.
    Raises what `sessions.open_graph` does, ModelFileError for a compiled graph that was changed,
    UnsupportedError for one that was made from something else.
    """
    cpu = Target(PROVIDERS["cpu"], "CPU", target.threads)
    opened = {n: sessions.open_graph(g, cpu) for n, g in graphs.items() if n == sessions.ON_CPU}
    others = {n: graph for n, graph in graphs.items() if n != sessions.ON_CPU}
    if target.provider.compiles and key is not None and others:
        return opened | _find_or_make(others, target, key)
    return opened | _compile(others, target)


def _find_or_make(graphs: Mapping[str, OnnxFile], target: Target, key: bytes) -> dict[str, Opened]:
    want = identity(graphs, target, key)
    home = next(iter(graphs.values())).path.parent
    if target.soc and (home / AHEAD / target.soc).is_dir():
        entry = _checked(home / AHEAD / target.soc, want)
        if not (entry.is_shared and providers.is_simulated()):  # which crashes on two in one
            return entry.open(target)
    path = _place(home.resolve().name, want)
    if path is not None:
        if path.is_dir():
            return _use(path, want, target)
        if not target.fallback:
            return _make(path, graphs, target, want)
    return _compile(graphs, target)


def compile_into(
    path: Path, graphs: Mapping[str, OnnxFile], target: Target, want: dict[str, Any], share: bool
) -> dict[str, Opened]:
    """Compile graphs into the folder `path`, which must not be there; share: into one binary.

    Returns their sessions. Raises OSError, ModelFileError, UnsupportedError.
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
        partitions = {name: one.partition for name, one in opened.items()}
        _seal(scratch, want, partitions, share)
        scratch.rename(path)
        atomic.sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    source = f"compiled now, kept in {path}"
    return {name: dataclasses.replace(one, source=source) for name, one in opened.items()}


def _compile(
    graphs: Mapping[str, OnnxFile],
    target: Target,
    config: Callable[[int, str], dict[str, str]] = lambda i, name: {},
) -> dict[str, Opened]:
    return {
        name: sessions.open_graph(graph, target, config(i, name))
        for i, (name, graph) in enumerate(graphs.items())
    }


def _shared(i: int, n: int) -> dict[str, str]:
    """Configuration of the i-th of n sessions whose graphs are in one binary."""
    last = {"ep.stop_share_ep_contexts": "1"} if i == n - 1 else {}
    return {"ep.share_ep_contexts": "1", **last}


def _seal(
    scratch: Path, want: dict[str, Any], partitions: Mapping[str, Partition], share: bool
) -> None:
    """Write the manifest, and everything to the disk. Raises OSError."""
    files = {}
    for file in sorted(scratch.iterdir()):
        files[file.name] = (file.stat().st_size, _sha256(file))
        with open(file, "r+b") as written:
            os.fsync(written.fileno())
    graphs = {name: {"file": f"{name}.onnx", **p.to_json()} for name, p in partitions.items()}
    manifest = {
        "format": _FORMAT,
        "made_from": want,
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


def _checked(path: Path, want: Mapping[str, Any]) -> Entry:
    entry = Entry.read(path)
    entry.require(want)
    entry.verify()
    return entry


def _plain(name: str) -> str:
    """A file's name that leads nowhere else. Raises ValueError."""
    if not name or name != os.path.basename(name) or "\\" in name or name in (".", ".."):
        raise ValueError("a file that is not beside it")
    return name


def _advice(path: Path) -> str:
    """What to do about an entry that cannot be used."""
    if path.parent == folder():
        return "remove it with `edge-run cache --clear`"
    return "export the model anew with --soc, or remove the folder"


# ---- the cache -------------------------------------------------------------------------------


def folder() -> Path:
    """Where the cached ones are; not created here. Raises UnsupportedError, as `cache_dir`."""
    return room.cache_dir() / "compiled"


def entries() -> list[tuple[Path, int, float]]:
    """The cached ones: path, bytes, when it was used last (seconds since 1970), that one first."""
    found = []
    for path in _paths():
        with contextlib.suppress(OSError):
            found.append((path, _size(path), path.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry[2])


def clear() -> int:
    """Remove all that is cached. Returns bytes. Raises OSError."""
    if not folder().is_dir():
        return 0
    with atomic.only_one(folder() / ".lock") as is_only:
        room.sweep(folder(), _SCRATCH, is_only, _delete)
        return sum(_remove(path) for path in _paths())


def limit() -> int:
    """Bytes that they may take. Raises InputError for a bad EDGE_CACHE_SIZE, OSError."""
    return room.limit(folder(), sum(map(_size, _paths())))


def _place(name: str, want: Mapping[str, Any]) -> Path | None:
    """Where the cache has what is wanted, or would have it; None: the cache is off."""
    try:
        if limit() == 0 or not room.can_keep(folder()):
            return None
        digest = hashlib.sha256(json.dumps(want, sort_keys=True).encode()).hexdigest()
        return folder() / f"{name[:100]}-{digest[:16]}"
    except (OSError, UnsupportedError):  # unsupported: there is no home folder
        return None


def _use(path: Path, want: Mapping[str, Any], target: Target) -> dict[str, Opened]:
    entry = _checked(path, want)
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used: the others go first
    return entry.open(target)


def _make(
    path: Path, graphs: Mapping[str, OnnxFile], target: Target, want: dict[str, Any]
) -> dict[str, Opened]:
    """Compile and keep it, unless another process does so right now: then use what that made."""
    with contextlib.ExitStack() as lock:
        try:
            is_only = lock.enter_context(atomic.only_one(path.parent / ".lock"))
            if path.is_dir():
                return _use(path, want, target)
            room.sweep(folder(), _SCRATCH, is_only, _delete)
            n_bytes = sum(graph.weight_bytes for graph in graphs.values())
            held = [(old, size) for old, size, _ in reversed(entries())]
            is_free = n_bytes <= shutil.disk_usage(folder()).free
            if is_free and room.make_room(n_bytes, limit(), held, _remove):
                return compile_into(path, graphs, target, want, share=False)
        except OSError:
            pass
        except EdgeError:  # of the model, or of a disk that is full: what follows tells
            if path.is_dir():
                raise
    return _compile(graphs, target)


def _paths() -> Iterator[Path]:
    return (path for path in folder().glob("[!.]*") if path.is_dir())


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> int:
    """Bytes that went. Under another name first: nobody may find half of it."""
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
