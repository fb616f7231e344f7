"""The kiosk of the examples, run as a service would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "kiosk"
VISITOR = "0123456789abcdef" * 2


class Running:
    """A kiosk that said it is ready."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url, self.process = url, process

    def get(
        self, path: str, data: bytes | None = None, visitor: str = VISITOR, **headers: str
    ) -> tuple[int, str]:
        """Status and text. A POST, if there are data, of its own page."""
        if data is not None:
            headers = {"Origin": self.url.rstrip("/"), "X-Visitor": visitor, **headers}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, ""

    def ask(self, question: str, visitor: str = VISITOR) -> dict[str, Any]:
        """The end of the answer, with its whole `text`."""
        status, text = self.get("ask", question.encode(), visitor)
        assert status == 200, status
        events = [json.loads(line) for line in text.splitlines()]
        return {**events[-1], "text": "".join(event.get("text", "") for event in events)}


@contextlib.contextmanager
def running(folder: Path, model: Path | None = None, *, code: str = "") -> Iterator[Running]:
    """Run it, with its files in a folder. model: None: the default one; code: Python that runs
    first.
    """
    address = folder / "notify"
    address.unlink(missing_ok=True)
    argv = [str(FOLDER / "kiosk.py"), *([str(model)] if model else []), "--port", "0"]
    program = f"{code}\nimport runpy, sys; sys.argv = {argv!r}\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(address))
        notify.settimeout(60)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": str(address)}
        env |= {"STATE_DIRECTORY": str(folder / "state"), "CACHE_DIRECTORY": str(folder)}
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env
        )
        assert process.stdout is not None
        try:
            assert notify.recv(99) == b"READY=1"
            yield Running(process.stdout.readline().strip(), process)
            if process.poll() is None:  # else the test has ended it
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                assert notify.recv(99) == b"STOPPING=1"
        finally:
            process.kill()
            process.communicate()
