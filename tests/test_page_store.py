"""Pages on disk: whole or not at all, within a bound, and never in the way of who runs."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from edge.errors import InputError
from edge.kv.page_store import _HEADER, PageStore

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

SIZE = 4096


def key(i: int) -> bytes:
    return bytes([i]) * 32


def page(i: int, size: int = SIZE) -> memoryview:
    return memoryview(bytearray(bytes([i]) * size))


def read(store: PageStore, i: int, size: int = SIZE) -> bytes | None:
    """The page, or None."""
    room = page(255, size)
    return bytes(room) if store.read(key(i), room) else None


def pages_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.page"))


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_written_is_read(tmp_path: Path, durable: bool) -> None:
    store = PageStore(tmp_path / "deep" / "folder")
    store.write(key(1), page(7), durable=durable)
    assert store.has(key(1)) and not store.has(key(2))
    assert read(store, 1) == bytes(page(7)) and read(store, 2) is None
    store.close()
    assert read(PageStore(tmp_path / "deep" / "folder"), 1) == bytes(page(7))


@pytest.mark.parametrize("at", [0, 8, 16, 48, 56, _HEADER.size, _HEADER.size + SIZE - 1])
def test_a_flipped_bit_is_found_and_the_file_removed(tmp_path: Path, at: int) -> None:
    store = PageStore(tmp_path)
    store.write(key(1), page(7))
    (path,) = pages_of(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    assert read(store, 1) is None and not path.exists()
    store.write(key(1), page(7))
    assert read(store, 1) == bytes(page(7))


@pytest.mark.parametrize("size", [0, 1, _HEADER.size, _HEADER.size + SIZE - 1, 2 * SIZE])
def test_a_file_of_another_length_is_removed(tmp_path: Path, size: int) -> None:
    store = PageStore(tmp_path)
    store.write(key(1), page(7))
    (path,) = pages_of(tmp_path)
    path.write_bytes((path.read_bytes() + bytes(SIZE))[:size])
    assert read(store, 1) is None and not path.exists()


def test_a_page_of_another_key_is_not_taken(tmp_path: Path) -> None:
    store = PageStore(tmp_path)
    store.write(key(1), page(7))
    os.replace(tmp_path / f"{key(1).hex()}.page", tmp_path / f"{key(2).hex()}.page")
    assert read(store, 2) is None and not pages_of(tmp_path)


def test_a_torn_file_is_written_again(tmp_path: Path) -> None:
    store = PageStore(tmp_path)
    store.write(key(1), page(7))
    pages_of(tmp_path)[0].write_bytes(b"torn")
    store.write(key(1), page(7))
    assert read(store, 1) == bytes(page(7))


def test_least_recently_used_make_room(tmp_path: Path) -> None:
    store = PageStore(tmp_path, limit=3 * (SIZE + _HEADER.size))
    (tmp_path / "notes.txt").write_text("not a page")
    for i in range(3):
        store.write(key(i), page(i))
        os.utime(tmp_path / f"{key(i).hex()}.page", (i + 1, i + 1))
    assert read(store, 0) is not None  # used now
    store.write(key(3), page(3))
    assert [store.has(key(i)) for i in range(4)] == [True, False, True, True]
    assert (tmp_path / "notes.txt").exists()
    with pytest.raises(InputError, match="the limit is"):
        store.write(key(4), page(4, 4 * SIZE))
    small = PageStore(tmp_path, limit=SIZE + _HEADER.size)  # at once
    assert len(pages_of(tmp_path)) == 1 and small.has(key(3))


def test_scratch_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".page-0123").write_bytes(bytes(10))
    PageStore(tmp_path)
    assert not (tmp_path / ".page-0123").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="prompts cannot be kept there"):
        PageStore(tmp_path / where)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PageStore(tmp_path)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(f"edge.kv.page_store.os.{function}", full)
        with pytest.raises(InputError, match="No space left"):
            store.write(key(1), page(1), durable=True)
    assert store.error is not None and "No space left" in store.error
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    store.write(key(1), page(1))
    assert store.error is None and read(store, 1) == bytes(page(1))


def test_many_writers_and_readers(tmp_path: Path) -> None:
    """Each of its own store, as processes have; files come and go under their hands."""
    limit = 6 * (SIZE + _HEADER.size)
    wrong: list[int] = []

    def work(seed: int) -> None:
        store = PageStore(tmp_path, limit)
        for step in range(40):
            i = (seed * 7 + step * 5) % 11
            store.write(key(i), page(i))
            found = read(store, i)
            if found is not None and found != bytes(page(i)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(path.stat().st_size for path in pages_of(tmp_path)) <= limit
