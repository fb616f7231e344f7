"""Downloads go on where they ended, and a file is there whole and checked, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hubserver import Hub

from edge.disk import atomic, download
from edge.disk.download import INCOMPLETE, Remote, fetch
from edge.errors import ModelFileError

CONTENT = os.urandom(3_000_000)
SHA = hashlib.sha256(CONTENT).hexdigest()
ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(download, "_sleep", lambda seconds: None)
    with Hub(files={"/model.gguf": CONTENT}) as server:
        yield server


def remote(hub: Hub, **facts: Any) -> Remote:
    return Remote(
        f"{hub.url}/model.gguf", "model", **({"digest": SHA, "n_bytes": 3_000_000} | facts)
    )


def get(source: Remote, folder: Path) -> bool:
    return fetch(source, folder / "model.gguf", lock=folder / ".lock")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def part(folder: Path) -> Path:
    return folder / f"model.gguf{INCOMPLETE}"


def test_fetch(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    target, lock = tmp_path / "new" / "model.gguf", tmp_path / ".lock"
    assert fetch(remote(hub), target, lock=lock, progress=lambda *now: seen.append(now))
    assert target.read_bytes() == CONTENT and left(target.parent) == {"model.gguf"}
    assert seen == sorted(seen) and seen[-1] == (3_000_000, 3_000_000)
    assert not fetch(remote(hub), target, lock=lock)
    assert hub.paths() == ["/model.gguf"]


def test_goes_on_after_a_cut(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.cuts_left = 1_000_000, 2
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert hub.ranges_of("model.gguf") == ["", "bytes=1000000-", "bytes=2000000-"]


def test_goes_on_in_another_process(hub: Hub, tmp_path: Path) -> None:
    part(tmp_path).write_bytes(CONTENT[:2_500_000])
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert hub.ranges_of("model.gguf") == ["bytes=2500000-"]


@pytest.mark.parametrize("start", [CONTENT + b"x", b"x" * 100], ids=["longer", "other"])
def test_a_wrong_start_costs_one_more_try(hub: Hub, tmp_path: Path, start: bytes) -> None:
    part(tmp_path).write_bytes(start)
    if len(start) < len(CONTENT):
        with pytest.raises(ModelFileError, match="SHA-256"):
            get(remote(hub), tmp_path)
        assert left(tmp_path) == set()
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_process_leaves_no_file_but_what_came(hub: Hub, tmp_path: Path) -> None:
    hub.hold = threading.Event()
    code = (
        "import sys; from pathlib import Path; from edge.disk.download import Remote, fetch\n"
        "url, sha, folder = sys.argv[1:]\n"
        "fetch(Remote(url, 'm', 3000000, sha), Path(folder, 'model.gguf'), lock=Path(folder, 'l'))"
    )
    argv = [sys.executable, "-c", code, f"{hub.url}/model.gguf", SHA, str(tmp_path)]
    process = subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 30
    while not part(tmp_path).exists() or part(tmp_path).stat().st_size < 1 << 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model.gguf").exists()
    hub.hold.set()
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert hub.ranges_of("model.gguf") == ["", "bytes=1048576-"]


def test_damaged_bytes_are_discarded(hub: Hub, tmp_path: Path) -> None:
    hub.damaged.add("/model.gguf")
    with pytest.raises(ModelFileError, match="SHA-256"):
        get(remote(hub), tmp_path)
    assert left(tmp_path) == set()
    hub.damaged.clear()
    assert get(remote(hub), tmp_path)


def test_a_git_blob_is_checked_too(hub: Hub, tmp_path: Path) -> None:
    name = hashlib.sha1(b"blob 3000000\0" + CONTENT).hexdigest()
    assert get(remote(hub, digest=name), tmp_path)
    with pytest.raises(ModelFileError, match="git hash"):
        fetch(remote(hub, digest="0" * 40), tmp_path / "other", lock=tmp_path / ".lock")


def test_a_server_that_ignores_ranges(hub: Hub, tmp_path: Path) -> None:
    hub.cut, hub.cuts_left, hub.ranges = 1_000_000, 1, False
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("stated", [2_000_000, 4_000_000])
def test_a_server_that_lies_about_the_size(hub: Hub, tmp_path: Path, stated: int) -> None:
    with pytest.raises(ModelFileError, match=f"sends 3000000 bytes, it stated {stated}"):
        get(remote(hub, n_bytes=stated), tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_an_unknown_size_is_learned(hub: Hub, tmp_path: Path) -> None:
    assert get(remote(hub, n_bytes=None), tmp_path)
    known = download.probe(remote(hub, n_bytes=None))
    assert known.n_bytes == 3_000_000 and known.etag == f'"{SHA}"'


def test_versions_of_a_file_are_not_joined(hub: Hub, tmp_path: Path) -> None:
    old = download.probe(remote(hub, digest="", n_bytes=None))
    with pytest.raises(KeyboardInterrupt):
        fetch(old, tmp_path / "model.gguf", lock=tmp_path / ".lock", progress=_interrupt)
    hub.files["/model.gguf"] = CONTENT[::-1]
    get(download.probe(old), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT[::-1]


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = [int(0.99 * len(CONTENT))]

    def write(file: Any, data: bytes) -> None:
        if room[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        atomic.write_all(file, data)

    monkeypatch.setattr(download, "write_all", write)
    with pytest.raises(ModelFileError, match=r"No space left.*make room.*goes on behind"):
        get(remote(hub), tmp_path)
    assert left(tmp_path) == {part(tmp_path).name}
    room[0] = 1 << 30
    get(remote(hub), tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


def test_a_disk_without_room_is_not_filled(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_free_bytes", lambda file: 5_000_000)
    with pytest.raises(ModelFileError, match=r"the disk has 4.8 MiB free: make room"):
        get(remote(hub), tmp_path)
    assert part(tmp_path).stat().st_size == 0


def test_two_at_once_fetch_once(hub: Hub, tmp_path: Path) -> None:
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda: got.append(get(remote(hub), tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False, False, True] and hub.paths() == ["/model.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_one_that_hangs_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    with (
        atomic.only_one(tmp_path / ".lock"),
        pytest.raises(ModelFileError, match="another process fetches it"),
    ):
        get(remote(hub), tmp_path)
    assert left(tmp_path) == set()


def test_a_token_goes_to_no_other_host(hub: Hub, tmp_path: Path) -> None:
    hub.redirect = f"localhost:{hub.port}"
    get(remote(hub, headers={"Authorization": "Bearer secret"}), tmp_path)
    first, second = (headers for _, _, headers in hub.requests)
    assert first["authorization"] == "Bearer secret"
    assert second["host"] == hub.redirect and "authorization" not in second


@pytest.mark.parametrize(
    ("status", "headers", "match"),
    [
        (401, {}, "set HF_TOKEN"),
        (403, {}, "set HF_TOKEN"),
        (404, {}, "check the name"),
        (429, {"Retry-After": "300"}, "try again in 300 seconds"),
        (503, {"Retry-After": "300"}, "503"),
        (500, {}, "500, 6 times in a row"),
    ],
)
def test_statuses(
    hub: Hub, tmp_path: Path, status: int, headers: dict[str, str], match: str
) -> None:
    hub.status["/model.gguf"] = (status, headers)
    with pytest.raises(ModelFileError, match=match) as error:
        get(remote(hub), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "model.gguf").exists()


def test_a_short_wait_is_waited(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        hub.status.clear()

    monkeypatch.setattr(download, "_sleep", sleep)
    hub.status["/model.gguf"] = (429, {"Retry-After": "7"})
    assert get(remote(hub), tmp_path) and waits == [7]


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_sleep", lambda seconds: None)
    with pytest.raises(ModelFileError, match="refused, 6 times in a row"):
        get(Remote("http://127.0.0.1:9/model.gguf", "model", 10, SHA), tmp_path)
    with pytest.raises(ModelFileError, match="refused"):
        download.probe(Remote("http://127.0.0.1:9/model.gguf", "model"))
