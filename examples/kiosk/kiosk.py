"""A kiosk: a page on this device that talks with a model. Usage: kiosk.py [model.gguf] [--port N]

The page is at http://127.0.0.1:8080/, for a browser in kiosk mode; nobody else in the network sees
it. There is one conversation, kept in the state folder: after a crash or a power cut it goes on
where it was, and the system message is not computed anew. The next visitor begins a new one.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import edge

PAGE = (Path(__file__).parent / "page.html").read_bytes()
MOST_BYTES = 4000  # of a question
SYSTEM = """You are the information desk of the Clock Museum. You answer in one or two sentences.
Open from Tuesday to Sunday, 10 to 18 o'clock, closed on Mondays. Adults pay 8 euros, children
nothing. Ground floor: tickets, café, toilets, sundials and water clocks. First floor: tower clocks
and pocket watches. Second floor: the workshop, with a demonstration at 15 o'clock each day. There
is a lift behind the café. What you do not know, the staff at the entrance does."""


class Kiosk:
    """The conversation. One question at a time."""

    def __init__(self, model: edge.Model, file: Path) -> None:
        self.model, self.file = model, file
        self.lock = threading.Lock()
        self.chat = self._resumed() or self._new()

    def _resumed(self) -> edge.Chat | None:
        if not self.file.exists():
            return None
        try:
            chat = edge.resume(self.file, self.model, autosave=32)
        except edge.EdgeError as e:  # of another model or version, say: a kiosk goes on
            print(f"a new conversation: {e}", file=sys.stderr)
            self.file.replace(self.file.with_suffix(".old"))
            return None
        assert isinstance(chat, edge.Chat)
        return chat

    def _new(self) -> edge.Chat:
        chat = self.model.chat(system=SYSTEM, max_tokens=200)
        chat.autosave(self.file)
        return chat

    def forget(self) -> None:
        """Begin anew, and leave nothing of what was said in the file."""
        self.chat.reset()
        self.chat.autosave(self.file)

    def ask(self, question: str, write: Any) -> None:
        """write: called with the answer's pieces. A conversation that is too long is forgotten."""
        try:
            stream = self.chat.stream(question)
        except edge.ContextError:
            self.forget()
            stream = self.chat.stream(question)
        with stream:  # left early, the answer is cancelled
            for piece in stream:
                write(piece.text)


class Handler(BaseHTTPRequestHandler):
    """GET /: the page. POST /ask: a question, answered piece by piece. POST /new: forget."""

    kiosk: Kiosk

    def do_GET(self) -> None:
        """The page."""
        if self.path != "/":
            return self.send_error(404)
        self._begin(200, "text/html; charset=utf-8")
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        """A question, or the end of a conversation."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return self.send_error(413)
        question = self.rfile.read(int(length)).decode("utf-8", "replace").strip()
        if self.path not in ("/ask", "/new") or (self.path == "/ask" and not question):
            return self.send_error(404)
        if self.path == "/new":
            self.kiosk.chat.cancel()  # what is under way ends, and gives the lock back
        if not self.kiosk.lock.acquire(timeout=5):
            return self.send_error(503)
        try:
            self._begin(200, "text/plain; charset=utf-8")
            if self.path == "/new":
                self.kiosk.forget()
            else:
                self.kiosk.ask(question, self._write)
        except ConnectionError:  # the visitor went away
            pass
        except edge.EdgeError as e:
            print(e, file=sys.stderr)
            self._write("Sorry, that did not work.")
        finally:
            self.kiosk.lock.release()

    def _begin(self, code: int, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode("utf-8", "replace"))

    def log_message(self, *args: object) -> None:
        """What visitors ask is nobody's business."""


def tell_systemd(state: str) -> None:
    """`READY=1` and such, if this is a service of type notify."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(state.encode(), address.replace("@", "\0", 1))


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--memory", help="the most that the process may have, as 1.5GB")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv", default="q8")
    args = parser.parse_args()
    state, cache = (Path(os.environ.get(f"{x}_DIRECTORY", "kiosk")) for x in ("STATE", "CACHE"))
    state.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"memory": args.memory, "context": args.context, "kv": args.kv}
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)  # first: there can be but one
    with edge.load(args.model, prefix_cache=cache / "prefixes", **options) as model:
        Handler.kiosk = kiosk = Kiosk(model, state / "kiosk.session")

        def stop(*_: object) -> None:
            kiosk.chat.cancel()
            threading.Thread(target=server.shutdown).start()  # it waits for serve_forever

        signal.signal(signal.SIGTERM, stop)
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        tell_systemd("READY=1")
        server.serve_forever()
        tell_systemd("STOPPING=1")
        server.server_close()
        kiosk.chat.close()


if __name__ == "__main__":
    try:
        main()
    except (edge.EdgeError, OSError) as e:
        sys.exit(f"kiosk: {e}")
