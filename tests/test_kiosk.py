"""The kiosk of the examples: its service unit, and a conversation that survives its process."""

from __future__ import annotations

import configparser
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge.memory import parse_size

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "kiosk"
UNIT = FOLDER / "edge-kiosk.service"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="systemd is Linux's")


class Running:
    """A kiosk that said it is ready."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, data: bytes | None = None) -> tuple[int, str]:
        """Status and text."""
        request = urllib.request.Request(self.url + path, data)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, ""


Kiosk = Callable[..., contextlib.AbstractContextManager[Running]]


@pytest.fixture
def kiosk(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Kiosk:
    """kiosk(says): a context in which it runs, as a service would; it must leave with code 0, and
    with `says` at the start of stderr.
    """
    path = tiny_gguf(context=4096, head_dim=32)

    @contextlib.contextmanager
    def run(says: str = "") -> Iterator[Running]:
        address = tmp_path / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(address))
            notify.settimeout(60)
            env = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(address)}
            env |= {"STATE_DIRECTORY": str(tmp_path / "state"), "CACHE_DIRECTORY": str(tmp_path)}
            command = [sys.executable, str(FOLDER / "kiosk.py"), str(path), "--port", "0"]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
            )
            try:
                assert notify.recv(99) == b"READY=1"
                yield Running(process.stdout.readline().strip())
                process.send_signal(signal.SIGTERM)
                _, errors = process.communicate(timeout=60)
                assert (process.returncode, errors[: len(says) or 999]) == (0, says)
                assert notify.recv(99) == b"STOPPING=1"
            finally:
                process.kill()
                process.communicate()

    return run


@linux
@pytest.mark.native
def test_conversation_goes_on_in_the_next_process(kiosk: Kiosk, tmp_path: Path) -> None:
    file = tmp_path / "state" / "kiosk.session"
    with kiosk() as running:
        status, page = running.get("")
        assert status == 200 and "<form>" in page
        assert running.get("ask", b"Hello")[0] == 200
    size = file.stat().st_size
    assert b'"Hello"' in file.read_bytes()
    with kiosk() as running:
        assert running.get("ask", b"\xff\xfe")[0] == 200
        assert file.stat().st_size > size and b'"Hello"' in file.read_bytes()
        assert running.get("new", b"")[0] == 200
        assert b'"Hello"' not in file.read_bytes()
        for what, data, status in [
            ("nothing", None, 404),
            ("ask", b" ", 404),
            ("ask", b"x" * 5000, 413),
        ]:
            assert running.get(what, data)[0] == status
    file.write_bytes(b"damaged")
    with kiosk("a new conversation: ") as running:
        assert running.get("ask", b"Hello")[0] == 200


# ---- the unit ------------------------------------------------------------------------------------


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text(encoding="ascii"))
    return parser


def test_unit_runs_the_kiosk() -> None:
    service = unit()["Service"]
    python, script, _model, *flags = shlex.split(service["ExecStart"])
    assert (Path(python).name, Path(script).name) == ("python", "kiosk.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    usage = subprocess.run(
        [sys.executable, str(FOLDER / "kiosk.py"), "--help"],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    ).stdout
    assert all(flag in usage for flag in flags if flag.startswith("--"))
    memory, most = parse_size(flags[flags.index("--memory") + 1]), parse_size(service["MemoryMax"])
    assert memory < most < 1.5 * memory
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert " ".join(flags) in readme  # the plan that is shown is of what runs


def test_unit_is_locked_up() -> None:
    service = unit()["Service"]
    for name in ("DynamicUser", "ProtectHome", "NoNewPrivileges", "RestrictNamespaces"):
        assert service[name] == "yes"
    assert (service["ProtectSystem"], service["Restart"]) == ("strict", "on-failure")
    assert "ProcSubset" not in service  # what memory there is, is read from /proc


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = UNIT.read_text(encoding="ascii").replace("/opt/edge/venv/bin/python", sys.executable)
    (tmp_path / UNIT.name).write_text(text, encoding="ascii")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, [])
