"""Packed models in the cache: used when right, made again when not, and never in the way."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import ROOT, assert_one_line, run
from test_packed import TOKENS, logits

from edge.engine.engine import Engine
from edge.errors import InputError, ModelFileError
from edge.weights import packed, packed_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed files, empty and without a limit that matters."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    return tmp_path / "cache" / "packed"


@pytest.fixture
def source(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_gguf(type="Q4_0"), tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def want(tiny_gguf: Callable[..., Path]) -> np.ndarray:
    """The logits without a cache."""
    return logits(tiny_gguf(type="Q4_0"))


def left(cache: Path) -> list[Path]:
    """What is in the cache, the lock aside, by name."""
    return sorted(path for path in cache.iterdir() if path.name != ".lock")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were packed from here on."""
    made: list[Path] = []
    write = packed_cache.write_to

    def noted(path: Path, *args: Any) -> None:
        write(path, *args)
        made.append(path)

    monkeypatch.setattr(packed_cache, "write_to", noted)
    return made


# ---- hits and misses -----------------------------------------------------------------------------


def test_first_load_packs_and_the_next_maps(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path]
) -> None:
    for _ in range(3):
        assert np.array_equal(logits(source), want)
    assert left(cache) == packings and len(packings) == 1
    assert packings[0].name.startswith("m-") and packings[0].suffix == ".gguf"


def test_contexts_share_a_file(
    cache: Path, tiny_gguf: Callable[..., Path], packings: list[Path]
) -> None:
    source = tiny_gguf("phi3", original_context=64, context=256)
    short, long = (logits(source, context=n) for n in (32, 256))
    assert len(packings) == 1 and not np.array_equal(short, long)


def test_touched_or_changed_source_is_packed_again(
    cache: Path, source: Path, packings: list[Path]
) -> None:
    logits(source)
    os.utime(source, (1, 1))
    logits(source)
    data = bytearray(source.read_bytes())
    data[-5] ^= 16
    source.write_bytes(data)
    os.utime(source, (1, 1))
    changed = logits(source)
    assert len(set(packings)) == 3
    assert np.array_equal(changed, logits(source))


def test_copy_with_its_time_shares_the_file(
    cache: Path, source: Path, tmp_path: Path, packings: list[Path]
) -> None:
    (tmp_path / "other").mkdir()
    logits(source)
    logits(Path(shutil.copy2(source, tmp_path / "other" / "m.gguf")))
    assert len(packings) == 1


def test_layout_version_is_in_the_key(
    cache: Path, source: Path, packings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(source)
    monkeypatch.setattr(packed, "VERSION", packed.VERSION + 1)
    logits(source)
    assert len(set(packings)) == 2


def test_progress_of_a_hit_rises_to_all(cache: Path, source: Path) -> None:
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        engine = Engine.load(source, progress=lambda *now, seen=seen: seen.append(now))
        assert seen == sorted(seen) and seen[-1] == (engine.packed_bytes, engine.packed_bytes)
        engine.close()


def test_vocabulary_stays_with_the_source(cache: Path, source: Path) -> None:
    logits(source)
    (path,) = left(cache)
    with packed.GGUF.open(path) as gguf:
        assert "tokenizer.ggml.tokens" not in gguf.metadata
        assert gguf.metadata["general.name"] == "tiny llama"
    with pytest.raises(ModelFileError, match="part of the cache"):
        Engine.load(path)


def test_source_and_file_deleted_while_running(cache: Path, source: Path, want: np.ndarray) -> None:
    for _ in range(2):
        engine = Engine.load(source)
    source.unlink()
    left(cache)[0].unlink()
    assert np.array_equal(engine.run(engine.cache(), TOKENS, logits="all"), want)
    engine.close()


# ---- files that are not what they should be ------------------------------------------------------


def test_every_damage_is_repaired(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path]
) -> None:
    logits(source)
    path, rng = packings[0], np.random.default_rng(0)
    data = path.read_bytes()
    for i in rng.integers(0, len(data), 25).tolist():
        flipped = bytearray(data)
        flipped[i] ^= int(rng.integers(1, 256))
        for damaged in (bytes(flipped), data[:i]):
            packings.clear()
            path.write_bytes(damaged)
            assert np.array_equal(logits(source), want)
            assert packings == [path] and path.read_bytes() == data


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\0" * 5000, os.urandom(9000)])
def test_random_bytes_under_its_name(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path], content: bytes
) -> None:
    logits(source)
    packings[0].write_bytes(content)
    assert np.array_equal(logits(source), want)
    assert len(packings) == 2


def test_file_of_another_model_under_its_name(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path], tiny_gguf: Any
) -> None:
    logits(source)
    logits(tiny_gguf(type="Q4_0", seed=1))
    mine, other = packings
    os.replace(other, mine)
    assert np.array_equal(logits(source), want)
    assert packings[2:] == [mine]


def test_source_under_its_name(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path]
) -> None:
    logits(source)
    shutil.copy(source, packings[0])
    assert np.array_equal(logits(source), want)


@pytest.mark.parametrize("kind", ["folder", "full folder", "dead link", "loop", "pipe"])
def test_no_file_under_its_name(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path], kind: str
) -> None:
    logits(source)
    path = packings[0]
    path.unlink()
    if "folder" in kind:
        path.mkdir()
    if kind == "full folder":
        (path / "x").touch()
    if kind == "dead link":
        path.symlink_to("nowhere")
    if kind == "loop":
        path.symlink_to(path.name)
    if kind == "pipe":
        os.mkfifo(path)
    assert np.array_equal(logits(source), want)
    assert {path.name for path in left(cache)} == {path.name}


def test_link_to_the_right_file_is_fine(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path], tmp_path: Path
) -> None:
    logits(source)
    shutil.move(packings[0], tmp_path / "elsewhere")
    packings[0].symlink_to(tmp_path / "elsewhere")
    assert np.array_equal(logits(source), want)
    assert len(packings) == 1


def test_damaged_source_is_the_sources_fault(
    cache: Path, tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    source = Path(shutil.copy(tiny_gguf(type="F32"), tmp_path / "m.gguf"))
    data = bytearray(source.read_bytes())
    data[-4:] = b"\xff" * 4
    source.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"m\.gguf.*NaN"):
        Engine.load(source)
    assert left(cache) == []


# ---- disks that refuse ---------------------------------------------------------------------------


def refuse(code: int) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return function


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EMFILE])
@pytest.mark.parametrize(
    "where", ["shutil.disk_usage", "only_one", "write_to", "packed.write", "os.replace", "key_of"]
)
def test_run_goes_on_without(
    cache: Path,
    source: Path,
    want: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    code: int,
) -> None:
    monkeypatch.setattr(f"edge.weights.packed_cache.{where}", refuse(code))
    assert np.array_equal(logits(source), want)
    assert not cache.exists() or left(cache) == []


def test_disk_that_fills_up_halfway(
    cache: Path, source: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = packed.write_all, iter(range(9))

    def full(*args: Any) -> None:
        if next(calls) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    monkeypatch.setattr(packed, "write_all", full)
    assert np.array_equal(logits(source), want)
    assert left(cache) == []


def is_done(command: list[str]) -> bool:
    """Run it; whether it could do what it should."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if not is_done(mount):  # without the right to mount: as much as one file may grow
        import resource

        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, limits[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_is_really_full(
    source: Path, want: np.ndarray, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(small_disk))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    usage = shutil.disk_usage(small_disk)._replace(free=1 << 30)
    for is_known in (True, False):
        if not is_known:
            monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: usage)
        assert np.array_equal(logits(source), want)
        assert left(small_disk / "packed") == []


@pytest.fixture
def read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache, read-only even for root."""
    cache.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "--bind", str(cache), str(cache)]
    if not is_done(mount):  # without the right to mount: by what a read-only disk would say

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for owner, name in ((os, "utime"), (os, "replace"), (Path, "unlink"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, refuse)
        yield cache
        return
    subprocess.run(["mount", "-o", "remount,bind,ro", str(cache)], check=True)
    yield cache
    subprocess.run(["umount", "-l", str(cache)], check=True)


def test_read_only_cache(read_only: Path, source: Path, want: np.ndarray) -> None:
    assert np.array_equal(logits(source), want)
    assert left(read_only) == []


def test_read_only_cache_with_the_file_in_it(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path], request: Any
) -> None:
    logits(source)
    request.getfixturevalue("read_only")
    assert np.array_equal(logits(source), want)
    assert len(packings) == 1


def test_cache_folder_that_is_a_file(
    source: Path, want: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("EDGE_CACHE_SIZE", "1GB")
    assert np.array_equal(logits(source), want)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other variables")
def test_no_home(source: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr("edge.disk.room._platform_cache", homeless)
    monkeypatch.delenv("EDGE_CACHE", raising=False)
    monkeypatch.delenv("EDGE_CACHE_SIZE")
    assert np.array_equal(logits(source), want)


# ---- several processes ---------------------------------------------------------------------------

LOAD = "from edge.engine.engine import Engine; import sys; e = Engine.load(sys.argv[1], threads=1)"
SLOW = (
    "from edge.weights import weights; import time; pack = weights.RawWeights._pack\n"
    "def slow(*a): print('packing', flush=True); time.sleep(0.05); pack(*a)\n"
    "weights.RawWeights._pack = slow\n"
)


def start(code: str, source: Path) -> subprocess.Popen[str]:
    """A process of its own, with the cache of this test."""
    command = [sys.executable, "-c", code, str(source)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_of_two_at_once_one_packs(cache: Path, source: Path, want: np.ndarray) -> None:
    processes = [start(f"{SLOW}{LOAD}", source) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(bool(output) for output in outputs) == [False, True]
    assert len(left(cache)) == 1 and np.array_equal(logits(source), want)


def test_of_two_threads_one_packs(
    cache: Path, source: Path, want: np.ndarray, packings: list[Path]
) -> None:
    made: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: made.append(logits(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packings) == 1 and all(np.array_equal(x, want) for x in made) and len(made) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_process_killed_while_it_packs(cache: Path, source: Path, want: np.ndarray) -> None:
    process = start(f"{SLOW}{LOAD}", source)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    process.kill()
    process.communicate()
    assert [path.name[:6] for path in left(cache)] == [".pack-"]
    assert np.array_equal(logits(source), want)
    assert [path.name[:2] for path in left(cache)] == ["m-"]


def test_scratch_files_stay_where_locks_do_not_work(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    cache.mkdir(parents=True)
    (cache / ".pack-new").touch()
    (cache / ".pack-old").touch()
    os.utime(cache / ".pack-old", (1, 1))
    logits(source)
    assert [path.name[:8] for path in left(cache)] == [".pack-ne", left(cache)[-1].name[:8]]


# ---- the limit -----------------------------------------------------------------------------------


def test_least_recently_used_goes_first(
    cache: Path, tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tiny_gguf(type="Q4_0", seed=seed) for seed in range(4)]
    for i, source in enumerate(sources[:3]):
        logits(source)
        newest = max(left(cache), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (i + 1, i + 1))
    logits(sources[0])  # used again: no longer the oldest
    size = left(cache)[0].stat().st_size
    before = set(left(cache))
    second = next(path for path in before if path.stat().st_mtime == 2)
    monkeypatch.setenv("EDGE_CACHE_SIZE", str(size * 3 + 20_000))
    logits(sources[3])
    assert before - set(left(cache)) == {second} and len(left(cache)) == 3


@pytest.mark.parametrize("size", ["0", "10KB", "0GB"])
def test_model_larger_than_the_limit_is_not_kept(
    cache: Path, source: Path, want: np.ndarray, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("EDGE_CACHE_SIZE", size)
    assert np.array_equal(logits(source), want)
    assert not cache.exists() or left(cache) == []


def test_too_large_a_model_drives_nothing_out(
    cache: Path, source: Path, tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(source)
    kept = left(cache)
    monkeypatch.setenv("EDGE_CACHE_SIZE", str(kept[0].stat().st_size + 1000))
    logits(tiny_gguf(type="F32"))
    assert left(cache) == kept


def test_limit_without_a_setting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_CACHE_SIZE")
    usage = shutil.disk_usage(cache.anchor)
    for free, want in ((10 << 30, 5 << 30), (1 << 40, 20 << 30), (0, 0)):
        fake = usage._replace(free=free)
        monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path, fake=fake: fake)
        assert packed_cache.limit() == want


@pytest.mark.parametrize("size", ["much", "-1", "1 XB", "1e9", "GB"])
def test_setting_that_is_no_size(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("EDGE_CACHE_SIZE", size)
    with pytest.raises(InputError, match="EDGE_CACHE_SIZE"):
        Engine.load(source)


# ---- the command ---------------------------------------------------------------------------------


def test_command_lists_and_clears(cache: Path, source: Path) -> None:
    assert "0 packed" in run("cache").output
    assert json.loads(run("cache", "--clear", "--json").output) == {"removed": 0}
    logits(source)
    (path,) = left(cache)
    (cache / "broken.gguf").write_bytes(b"no model")
    (cache / ".pack-left").touch()
    facts = json.loads(run("cache", "--json").output)
    rows = {row["file"]: row for row in facts["files"]}
    assert rows[path.name]["model"] == "tiny llama" and rows["broken.gguf"]["model"] is None
    assert rows[path.name]["bytes"] == path.stat().st_size
    assert abs(rows[path.name]["used"] - time.time()) < 100
    assert facts["bytes"] == path.stat().st_size + 8 and facts["limit"] == 10**9
    lines = run("cache").output.splitlines()
    assert len(lines) == 3 and any(path.name in line and "tiny llama" in line for line in lines)
    assert json.loads(run("cache", "--clear", "--json").output) == {"removed": facts["bytes"]}
    assert left(cache) == []


def test_command_spares_the_fetched_model(cache: Path) -> None:
    from edge.disk import pull

    fetched = cache.parent / pull.DEFAULT.file
    fetched.parent.mkdir(parents=True)
    fetched.write_bytes(b"1234")
    assert "fetched" in run("cache").output
    assert run("cache", "--clear").exit_code == 0 and fetched.exists()
    assert run("cache", "--all").exit_code == 2 and fetched.exists()
    result = run("cache", "--clear", "--all", "--json")
    assert json.loads(result.output) == {"removed": 4} and not fetched.exists()


def test_command_with_a_bad_setting(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE_SIZE", "lots")
    result = run("cache")
    assert_one_line(result.exit_code, result.stderr, "EDGE_CACHE_SIZE")


def test_models_that_nobody_closed_are_taken_apart_in_order(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """By the collector, and at the end of the process; weights are mapped from the cache."""
    code = (
        "import edge, gc, sys\n"
        "for i in range(3):\n"
        "    model = edge.load(sys.argv[1], threads=1)\n"
        "    model.session().generate('a', max_tokens=3)\n"
        "    if i < 2:\n"
        "        del model\n"
        "        gc.collect()\n"
    )
    env = {**os.environ, "EDGE_CACHE": str(tmp_path), "EDGE_CACHE_SIZE": "1GB"}
    command = [sys.executable, "-c", code, str(tiny_gguf(type="Q4_0"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
