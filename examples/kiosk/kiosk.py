"""A kiosk: a page on this device that talks with a model. Usage: kiosk.py [model.gguf] [--port N]

The page is at http://127.0.0.1:8080/, for a browser in kiosk mode; nobody else in the network sees
it, and no other page in that browser can use it. Each visitor, that is each page that was opened,
has a conversation of their own. It is kept in the state folder, so that it goes on after a crash,
until the visitor begins anew or has been away for some minutes; then nothing of it is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import edge

FOLDER = Path(__file__).parent
PAGE = (FOLDER / "page.html").read_bytes()
MOST_BYTES = 4000  # of a question
IDLE_SECONDS = 180  # a visitor who asked nothing for so long is gone
SYSTEM = "You are the information desk of the Clock Museum. Answer in one short sentence."
UNKNOWN = "Only the staff at the entrance knows that."
#: Small models copy what they are shown: how a fact becomes an answer.
EXAMPLES = [
    ("Which colour is the door?", "The door is green.", "The door is green."),
    (
        "Is there a garden?",
        "The garden is behind the house. It has roses.",
        "Yes, there is a garden behind the house.",
    ),
]
OPTIONS: dict[str, Any] = {
    # The best word each time: an answer about prices is no place for variety. The penalty, small
    # enough to leave "8 euros" alone, ends an answer that would go round in circles.
    "sampling": edge.SamplingOptions(temperature=0, frequency_penalty=0.1),
    "max_tokens": 80,
    "stop": ["\n"],
}


class Facts:
    """What answers are made from: a sentence a line, behind it in brackets other words for it."""

    COMMON = """a an and are at be can come do does for get have how i in is it me museum my need
        of on the there this time to we what when where who you your"""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line.strip()]
        self.facts = [(line.partition(" (")[0], self._words(line)) for line in lines]
        self._seen_in = Counter(word for _, words in self.facts for word in words)

    def about(self, question: str) -> list[str]:
        """The facts with the words of a question; words that few facts have count for more."""
        asked = self._words(question)
        scores = [sum(1 / self._seen_in[w] for w in asked & words) for _, words in self.facts]
        best = max(scores, default=0)
        return [
            fact for (fact, _), score in zip(self.facts, scores, strict=True) if score > best / 2
        ]

    def _words(self, text: str) -> set[str]:
        """Words, without the ending of a plural, but for those that any question has."""
        words = set(re.findall(r"\w+", text.lower())) - set(self.COMMON.split())
        return {word.removesuffix("s").removesuffix("e") for word in words}


class Visitor:
    """A conversation. lock: held while it answers; seen: when it was last asked."""

    def __init__(self, chat: edge.Chat, file: Path) -> None:
        self.chat, self.file = chat, file
        self.lock, self.seen = threading.Lock(), time.monotonic()

    def close(self) -> None:
        """Leave nothing of what was said."""
        self.chat.cancel()
        with self.lock:
            self.chat.close()
            self.file.unlink(missing_ok=True)


class Kiosk:
    """The visitors: as many as the memory is planned for. Any thread may call any method."""

    def __init__(self, model: edge.Model, folder: Path, facts: Facts, most: int) -> None:
        self.model, self.folder, self.facts, self.most = model, folder, facts, most
        self.visitors: dict[str, Visitor] = {}
        self.lock = threading.Lock()
        for file in folder.glob("*.session"):
            if time.time() - file.stat().st_mtime > IDLE_SECONDS:
                file.unlink()

    def visitor(self, name: str) -> Visitor | None:
        """The visitor of this name: known, resumed, or new; None: all others are being answered."""
        with self.lock:
            visitor = self.visitors.get(name)
            if visitor is None:
                if len(self.visitors) >= self.most and not self._make_room():
                    return None
                file = self.folder / f"{name}.session"
                visitor = Visitor(self._resumed(file) or self._new(file), file)
                self.visitors[name] = visitor
            visitor.seen = time.monotonic()
            return visitor

    def ask(self, visitor: Visitor, question: str) -> Iterator[dict[str, Any]]:
        """The answer: its pieces, and how it ended. Holds the visitor's lock already."""
        facts = self.facts.about(question)
        asked = f"{question}\n({' '.join(facts) or UNKNOWN})"
        try:
            stream = visitor.chat.stream(asked, **OPTIONS)
        except edge.ContextError:  # a conversation that is too long is forgotten
            visitor.chat.close()
            visitor.chat = self._new(visitor.file)
            stream = visitor.chat.stream(asked, **OPTIONS)
        with stream:  # left early, the answer is cancelled
            for piece in stream:
                yield {"text": piece.text}
        visitor.seen = time.monotonic()
        yield {"end": stream.finish_reason, "facts": facts}

    def stop(self, name: str) -> None:
        """End the answer that is under way."""
        visitor = self.visitors.get(name)
        if visitor is not None:
            visitor.chat.cancel()

    def forget(self, name: str) -> None:
        """The visitor is gone."""
        with self.lock:
            visitor = self.visitors.pop(name, None)
        if visitor is not None:
            visitor.close()
        (self.folder / f"{name}.session").unlink(missing_ok=True)

    def forget_idle(self) -> None:
        """Forget those who are away."""
        gone = time.monotonic() - IDLE_SECONDS
        for name, visitor in list(self.visitors.items()):
            if visitor.seen < gone and not visitor.lock.locked():
                self.forget(name)

    def close(self) -> None:
        """Stop answering; what was said stays in the files."""
        for visitor in list(self.visitors.values()):
            visitor.chat.close()

    def _make_room(self) -> bool:
        """Forget who has been away for longest, but for those who are being answered."""
        waiting = [name for name, v in self.visitors.items() if not v.lock.locked()]
        if not waiting:
            return False
        self.visitors.pop(min(waiting, key=lambda name: self.visitors[name].seen)).close()
        return True

    def _resumed(self, file: Path) -> edge.Chat | None:
        if not file.exists():
            return None
        try:
            chat = edge.resume(file, self.model, autosave=32)
        except edge.EdgeError as e:  # of another model or version, say: a kiosk goes on
            print(f"a new conversation: {e}", file=sys.stderr)
            file.unlink()
            return None
        assert isinstance(chat, edge.Chat)
        return chat

    def _new(self, file: Path) -> edge.Chat:
        chat = self.model.chat(system=SYSTEM)
        for question, facts, answer in EXAMPLES:
            chat.messages.append({"role": "user", "content": f"{question}\n({facts})"})
            chat.messages.append({"role": "assistant", "content": answer})
        try:
            chat.autosave(file)
        except edge.SessionFileError as e:  # a disk that is full, say: it is answered all the same
            print(e, file=sys.stderr)
        return chat


class Handler(BaseHTTPRequestHandler):
    """GET /: the page. POST /ask: a question, answered by lines of JSON. POST /stop, /new: end the
    answer, forget the visitor, who is named in each POST's header X-Visitor.
    """

    kiosk: Kiosk
    timeout = 30  # seconds that a client may keep us waiting

    def do_GET(self) -> None:
        """The page."""
        if not self._is_ours(self.headers.get("Host")):
            return self.send_error(403)
        if self.path != "/":
            return self.send_error(404)
        self._begin(200, "text/html; charset=utf-8")
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        """A question, or the end of an answer or a conversation."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin", "")
        if not self._is_ours(host) or origin != f"http://{host}":  # another page, or another name
            return self.send_error(403)
        name, length = self.headers.get("X-Visitor", ""), self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9a-f]{32}", name) or not length.isdecimal():
            return self.send_error(400)
        if int(length) > MOST_BYTES:
            return self.send_error(413)
        question = " ".join(self.rfile.read(int(length)).decode("utf-8", "replace").split())
        if self.path == "/ask":
            return self._ask(name, question) if question else self.send_error(400)
        ends = {"/stop": self.kiosk.stop, "/new": self.kiosk.forget}
        if self.path not in ends:
            return self.send_error(404)
        ends[self.path](name)
        self._begin(204)

    def _ask(self, name: str, question: str) -> None:
        try:
            visitor = self.kiosk.visitor(name)
        except edge.EdgeError as e:
            print(e, file=sys.stderr)
            return self.send_error(503)
        if visitor is None or not visitor.lock.acquire(blocking=False):
            return self.send_error(503)
        try:
            self._begin(200, "application/x-ndjson")
            with contextlib.closing(self.kiosk.ask(visitor, question)) as events:
                for event in events:
                    self._tell(event)
        except OSError:  # the visitor went away
            pass
        except edge.EdgeError as e:
            print(e, file=sys.stderr)
            with contextlib.suppress(OSError):
                self._tell({"end": "error"})
        finally:
            visitor.lock.release()

    def _is_ours(self, host: str | None) -> bool:
        """Whether the browser asks for this device by its own name: a page that is elsewhere may
        have had its name changed to this address.
        """
        port = self.server.server_address[1]
        return host in (f"127.0.0.1:{port}", f"localhost:{port}")

    def _begin(self, code: int, kind: str = "") -> None:
        self.send_response(code)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:; frame-ancestors 'none'",
        )
        self.end_headers()

    def _tell(self, event: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def log_message(self, *args: object) -> None:
        """What visitors ask is nobody's business."""


class Server(ThreadingHTTPServer):
    """On this device alone."""

    def service_actions(self) -> None:
        """Twice a second."""
        Handler.kiosk.forget_idle()


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
    parser.add_argument("--sessions", type=int, default=4, help="visitors at a time")
    parser.add_argument("--facts", type=Path, default=FOLDER / "facts.txt")
    args = parser.parse_args()
    state, cache = (Path(os.environ.get(f"{x}_DIRECTORY", "kiosk")) for x in ("STATE", "CACHE"))
    state.mkdir(0o700, parents=True, exist_ok=True)
    facts = Facts(args.facts.read_text(encoding="utf-8"))
    options: dict[str, Any] = {"memory": args.memory, "context": args.context, "kv": args.kv}
    server = Server(("127.0.0.1", args.port), Handler)  # first: there can be but one
    options |= {"sessions": args.sessions, "prefix_cache": cache / "prefixes"}
    with edge.load(args.model, **options) as model:
        Handler.kiosk = kiosk = Kiosk(model, state, facts, args.sessions)

        def stop(*_: object) -> None:
            threading.Thread(target=server.shutdown).start()  # it waits for serve_forever

        signal.signal(signal.SIGTERM, stop)
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        tell_systemd("READY=1")
        server.serve_forever()
        tell_systemd("STOPPING=1")
        server.server_close()
        kiosk.close()


if __name__ == "__main__":
    try:
        main()
    except (edge.EdgeError, OSError) as e:
        sys.exit(f"kiosk: {e}")
