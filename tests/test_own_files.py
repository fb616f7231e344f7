"""Locks that cannot stop us for good, and files that are their owner's alone."""

from __future__ import annotations

import fcntl
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fake_model import edge_run
from test_packed import TOKENS, logits

import edge
from edge.disk import atomic, own, pull
from edge.errors import InputError, SessionFileError
from edge.kv.page_store import PageStore

KEY, PAGE = bytes(32), memoryview(bytes(4096))


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Somebody else has the lock, and does nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def slept(seconds: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr("edge.disk.atomic.time.sleep", slept)


@pytest.fixture
def anybody() -> Iterator[None]:
    """Files may be read and written by all, unless the program says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def anothers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """anothers(path): it belongs to another user from now on."""

    def give(path: Path) -> Path:
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        return path

    return give


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# ---- locks ----


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_a_lock_is_waited_for_some_seconds(tmp_path: Path, seconds: float) -> None:
    with (
        held(tmp_path / ".lock"),
        pytest.raises(TimeoutError, match="another process holds this lock"),
        atomic.only_one(tmp_path / ".lock", seconds=seconds),
    ):
        pass
    with atomic.only_one(tmp_path / ".lock", seconds=0) as is_only:
        assert is_only


def test_who_is_at_work_is_waited_for(tmp_path: Path) -> None:
    path, steps = tmp_path / ".lock", itertools.count()
    other = path.open("wb")
    fcntl.flock(other, fcntl.LOCK_EX)

    def at_work() -> int:
        step = next(steps)
        if step == 5:
            other.close()  # the work is done
        return step

    with atomic.only_one(path, seconds=0.01, at_work=at_work) as is_only:
        assert is_only and other.closed


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "another's", "open to all"])
def test_a_lock_is_a_regular_file_of_our_own(
    tmp_path: Path, kind: str, anothers: Callable[[Path], Path]
) -> None:
    lock, target = tmp_path / ".lock", tmp_path / "target"
    target.write_text("kept")
    {
        "link": lambda: lock.symlink_to(target),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
        "another's": lambda: anothers(target).rename(lock),
        "open to all": lambda: (target.chmod(0o666), target.rename(lock)),
    }[kind]()
    with pytest.raises(OSError, match=r"\.lock"), atomic.only_one(lock):
        pass
    assert (target if target.exists() else lock).read_text() == "kept"


def test_a_lock_is_its_owner_s_alone(tmp_path: Path, anybody: None) -> None:
    with atomic.only_one(tmp_path / ".lock"):
        assert mode(tmp_path / ".lock") == 0o600


def test_what_a_lock_file_holds_stays(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("something of somebody")
    with atomic.only_one(tmp_path / ".lock"):
        pass
    assert (tmp_path / ".lock").read_text() == "something of somebody"


@pytest.mark.native
def test_a_load_goes_on_without_the_cache(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    monkeypatch.setattr(atomic, "_LOCK_SECONDS", 0.2)
    path = tiny_gguf(type="Q4_0")
    with held(tmp_path / "packed" / ".lock"):
        without = logits(path)
        assert not list((tmp_path / "packed").glob("*.gguf"))
    assert np.array_equal(logits(path), without)
    assert len(list((tmp_path / "packed").glob("*.gguf"))) == 1


def test_a_pull_goes_on_beside_one_that_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[Path]()
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(atomic, "_LOCK_SECONDS", 0.2)
    monkeypatch.setattr(pull, "_fetch", lambda source, scratch, *_: fetched.append(scratch))
    theirs = tmp_path / ".pull-theirs"
    theirs.mkdir()
    with held(tmp_path / ".lock"):
        assert pull.pull()[1] and len(fetched) == 1
    assert theirs.exists()  # it may go on


@pytest.mark.native
def test_a_page_that_leaves_the_memory_waits_for_nobody(tmp_path: Path, no_waiting: None) -> None:
    with held(tmp_path / ".lock"):
        pages = PageStore(tmp_path)
        pages.write(KEY, PAGE)
        assert not pages.has(KEY) and pages.error is None
    pages.write(KEY, PAGE)
    assert pages.has(KEY)


@pytest.mark.native
def test_a_page_that_is_to_be_kept_waits_some_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_LOCK_SECONDS", 0.2)
    pages = PageStore(tmp_path)
    with held(tmp_path / ".lock"), pytest.raises(InputError, match="another process"):
        pages.write(KEY, PAGE, durable=True)
    pages.write(KEY, PAGE, durable=True)
    assert pages.error is None


# ---- owners and modes ----


@pytest.mark.native
def test_pages_are_for_their_owner_alone(tmp_path: Path, anybody: None) -> None:
    pages = PageStore(tmp_path / "pages")
    pages.write(KEY, PAGE)
    assert mode(tmp_path / "pages") == 0o700
    assert {mode(path) for path in (tmp_path / "pages").iterdir()} == {0o600}


@pytest.mark.native
@pytest.mark.parametrize("kind", ["open to all", "another's"])
def test_pages_go_to_no_folder_of_others(
    tmp_path: Path, kind: str, anothers: Callable[[Path], Path]
) -> None:
    if kind == "another's":
        anothers(tmp_path)
    else:
        tmp_path.chmod(0o1777)
    why = "belongs to another user" if kind == "another's" else "everybody may write"
    with pytest.raises(InputError, match=why):
        PageStore(tmp_path)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["pipe", "link", "another's", "open to all"])
def test_a_page_is_a_file_of_our_own(
    tmp_path: Path, kind: str, anothers: Callable[[Path], Path]
) -> None:
    pages = PageStore(tmp_path)
    pages.write(KEY, PAGE)
    (path,) = tmp_path.glob("*.page")
    if kind == "another's":
        anothers(path)
    elif kind == "open to all":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "elsewhere")
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(tmp_path / "elsewhere")
    assert not pages.read(KEY, memoryview(bytearray(len(PAGE))))


@pytest.mark.native
def test_weights_come_from_no_folder_of_others(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    path = tiny_gguf(type="Q4_0")
    want = logits(path)
    (tmp_path / "packed").chmod(0o777)
    with pytest.warns(edge.EdgeWarning, match="everybody may write to it: nothing is kept"):
        assert np.array_equal(logits(path), want)


@pytest.mark.native
@pytest.mark.parametrize("kind", ["open to all", "another's"])
def test_weights_come_from_no_file_of_others(
    tiny_gguf: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    anothers: Callable[[Path], Path],
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    path = tiny_gguf(type="Q4_0")
    want = logits(path)
    (packed,) = (tmp_path / "packed").glob("*.gguf")
    before = packed.stat().st_ino
    if kind == "another's":
        anothers(packed)
    else:
        packed.chmod(0o666)
    with open(packed):  # its number is not given away anew
        assert np.array_equal(logits(path), want)
        if kind == "open to all" or os.geteuid() == 0:  # else all files are another's now
            assert packed.stat().st_ino != before and own.is_own(packed)


@pytest.mark.native
def test_a_session_is_no_file_that_was_there(
    tiny_gguf: Callable[..., Path], tmp_path: Path, anybody: None
) -> None:
    """Under the name of its scratch: a link, another's file."""
    target, session_file = tmp_path / "target", tmp_path / "a.session"
    scratch = tmp_path / ".a.session.tmp"
    target.write_text("kept")
    with edge.load(tiny_gguf(), context=64, threads=1) as model, model.session() as session:
        session.generate(list(TOKENS[:3]), max_tokens=1)
        for plant in (lambda: scratch.symlink_to(target), scratch.touch):
            plant()
            session.save(session_file)
            assert not session_file.is_symlink() and mode(session_file) == 0o600
            session_file.unlink()
        with open(scratch, "wb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(SessionFileError, match="another session writes"):
                session.save(session_file)
    assert target.read_text() == "kept"


@pytest.mark.native
def test_a_pipe_is_no_session(tmp_path: Path) -> None:
    from edge.session.file import _lock

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionFileError, match="is no file"):
        _lock(str(tmp_path / "pipe"), os.O_RDWR)


def test_a_fetched_model_is_for_all(tmp_path: Path, anybody: None) -> None:
    """Weights are no secret: several users may share what root has put there."""
    own.make_folder(tmp_path / "cache")
    assert mode(tmp_path / "cache") == 0o755
    with atomic.replacing(tmp_path / "model", ".scratch-") as file:
        file.write(b"weights")
    assert mode(tmp_path / "model") == 0o666


def test_a_child_that_was_forked_meanwhile_keeps_no_lock(tmp_path: Path) -> None:
    source, target = os.pipe()
    with atomic.only_one(tmp_path / "lock", seconds=0):
        child = os.fork()
        if child == 0:
            os.close(target)
            os.read(source, 1)  # until the parent is done
            os._exit(0)
    with atomic.only_one(tmp_path / "lock", seconds=0) as is_only:
        assert is_only
    os.close(target)
    os.waitpid(child, 0)


@pytest.mark.native
def test_the_program_says_so_in_one_line(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed").chmod(0o777)
    env = {**os.environ, "EDGE_CACHE": str(tmp_path), "EDGE_CACHE_SIZE": "1GB"}
    done = edge_run("complete", tiny_gguf(), "-", "-n", "1", "--quiet", stdin=b"Hello", env=env)
    what = f"{tmp_path}/packed: everybody may write to it: nothing is kept there"
    want = f"edge-run: warning: {what}"
    assert (done.returncode, done.stderr.decode().splitlines()) == (0, [want])
