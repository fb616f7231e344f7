#!/bin/sh
# huggingface_hub 2.4.0 keeps nothing of a download that was cut: hf_hub_download of a file whose
# connection breaks in the middle begins at byte 0 when it is called again. The second call asks for
# no range, although the first one said "Trying to resume" and the server takes ranges.
# It does not depend on the CPU, and asks a server on the loopback only. Exits with 1 when this has
# changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --only-binary=:all: huggingface_hub==2.4.0
cd "$folder"
cat >show.py <<'PYTHON'
import hashlib
import os
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RIGHT = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(RIGHT).hexdigest()
state = {"cuts": 99, "ranges": []}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def headers_of_file(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("X-Linked-Size", str(len(RIGHT)))
        self.send_header("X-Linked-ETag", f'"{SHA}"')
        self.send_header("ETag", f'"{SHA}"')
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_HEAD(self):
        self.headers_of_file(200, len(RIGHT))

    def do_GET(self):
        asked = self.headers.get("Range")
        state["ranges"].append(asked)
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        content = RIGHT[first:]
        self.headers_of_file(206 if asked else 200, len(content))
        if state["cuts"] > 0:
            state["cuts"] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content)


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import huggingface_hub  # noqa: E402


def get(folder):
    return huggingface_hub.hf_hub_download("owner/repo", "model.gguf", cache_dir=folder)


try:
    get("cut")
    print("the cut download did not fail")
except Exception as error:
    print(f"cut: {type(error).__name__}")
state["cuts"], state["ranges"] = 0, []
with open(get("cut"), "rb") as file:
    whole = file.read() == RIGHT
again = state["ranges"]
print(f"called again: whole {whole}, ranges asked for: {again}")
print(f"huggingface_hub {huggingface_hub.__version__}")
sys.exit(0 if whole and again == [None] else 1)
PYTHON
"$folder/venv/bin/python" show.py
