"""The log itself: whole, torn or damaged, and what happens when the disk refuses."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sessions import limited, seal

from edge.errors import SessionFileError
from edge.session import contents as session_contents
from edge.session import file as session_file
from edge.session.contents import RECORD, Contents, Kind, Part, Record
from edge.session.file import SessionFile

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

PAGES = [random.Random(i).randbytes(80) for i in range(4)]
State = tuple[list[int], dict[str, Any], dict[int, tuple[int, bytes]]]


def page(i: int, positions: int = 64, data: bytes | None = None) -> Part:
    return Part(Kind.PAGE, i, positions, PAGES[i] if data is None else data)


def state(i: int) -> Part:
    return Part.json(Kind.STATE, {"n": i})


def snapshot(n_tokens: int = 70) -> list[Part]:
    parts = [Part.json(Kind.META, {"model": "m"}), state(0), Part.tokens(0, range(n_tokens))]
    return parts + [page(i, min(64, n_tokens - 64 * i)) for i in range(-(-n_tokens // 64))]


#: More of the session: it grows, is cut, grows another way.
APPENDS = [
    [Part.tokens(70, range(70, 100))],
    [state(1), Part.tokens(100, range(100, 130)), page(1)],
    [Part.tokens(66, [7, 8, 9]), state(2)],
    [Part.tokens(69, range(69, 200)), page(1, data=PAGES[3]), page(2)],
]


def said(file: SessionFile) -> State:
    """Tokens, state, and (positions, bytes) of each page."""
    c = file.contents
    n = max(c.pages, default=-1) + 1
    data = [None if view is None else bytes(view) for view in file.pages(n)]
    return c.tokens.tolist(), c.state, {i: (p[1], data[i] or b"") for i, p in c.pages.items()}


def read(path: Path) -> State:
    file = SessionFile.open(path)
    try:
        return said(file)
    finally:
        file.close()


def make(path: Path) -> tuple[list[State], list[int]]:
    """A file of a snapshot and APPENDS: what it said, and where it ended, after each."""
    file = SessionFile.create(path, snapshot())
    states, ends = [said(file)], [file.end]
    for parts in APPENDS:
        file.append(parts)
        states.append(said(file))
        ends.append(file.end)
    file.close()
    return states, ends


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, ends = make(path)
    assert read(path) == states[-1]
    assert states[0] == (list(range(70)), {"n": 0}, {0: (64, PAGES[0]), 1: (6, PAGES[1])})
    assert path.stat().st_size == ends[-1] and path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["s"]


def test_tokens_that_give_way_take_their_pages_along(tmp_path: Path) -> None:
    states, _ = make(tmp_path / "s")
    assert states[2][2] == {0: (64, PAGES[0]), 1: (64, PAGES[1])}
    assert states[3][0] == [*range(66), 7, 8, 9]
    assert states[3][2] == {0: (64, PAGES[0]), 1: (2, PAGES[1])}
    assert states[4][2] == {0: (64, PAGES[0]), 1: (64, PAGES[3]), 2: (64, PAGES[2])}


def test_a_cut_at_any_byte_leaves_the_last_whole_append(tmp_path: Path) -> None:
    path = tmp_path / "s"
    states, ends = make(path)
    for n in reversed(range(ends[-1])):
        os.truncate(path, n)
        if n < ends[0]:
            with pytest.raises(SessionFileError, match=r"not a session file|cut off"):
                read(path)
        else:
            assert read(path) == states[sum(end <= n for end in ends) - 1], n


def test_a_flipped_bit_is_found_or_drops_the_last_append(tmp_path: Path) -> None:
    path, rng, raised = tmp_path / "s", random.Random(0), 0
    states, ends = make(path)
    with open(path, "r+b", buffering=0) as file:
        for n, byte in enumerate(path.read_bytes()):
            os.pwrite(file.fileno(), bytes([byte ^ 1 << rng.randrange(8)]), n)
            try:
                got = read(path)
            except SessionFileError:
                raised += 1
            else:  # before the last append: in a page that was replaced, nobody reads it
                assert got == states[-2 if n >= ends[-2] else -1], n
            os.pwrite(file.fileno(), bytes([byte]), n)
    assert raised == ends[-2] - 2 * len(PAGES[1])  # two copies of it were replaced


def test_damage_says_where(tmp_path: Path) -> None:
    path = tmp_path / "s"
    _, ends = make(path)
    data = bytearray(path.read_bytes())
    data[ends[1] + 70] ^= 1  # the payload of the second append's first record
    path.write_bytes(data)
    with pytest.raises(SessionFileError, match=r"record at byte .* damaged") as e:
        read(path)
    assert (e.value.offset, e.value.field, e.value.path) == (ends[1], "record", str(path))


@pytest.mark.parametrize("torn", ["cut", "zeros", "noise", "later half only"])
def test_a_torn_append_is_dropped_and_overwritten(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "s"
    states, ends = make(path)
    data = path.read_bytes()
    start, n = ends[-2], ends[-1] - ends[-2]
    tail = {
        "cut": data[start : start + n // 2],
        "zeros": bytes(n),
        "noise": random.Random(1).randbytes(n),
        "later half only": bytes(n // 2) + data[start + n // 2 :],
    }[torn]
    path.write_bytes(data[:start] + tail)
    file = SessionFile.open(path, write=True)
    assert said(file) == states[-2] and path.stat().st_size == start
    file.append(APPENDS[-1])
    file.close()
    assert read(path) == states[-1]


@pytest.mark.all_isas
@pytest.mark.parametrize("behind", ["zeros", "noise", "one byte", "its own start", "a hole"])
@pytest.mark.parametrize("write", [False, True])
def test_a_torn_append_with_bytes_behind_it_is_dropped(
    tmp_path: Path, behind: str, write: bool
) -> None:
    """After a power cut the length may be that of whole blocks, while data of the batch is not
    what was written: its pages too are looked at, wherever the file ends.
    """
    path = tmp_path / "s"
    states, ends = make(path)
    data, (start, end) = path.read_bytes(), ends[-2:]
    n = -end % 4096
    more = {
        "zeros": bytes(n),
        "noise": random.Random(1).randbytes(n),
        "one byte": b"E",
        "its own start": data[start : start + 200],
        "a hole": bytes(n),
    }[behind]
    rng = random.Random(2)
    for at in [*range(start, end, 37), end - 1]:  # from there on to the end, or a block of it
        for to in (end, min(end, at + 20)):
            torn = bytearray(data)
            torn[at:to] = bytes(to - at) if rng.random() < 0.5 else rng.randbytes(to - at)
            path.write_bytes(torn + more)
            if behind == "a hole":
                os.truncate(path, 1 << 40)
            file = SessionFile.open(path, write=write)
            want = states[-1 if torn == data else -2]
            assert said(file) == want, at
            if write:
                file.append([Part.tokens(len(want[0]), [1])])
                assert read(path)[0] == [*want[0], 1]
            file.close()
    path.write_bytes(data + more)
    assert read(path) == states[-1]


def test_damage_before_the_last_append_is_none_of_a_power_cut(tmp_path: Path) -> None:
    """What has a batch behind it was on the disk: it is not dropped in silence."""
    path = tmp_path / "s"
    _, ends = make(path)
    data = bytearray(path.read_bytes())
    data[ends[1] + 70] ^= 1
    path.write_bytes(data[: ends[-1] - 3])
    with pytest.raises(SessionFileError, match="damaged"):
        read(path)


def test_reading_leaves_a_torn_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make(path)
    torn = path.read_bytes()[:-1]
    path.write_bytes(torn)
    read(path)
    assert path.read_bytes() == torn


def test_records_cannot_be_moved(tmp_path: Path) -> None:
    path, other = tmp_path / "s", tmp_path / "other"
    for each in (path, other):
        file = SessionFile.create(each, snapshot())
        first = file.end
        for ids in ([1, 2], [3, 4]):
            file.append([Part.tokens(70, ids)])
        file.close()
    data, foreign = path.read_bytes(), other.read_bytes()
    n = (len(data) - first) // 2
    a, b = data[first : first + n], data[first + n :]
    for tail in (b + a, b, foreign[first:]):
        path.write_bytes(data[:first] + tail)
        assert read(path)[0] == list(range(70))
    path.write_bytes(data[:first] + a + a)
    assert read(path)[0] == [*range(70), 1, 2]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda data: b"", "not a session file"),
        (lambda data: b"GGUF" + data, "not a session file"),
        (lambda data: seal(data, version=2), "version 2, this build reads version 1"),
        (lambda data: seal(data, end=2**63), "bytes are missing"),
        (lambda data: seal(data, end=100), "damaged"),
        (lambda data: data[:100] + b"\0" + data[100:], "damaged"),
        (lambda data: data[:100] + data[101:], "damaged|missing"),
    ],
)
def test_bad_files(tmp_path: Path, spoil: Callable[[bytes], bytes], match: str) -> None:
    path = tmp_path / "s"
    SessionFile.create(path, snapshot()).close()
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(SessionFileError, match=match):
        read(path)


def add(file: SessionFile, part: Part, **header: int) -> None:
    """A record as a batch of its own, with a right checksum, whatever it says."""
    at, data = os.fstat(file._file.fileno()).st_size, bytes(part.data)
    fields = {"n_bytes": len(data), "batch": at, "left": 0} | header
    numbers = (part.kind, part.a, part.b, fields["n_bytes"], fields["batch"])
    unsigned = RECORD.pack(b"EREC", *numbers, *file._checksum(data), fields["left"], 0)[:-4]
    crc = struct.pack("<I", file._record_crc(unsigned, at))
    os.pwrite(file._file.fileno(), unsigned + crc + data, at)


@pytest.mark.parametrize(
    "part",
    [
        Part.tokens(71, [1]),
        Part.tokens(2**64 - 1, [1]),
        Part(Kind.TOKENS, 0, 0, b"abc"),
        page(1, 7),
        page(0, 0),
        page(0, 65),
        page(2**64 - 1, 1, PAGES[0]),
        Part(Kind.STATE, 0, 0, b"[]"),
        Part(Kind.STATE, 0, 0, b"\xff"),
        Part(Kind.STATE, 0, 0, b"[" * 100_000),
        Part(Kind.META, 0, 0, b"9" * 5000),
        Part(9, 0, 0, b""),  # type: ignore[arg-type]
    ],
)
def test_records_that_say_what_cannot_be(tmp_path: Path, part: Part) -> None:
    path = tmp_path / "s"
    file = SessionFile.create(path, snapshot())
    add(file, part)
    file.close()
    with pytest.raises(SessionFileError, match="damaged"):
        read(path)


@pytest.mark.parametrize("kind", [Kind.META, Kind.STATE, Kind.TOKENS, 9])
def test_a_record_larger_than_it_can_be_takes_no_memory(tmp_path: Path, kind: Kind) -> None:
    """A length that nobody writes, in a sparse file: it is refused before there is a buffer."""
    path, n_bytes = tmp_path / "s", 1 << 36
    file = SessionFile.create(path, snapshot())
    add(file, Part(kind, 70, 0, b""), n_bytes=n_bytes)
    os.truncate(path, os.path.getsize(path) + n_bytes)
    file.close()
    with pytest.raises(SessionFileError, match=r"damaged: .* (the most is|kind 9)"):
        read(path)


def test_records_of_one_kind_do_not_add_up(tmp_path: Path) -> None:
    """What a batch holds but for pages is kept until it is whole: one record of each kind."""
    path = tmp_path / "s"
    file = SessionFile.create(path, snapshot())
    end = file.end
    add(file, state(1), left=1)
    add(file, state(2), batch=end)
    file.close()
    with pytest.raises(SessionFileError, match="a second STATE of one batch"):
        read(path)


def test_pages_of_another_size_are_not_read(tmp_path: Path) -> None:
    path, n_bytes = tmp_path / "s", 1 << 36
    file = SessionFile.create(path, snapshot())
    add(file, page(0, 64, b""), n_bytes=n_bytes)
    os.truncate(path, os.path.getsize(path) + n_bytes)
    file.close()
    file = SessionFile.open(path, page_bytes=[80])
    with pytest.raises(SessionFileError, match=rf"page 0 .* {n_bytes} bytes, where 80 belong"):
        said(file)
    file.close()


def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    file = SessionFile.create(path, snapshot())
    before = path.read_bytes()
    monkeypatch.setattr(session_contents, "_MOST_JSON", 1000)
    with pytest.raises(SessionFileError, match=r"cannot be written: STATE of 1\d+ bytes"):
        file.append([Part.tokens(70, [1]), Part.json(Kind.STATE, {"messages": "x" * 1000})])
    assert path.read_bytes() == before
    file.append(APPENDS[0])
    assert said(file) == read(path)
    file.close()


def test_many_cuts_take_no_time_for_what_stays(tmp_path: Path) -> None:
    """A cut looks at what it takes away, and a record that only adds at nothing."""
    contents = Contents()
    record = Record(0, Kind.TOKENS, 0, 0, 4 * 64 * 1000, 0, (0, 0), 0)
    contents.apply(record, bytes(record.n_bytes))
    for i in range(1000):
        contents.apply(record._replace(kind=Kind.PAGE, a=i, b=64), b"")
    looked = list[int]()

    class Noting(dict[int, Any]):
        def pop(self, i: int, *default: Any) -> Any:  # type: ignore[override]
            looked.append(i)
            return super().pop(i, *default)

    contents.pages = Noting(contents.pages)
    contents.apply(record._replace(a=64_000, n_bytes=4), bytes(4))
    contents.apply(record._replace(a=63_900, n_bytes=4), bytes(4))
    assert (
        looked == [998, 999, 1000] and contents.pages[998][1] == 28 and len(contents.pages) == 999
    )


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    {"missing": lambda: None, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[kind]()
    for write in (False, True):
        with pytest.raises(SessionFileError, match=r"cannot be opened|is no file"):
            SessionFile.open(path, write=write)
    if kind != "missing":
        with pytest.raises(SessionFileError, match="is no file"):
            SessionFile.create(path, snapshot())


def test_what_is_no_session_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")
    with pytest.raises(SessionFileError, match="not a session file: it is not replaced"):
        SessionFile.create(path, snapshot())
    assert path.read_bytes() == b"GGUF and so on"
    path.write_bytes(b"")
    SessionFile.create(path, snapshot()).close()
    assert read(path)[0] == list(range(70))


# ---- the disk refuses ----


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"
    make(path)
    before = path.read_bytes()
    for n_bytes in (0, 64, 100, 400, 600):
        with limited(n_bytes), pytest.raises(SessionFileError, match="cannot be written"):
            SessionFile.create(path, snapshot())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_disk_that_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "s"
    make(path)
    before, real = path.read_bytes(), getattr(os, call)

    def refuse(*args: Any) -> Any:
        if call == "open" and not str(args[0]).endswith(".tmp"):
            return real(*args)
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as m:
        m.setattr(session_file.os, call, refuse)
        with pytest.raises(SessionFileError, match="Read-only file system"):
            SessionFile.create(path, snapshot())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s"]
    SessionFile.create(path, snapshot(5)).close()  # the lock is free
    assert read(path)[0] == list(range(5))


def test_an_append_that_fails_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "s"
    file = SessionFile.create(path, snapshot())
    before = path.read_bytes()
    for more in (0, 10, 64, 75, 150):
        with (
            limited(len(before) + more),
            pytest.raises(SessionFileError, match="cannot be written"),
        ):
            file.append(APPENDS[1])
        assert path.read_bytes() == before
    file.append(APPENDS[0])
    assert said(file) == read(path)
    file.close()


# ---- who may write ----


def test_one_writes_others_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    file = SessionFile.create(path, snapshot())
    for attempt in (
        lambda: SessionFile.open(path, write=True),
        lambda: SessionFile.create(path, snapshot()),
    ):
        with pytest.raises(SessionFileError, match="another session writes to this file"):
            attempt()
    assert read(path) == said(file)
    replaced = SessionFile.create(path, snapshot(3), held=file)
    file.close()
    with pytest.raises(SessionFileError, match="another session"):  # the lock moved along
        SessionFile.open(path, write=True)
    replaced.close()
    SessionFile.open(path, write=True).close()


def test_two_at_the_first_save(tmp_path: Path) -> None:
    scratch = session_file._lock(str(tmp_path / ".s.tmp"), os.O_RDWR | os.O_CREAT)
    with pytest.raises(SessionFileError, match="another session"):
        SessionFile.create(tmp_path / "s", snapshot())
    os.close(scratch)  # it was killed: what it left is used up
    SessionFile.create(tmp_path / "s", snapshot()).close()
    assert os.listdir(tmp_path) == ["s"]


def test_a_lock_on_a_file_that_was_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    SessionFile.create(path, snapshot()).close()
    real, once = session_file._lock_handle, iter([True])

    def slow(handle: int, name: str) -> None:
        if next(once, False):
            SessionFile.create(path, snapshot(9)).close()
        real(handle, name)

    monkeypatch.setattr(session_file, "_lock_handle", slow)
    file = SessionFile.open(path, write=True)
    assert len(file.contents.tokens) == 9
    file.close()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "s")
    SessionFile.create(tmp_path / "link", snapshot()).close()
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "real") == ["s"]
    assert read(tmp_path / "link")[0] == list(range(70))
