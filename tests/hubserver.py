"""A server on the loopback that speaks the hub's API, and misbehaves when it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """What the server has, and how it behaves.

    repos: repository -> file -> content; files: path -> content, of other files (`/simple/...`).
    status: path -> the status and headers that it answers; sizes: file -> the size that is stated;
    damaged: paths whose last byte is wrong; cut, cuts_left: bytes after which an answer is cut off,
    and how often; ranges: whether it heeds Range; redirect: the host that files are redirected to;
    states_sizes: whether the list of files has sizes; hold: what long answers wait for after the
    first MiB. requests: method, path and headers of what came.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    status: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    cut: int = 0
    cuts_left: int = 0
    ranges: bool = True
    redirect: str = ""
    states_sizes: bool = True
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    hold: threading.Event | None = None
    commit: str = COMMIT
    url: str = ""

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self, method: str = "GET") -> list[str]:
        """The paths that were asked for."""
        return [path for m, path, _ in self.requests if m == method]

    def ranges_of(self, name: str) -> list[str]:
        """The Range headers of requests for a file; "": there was none."""
        return [h.get("range", "") for _, path, h in self.requests if path.endswith(name)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients hang up when they have what they want."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        if path in self.hub.status:
            status, extra = self.hub.status[path]
            return self._send(status, extra, b"{}", body)
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)) is not None:
            return self._model(match[1], body)
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match is not None and match[1] in self.hub.repos:
            content = self.hub.repos[match[1]].get(match[2])
        else:
            content = self.hub.files.get(path)
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"{}", body)
        if self.hub.redirect and self.headers["Host"] != self.hub.redirect:
            return self._send(302, {"Location": f"http://{self.hub.redirect}{path}"}, b"", body)
        self._file(path, content, body)

    def _model(self, repo: str, body: bool) -> None:
        if repo not in self.hub.repos:
            return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)
        siblings = []
        for name, content in self.hub.repos[repo].items():
            sha = hashlib.sha256(content).hexdigest()
            row: dict[str, Any] = {"rfilename": name}
            if self.hub.states_sizes:
                size = self.hub.sizes.get(name, len(content))
                row |= {"size": size, "blobId": "0" * 40}
                row["lfs"] = {"sha256": sha, "size": size, "pointerSize": 134}
            siblings.append(row)
        facts = {
            "id": repo,
            "sha": self.hub.commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
        }
        self._send(200, {"Content-Type": "application/json"}, json.dumps(facts).encode(), body)

    def _file(self, path: str, content: bytes, body: bool) -> None:
        sha = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{sha}"', "X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{sha}"'}
        headers["X-Linked-Size"] = str(len(content))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, first, last = 200, 0, len(content) - 1
        if wanted and self.hub.ranges:
            status, first = 206, int(wanted[1])
            last = min(last, int(wanted[2])) if wanted[2] else last
            if first >= len(content):
                return self._send(416, {}, b"", body)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        data = content[first : last + 1]
        if path in self.hub.damaged and not (wanted and wanted[2]):
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(status, headers, data, body)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if self.hub.hold is not None and len(data) > 1 << 20:
            self.wfile.write(data[: 1 << 20])
            self.wfile.flush()
            self.hub.hold.wait(20)
            data = data[1 << 20 :]
        if self.hub.cuts_left and len(data) > self.hub.cut and status in (200, 206):
            self.hub.cuts_left -= 1
            data = data[: self.hub.cut]
            self.close_connection = True
        self.wfile.write(data)
