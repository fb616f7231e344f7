"""Session files: an append-only log that a kill or a power cut at any moment leaves readable.

    file    | header, 64 bytes | records: the snapshot | records of append 1 | of append 2 | ...
    header  | "EDGESESS" | u32 version | u32 0 | u64 snapshot's end | id[16] | 0[20] | u32 crc |
    record  | "EREC" | u32 kind | u64 a | u64 b | u64 n_bytes | u64 batch | u64 sum[2] | u32 left |
            | u32 crc | payload, n_bytes |

    kind    a               b                    payload
    META    0               0                    JSON: of what model, with which options
    TOKENS  first position  0                    int32 ids; those from a on give way to them
    PAGE    number          positions that hold  a page of the KV cache, as it lies in memory
    STATE   0               0                    JSON: what changes from call to call

Page i of layer group g has the number i * n_groups + g, where META tells of n_groups.
All numbers are little-endian. What is appended together is a batch and counts as a whole or not at
all: `batch` is the position of its first record, `left` how many records of it are still to come.
`crc` (CRC-32) goes over the record's own header and position and begins with the file header's, so
that a record cannot be moved, within a file or to another; `sum` (edge_checksum) goes over the
payload.

The snapshot is written under another name, synced and renamed: it must be whole. A batch is synced
before the next one begins, so that only the last one can be torn, whatever a file system puts
behind it: it is dropped, as if it had never been. A bad record with one of a later batch behind it
is damage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge import forked, native
from edge.disk.atomic import sync_folder, write_all
from edge.disk.own import SAFELY
from edge.errors import SessionFileError
from edge.native import ffi, lib
from edge.session.contents import RECORD, Bytes, Contents, Kind, Part, Record, check_size

__all__ = ["VERSION", "SessionFile"]

#: Rises when the records, or the bytes of a page, change their meaning.
VERSION = 1

_MAGIC, _MARK = b"EDGESESS", b"EREC"
_HEADER = struct.Struct("<8sIIQ16s20xI")
_CRC = struct.Struct("<I")
_BLOCK = 1 << 20
_DATASYNC = getattr(os, "fdatasync", os.fsync)  # not every system has fdatasync


class SessionFile:
    """An open session file. Get one with `create` or `open`; use it in one thread at a time.

    A file that may be written to is locked until `close`. path: where it is; contents: what its
    whole batches say.
    """

    def __init__(self, path: str, handle: int, *, write: bool) -> None:
        self.path = path
        self.contents = Contents()
        self._file = os.fdopen(handle, "r+b" if write else "rb", buffering=0)
        self._threads = native.new_threads(1)
        self._page_bytes: Sequence[int] = ()
        self._crc = 0
        forked.watch(self)

    @property
    def end(self) -> int:
        """Bytes up to the last whole batch."""
        return self.contents.end

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], parts: Sequence[Part], held: SessionFile | None = None
    ) -> SessionFile:
        """Write a whole new file, and put it in the place of one that is there.

        held: the open file that was made at this path. Raises SessionFileError when it cannot be
        written, or another process writes to it, or what is there is no session file: that is left
        as it was.
        """
        target = os.path.realpath(path)
        folder, name = os.path.split(target)
        scratch = os.path.join(folder, f".{name}.tmp")
        with contextlib.ExitStack() as stack:
            try:
                if held is not None and _is_at(held._handle(), target):
                    _check_kind(held._handle(), target)
                elif os.path.lexists(target):
                    stack.callback(os.close, _lock_old(target))
                file = cls(target, _lock_new(scratch), write=True)
                failed = stack.enter_context(contextlib.ExitStack())
                failed.callback(file.close)
                failed.callback(_remove, scratch)
                file._write_snapshot(parts)
                os.replace(scratch, target)
                failed.pop_all()
            except OSError as e:
                raise SessionFileError(f"cannot be written: {e.strerror or e}", path=path) from e
        sync_folder(Path(folder))
        return file

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, write: bool = False, page_bytes: Sequence[int] = ()
    ) -> SessionFile:
        """Open a file and read what it says, but for the pages.

        write: lock it, to append; a torn end is cut off. page_bytes: of the model's pages, of each
        layer group; others are not read; empty: any are. Raises SessionFileError for a file that is
        missing, damaged, of another version or kind, or in use by another process.
        """
        target = os.path.realpath(path)
        try:
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise SessionFileError("is no file", path=path)
            handle = _lock(target, os.O_RDWR) if write else os.open(target, os.O_RDONLY | SAFELY)
        except OSError as e:
            raise SessionFileError(f"cannot be opened: {e.strerror or e}", path=path) from e
        file = cls(target, handle, write=write)
        file._page_bytes = page_bytes
        try:
            size = file._read()
            if write and size > file.end:
                file._truncate()
                os.fsync(file._file.fileno())
        except OSError as e:
            file.close()
            raise SessionFileError(f"cannot be read: {e.strerror or e}", path=path) from e
        except BaseException:
            file.close()
            raise
        return file

    def is_there(self) -> bool:
        """Whether the file at the path is still this one, and holds what was written to it; not
        when somebody deleted, replaced or emptied it. Raises SessionFileError once closed.
        """
        handle = self._handle()
        try:
            if not _is_at(handle, self.path) or os.fstat(handle).st_size < self.end:
                return False
            self._file.seek(0)
            header = self._file.read(_HEADER.size) or b""
        except OSError:
            return False
        return len(header) == _HEADER.size and _HEADER.unpack(header)[-1] == self._crc

    def append(self, parts: Sequence[Part]) -> None:
        """Add a batch; when this returns, it is on the disk.

        Raises SessionFileError when it cannot be written: the file is then as it was.
        """
        handle = self._handle()
        try:
            records = self._write_batch(parts)
            _DATASYNC(handle)
            self._apply(records, parts)
        except OSError as e:
            self._truncate()
            raise SessionFileError(f"cannot be written: {e.strerror or e}", path=self.path) from e
        except BaseException:
            self._truncate()
            raise

    def pages(self, n: int) -> Sequence[memoryview | None]:
        """The first n pages, read when they are asked for, one after another in the same memory;
        None for one that is not there.

        Taking one raises SessionFileError when its bytes are not what was written.
        """
        return _Pages(self._page, n)

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._file.close()
        if self._threads is not None:
            ffi.release(self._threads)
            self._threads = None

    def _handle(self) -> int:
        """The open file. Raises SessionFileError once closed."""
        if self._file.closed:
            raise SessionFileError("was closed, or was opened before a fork", path=self.path)
        return self._file.fileno()

    def _forked(self) -> None:
        self.close()  # the lock is the parent's as well, who keeps it

    # ---- writing ----

    def _write_snapshot(self, parts: Sequence[Part]) -> None:
        """Header and first batch, synced."""
        self._file.truncate(0)
        end = _HEADER.size + sum(RECORD.size + len(part.data) for part in parts)
        identity = secrets.token_bytes(16)
        unsigned = _HEADER.pack(_MAGIC, VERSION, 0, end, identity, 0)[: -_CRC.size]
        self._crc, self.contents = zlib.crc32(unsigned), Contents(_HEADER.size)
        write_all(self._file, unsigned + _CRC.pack(self._crc))
        records = self._write_batch(parts)
        os.fsync(self._file.fileno())
        self._apply(records, parts)

    def _write_batch(self, parts: Sequence[Part]) -> list[Record]:
        """Records behind the last whole batch, not synced."""
        self._file.seek(self.end)
        at, records = self.end, list[Record]()
        for i, part in enumerate(parts):
            left = len(parts) - 1 - i
            try:
                check_size(part.kind, len(part.data))
            except ValueError as e:
                raise SessionFileError(f"cannot be written: {e}", path=self.path) from e
            pair = self._checksum(part.data)
            numbers = (part.kind, part.a, part.b, len(part.data), self.end)
            records.append(Record(at, *numbers, pair, left))
            unsigned = RECORD.pack(_MARK, *numbers, *pair, left, 0)[: -_CRC.size]
            write_all(self._file, unsigned + _CRC.pack(self._record_crc(unsigned, at)))
            write_all(self._file, part.data)
            at = records[-1].end
        return records

    def _apply(self, records: Sequence[Record], parts: Sequence[Part]) -> None:
        """Take over what the records of a batch say, all of it or nothing: by one assignment."""
        contents = self.contents.copy()
        for record, part in zip(records, parts, strict=True):
            contents.apply(record, part.data)
        self.contents = contents

    def _truncate(self) -> None:
        """Cut off what is behind the last whole batch. Where that fails, it stays as a torn end."""
        with contextlib.suppress(OSError):
            self._file.truncate(self.end)

    # ---- reading ----

    def _read(self) -> int:
        """Read header and records into `contents`. Returns the bytes of the file."""
        size = os.fstat(self._file.fileno()).st_size
        snapshot_end = self._read_header(size)
        self.contents.end = _HEADER.size
        while self.end < size:
            first = self.end
            batch = self._read_batch(size)
            bad = batch.bad
            if bad is None and first >= snapshot_end and not self._goes_on(batch.records[-1].end):
                bad = self._bad_page(batch.records)
            if bad is not None:
                if first < snapshot_end or self._is_followed(bad, size):
                    raise self._damaged(bad, "record")
                break
            for record, data in zip(batch.records, batch.payloads, strict=True):
                try:
                    self.contents.apply(record, data)
                except (ValueError, RecursionError, MemoryError) as e:
                    raise self._damaged(record.at, "record", str(e)) from e
            if first < snapshot_end != self.end:
                raise self._damaged(first, "snapshot")
        if self.end < snapshot_end:
            raise self._damaged(self.end, "snapshot")
        return size

    def _read_header(self, size: int) -> int:
        """Where the snapshot ends."""
        data = self._file.read(_HEADER.size) or b""
        if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
            raise SessionFileError("is not a session file", path=self.path, offset=0)
        if len(data) < _HEADER.size:
            raise self._damaged(0, "header", "it is cut off")
        _, version, _, end, _, crc = _HEADER.unpack(data)
        if zlib.crc32(data[: -_CRC.size]) != crc:
            raise self._damaged(0, "header")
        if version != VERSION:
            raise SessionFileError(
                f"is of version {version}, this build reads version {VERSION}: "
                "go on with the edge that wrote it",
                path=self.path,
                field="version",
            )
        if end > size:
            raise self._damaged(size, "snapshot", f"it is cut off, {end - size} bytes are missing")
        self._crc = crc  # not that of the whole header, which is the same for all
        return int(end)

    def _read_batch(self, size: int) -> _Batch:
        """The batch at `end`, up to the first record that is not right."""
        batch, at, left, kinds = _Batch(), self.end, None, set[int]()
        while left != 0:
            record = self._header_at(at)
            if record is None or record.end > size or record.batch != self.end:
                return replace(batch, bad=at)
            if left is not None and record.left != left - 1:
                return replace(batch, bad=at)
            self._check_record(record, kinds)
            data = memoryview(bytearray(0 if record.kind == Kind.PAGE else record.n_bytes))
            if record.kind != Kind.PAGE and not self._read_payload(record, data):
                return replace(batch, bad=at)
            batch.records.append(record)
            batch.payloads.append(data)
            at, left = record.end, record.left
        return batch

    def _check_record(self, record: Record, kinds: set[int]) -> None:
        """Check a record before memory is taken for it. kinds: those of the records before it in
        its batch, pages left out; its own is added.
        """
        try:
            check_size(record.kind, record.n_bytes)
            if record.kind in kinds:
                raise ValueError(f"a second {Kind(record.kind).name} of one batch")
        except ValueError as e:
            raise self._damaged(record.at, "record", str(e)) from e
        if record.kind != Kind.PAGE:
            kinds.add(record.kind)

    def _goes_on(self, end: int) -> bool:
        """Whether a batch begins at `end`. The one before it was synced then."""
        record = self._header_at(end)
        return record is not None and record.batch == end

    def _bad_page(self, records: Sequence[Record]) -> int | None:
        """The first page of these whose bytes are not right."""
        for record in records:
            if record.kind == Kind.PAGE and self._belonging_bytes(record) == record.n_bytes:
                data = memoryview(bytearray(record.n_bytes))
                if not self._read_payload(record, data):
                    return record.at
        return None

    def _belonging_bytes(self, record: Record) -> int:
        """Bytes of the model's page with this number; of the record, where none are known."""
        sizes = self._page_bytes
        return sizes[record.a % len(sizes)] if sizes else record.n_bytes

    def _is_followed(self, bad: int, size: int) -> bool:
        """Whether a record of a later batch lies behind a bad one."""
        start = bad + 1
        while (start := self._data_from(start, size)) < size:
            self._file.seek(start)
            data = self._file.read(_BLOCK + len(_MARK) - 1) or b""
            at = data.find(_MARK)
            while at >= 0:
                record = self._header_at(start + at)
                if record is not None and record.batch > self.end:
                    return True
                at = data.find(_MARK, at + 1)
            start += _BLOCK
        return False

    def _data_from(self, at: int, size: int) -> int:
        """The first position from `at` on in no hole of a sparse file, or the end."""
        try:
            return os.lseek(self._file.fileno(), at, os.SEEK_DATA)
        except AttributeError:  # a system that does not tell
            return at
        except OSError as e:
            return size if e.errno == errno.ENXIO else at

    def _header_at(self, at: int) -> Record | None:
        """The record at a position; None when there is none."""
        self._file.seek(at)
        data = self._file.read(RECORD.size) or b""
        if len(data) < RECORD.size:
            return None
        mark, kind, a, b, n_bytes, batch, s0, s1, left, crc = RECORD.unpack(data)
        if mark != _MARK or crc != self._record_crc(data[: -_CRC.size], at):
            return None
        return Record(at, kind, a, b, n_bytes, batch, (s0, s1), left)

    def _read_payload(self, record: Record, target: memoryview) -> bool:
        """Read a record's payload into target. Returns whether it is what was written."""
        self._file.seek(record.at + RECORD.size)
        done = 0
        while done < len(target):
            n = self._file.readinto(target[done:])
            if not n:
                return False
            done += n
        return self._checksum(target) == record.sum

    def _page(self, i: int, buffer: memoryview) -> memoryview | None:
        """Page i, in the buffer, or in a new one where that has another size; see `pages`."""
        if i not in self.contents.pages:
            return None
        record, _ = self.contents.pages[i]
        if (n_bytes := self._belonging_bytes(record)) != record.n_bytes:
            why = f"{record.n_bytes} bytes, where {n_bytes} belong"
            raise self._damaged(record.at, f"page {i}", why)
        if len(buffer) != record.n_bytes:
            buffer = memoryview(bytearray(record.n_bytes))
        if not self._read_payload(record, buffer):
            raise self._damaged(record.at, f"page {i}")
        return buffer

    def _record_crc(self, header: bytes, at: int) -> int:
        return zlib.crc32(header + struct.pack("<Q", at), self._crc)

    def _checksum(self, data: Bytes) -> tuple[int, int]:
        pair = ffi.new("uint64_t[2]")
        with ffi.from_buffer("uint8_t[]", data) as source:
            native.check(lib.edge_checksum(self._threads, source, len(data), pair))
        return int(pair[0]), int(pair[1])

    def _damaged(self, at: int, what: str, why: str = "its checksum is wrong") -> SessionFileError:
        return SessionFileError(
            f"the file is damaged: {why}", path=self.path, offset=at, field=what
        )


@dataclass(frozen=True)
class _Batch:
    """Records of a batch and their payloads (empty for pages). bad: position of the first record
    that is not right; None: all are.
    """

    records: list[Record] = field(default_factory=list)
    payloads: list[Bytes] = field(default_factory=list)
    bad: int | None = None


class _Pages(Sequence["memoryview | None"]):
    """Pages of a file: no more than one of them is in memory. read: gives one, see `_page`."""

    def __init__(self, read: Callable[[int, memoryview], memoryview | None], n: int) -> None:
        self._read, self._n = read, n
        self._buffer = memoryview(b"")

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: Any) -> Any:
        if i >= self._n:
            raise IndexError(i)
        page = self._read(i, self._buffer)
        if page is not None:
            self._buffer = page
        return page


def _lock(path: str, flags: int) -> int:
    """Open a file and lock it. Raises SessionFileError when another has the lock, OSError."""
    while True:
        handle = os.open(path, flags | SAFELY, 0o600)  # a conversation is its owner's alone
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise SessionFileError("is no file", path=path)
            _lock_handle(handle, path)
            if _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was renamed or replaced before we had the lock: once more


def _lock_new(path: str) -> int:
    """Make a new file and lock it. One that a killed process left there is removed first.

    Raises SessionFileError for one that somebody writes to, OSError.
    """
    while True:
        try:
            return _lock(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as left:
                if stat.S_ISREG(os.lstat(path).st_mode):
                    left.callback(os.close, _lock(path, os.O_RDWR))
                os.unlink(path)


def _lock_handle(handle: int, path: str) -> None:
    """Lock a file, where its file system has locks. Raises SessionFileError when another has it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise SessionFileError("another session writes to this file", path=path) from e
    except (ImportError, OSError):
        pass


def _is_at(handle: int, path: str) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _lock_old(path: str) -> int:
    """Lock a file that is to be replaced: a session file, or an empty one."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise SessionFileError("is no file: it is not replaced", path=path)
    handle = _lock(path, os.O_RDONLY)
    try:
        _check_kind(handle, path)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_kind(handle: int, path: str) -> None:
    """Raise SessionFileError for a file that is to be replaced and is none of ours, nor empty."""
    os.lseek(handle, 0, os.SEEK_SET)
    if os.read(handle, len(_MAGIC)) not in (b"", _MAGIC):
        raise SessionFileError("is not a session file: it is not replaced", path=path)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
