"""A GGUF file that is written tensor by tensor, in any order; a run that was cut goes on.

    .NAME.partial   the file while it is written; it gets its name when it is complete
    .NAME.journal   the digest of what is to be written, then a line for each tensor that is done

Each tensor has its place before its data is known. A tensor is in the journal once its data is
synced to the disk, which happens every few seconds, and when the run ends early. A run that wants
the same header from the same source finds the same digest, and writes only what is missing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from edge.disk.atomic import only_one, sync_folder, write_all
from edge.disk.own import SAFELY
from edge.errors import InputError, ModelFileError
from edge.files import gguf_writer
from edge.files.gguf import Span
from edge.files.gguf_writer import TensorEntry
from edge.files.tensor_types import TYPE_NUMBERS
from edge.quantizer.types import n_bytes
from edge.sizes import show

__all__ = ["OutputFile", "OutputPlan", "writing"]

_SYNC_SECONDS = 5.0


@dataclass(frozen=True)
class OutputPlan:
    """A file to write. header: its bytes up to the data; places: tensor -> its bytes in the file;
    n_bytes: of the file.
    """

    header: bytes
    places: Mapping[str, Span]
    n_bytes: int

    @classmethod
    def of(
        cls,
        entries: Sequence[bytes],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        alignment: int,
    ) -> OutputPlan:
        """entries: of the keys; tensors: name -> type and shape, in the order of the data."""
        head, infos, offset = gguf_writer.start(len(tensors), entries), list[TensorEntry](), 0
        sizes = {name: n_bytes(*typed) for name, typed in tensors.items()}
        for name, (type_name, shape) in tensors.items():
            number = TYPE_NUMBERS[type_name] & 0xFFFF
            infos.append(TensorEntry(name, shape, number, offset))
            offset += -(-sizes[name] // alignment) * alignment
        gguf_writer.add_tensors(head, infos, alignment)
        starts = {info.name: len(head) + info.offset for info in infos}
        places = {name: Span(start, start + sizes[name]) for name, start in starts.items()}
        return cls(bytes(head), places, len(head) + offset)


class OutputFile:
    """A file that `writing` has opened. done: the tensors that need not be written any more."""

    def __init__(self, file: FileIO, journal: FileIO, plan: OutputPlan, done: set[str]) -> None:
        self.done = done
        self._file, self._journal, self._plan = file, journal, plan
        self._unsynced: list[str] = []
        self._synced = time.monotonic()

    def write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """Write the data of a tensor. Raises ModelFileError, and the errors of `pieces`."""
        start, end = self._plan.places[name]
        at = start
        for piece in pieces:
            self._file.seek(at)
            write_all(self._file, piece)
            at += memoryview(piece).nbytes
        assert at == end, name
        self.done.add(name)
        self._unsynced.append(name)
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Sync what is written to the disk, then the journal. Raises OSError."""
        os.fsync(self._file.fileno())
        lines = "".join(json.dumps(name) + "\n" for name in self._unsynced)
        write_all(self._journal, lines.encode())
        os.fsync(self._journal.fileno())
        self._unsynced, self._synced = [], time.monotonic()


@contextlib.contextmanager
def writing(path: Path, plan: OutputPlan, source: str) -> Iterator[OutputFile]:
    """Write a file in the block, which writes all tensors that are not `done`; then it replaces
    `path`. When the block raises, the tensors that were written wait for the next call.

    source: identifies where the tensors come from. Raises ModelFileError when the file cannot be
    written, InputError when another process is writing it.
    """
    part, journal = (path.with_name(f".{path.name}.{end}") for end in ("partial", "journal"))
    digest = hashlib.sha256(source.encode() + b"\n" + plan.header).hexdigest()
    try:
        with only_one(journal, seconds=0):
            done: set[str] | None = None
            try:
                with _opened(part) as file, open(journal, "r+b", buffering=0) as log:
                    done = _resumed(file, log, digest, plan)
                    _require_room(file, path, plan)
                    output = OutputFile(file, log, plan, done)
                    try:
                        yield output
                    finally:
                        output.sync()
            except BaseException:
                if done is not None and not done:  # there is nothing to go on with
                    part.unlink(missing_ok=True)
                    _remove(journal)
                raise
            os.replace(part, path)
            removed = _remove(journal)
        if not removed:
            _remove(journal)
        sync_folder(path.parent)
    except TimeoutError:
        raise InputError(f"{path}: another process is writing it") from None
    except OSError as e:
        raise _disk_error(e, path, plan) from e


def _remove(journal: Path) -> bool:
    """Remove the journal; False: it is open, and this system removes no open file."""
    with contextlib.suppress(PermissionError):
        journal.unlink()
        return True
    return False


def _opened(part: Path) -> FileIO:
    """The partial file, with the permissions of a new one. Links are not followed."""
    return open(os.open(part, os.O_RDWR | os.O_CREAT | SAFELY, 0o666), "r+b", buffering=0)


def _resumed(file: FileIO, log: FileIO, digest: str, plan: OutputPlan) -> set[str]:
    """The tensors that an earlier run wrote; without one, both files begin anew."""
    lines = log.read().split(b"\n")
    if lines[0] == digest.encode() and os.fstat(file.fileno()).st_size == plan.n_bytes:
        log.seek(sum(len(line) + 1 for line in lines[:-1]))  # a line that was cut is written over
        log.truncate()
        known = {json.dumps(name).encode(): name for name in plan.places}
        return {known[line] for line in lines[1:-1] if line in known}
    for old in (log, file):
        old.seek(0)
        old.truncate()
    write_all(file, plan.header)
    file.truncate(plan.n_bytes)
    write_all(log, digest.encode() + b"\n")
    return set()


def _require_room(file: FileIO, path: Path, plan: OutputPlan) -> None:
    """Raise OSError where the disk has no room for what is not written yet."""
    blocks = getattr(os.fstat(file.fileno()), "st_blocks", 0)  # of 512 bytes; Windows has none
    if shutil.disk_usage(path.parent).free < plan.n_bytes - 512 * blocks:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _disk_error(error: OSError, path: Path, plan: OutputPlan) -> ModelFileError:
    message = f"cannot be written: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += (
            f": the file takes {show(plan.n_bytes)}: make room, and run the same command again, "
            "which goes on"
        )
    return ModelFileError(message, path=path)
