"""The kiosk's page in a browser: it shows that it thinks, stops when told, and says what fails.

PYTHONPATH=. python tests/test_kiosk_page.py takes the screenshot of the kiosk's README anew.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser
from kiosks import FOLDER, running

SCREENSHOT = FOLDER / "screenshot.png"
#: A model that takes its time.
SLOW = """
import time
from edge.engine.engine import Engine
run = Engine.run
def slow(self, cache, tokens, **options):
    time.sleep(0.2 if len(tokens) == 1 else 3)
    return run(self, cache, tokens, **options)
Engine.run = slow"""
IS_IDLE = "!document.querySelector('#ask').hidden"

if PROGRAM is None and os.environ.get("EDGE_REQUIRE_CROSS") != "1":
    pytest.skip("no chromium here", allow_module_level=True)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "browser")
    yield browser
    browser.close()


def pixels(png: bytes) -> tuple[tuple[int, int], int]:
    """Width and height, and how many different rows there are. Of what a browser writes."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, size = 8, b"", (0, 0)
    while at < len(png):
        n, kind = struct.unpack_from(">I4s", png, at)
        body = png[at + 8 : at + 8 + n]
        if kind == b"IHDR":
            size = struct.unpack_from(">II", body)
        if kind == b"IDAT":
            data += body
        at += 12 + n
    rows = zlib.decompress(data)
    stride = len(rows) // size[1]
    return size, len({rows[i : i + stride] for i in range(0, len(rows), stride)})


def test_stop_and_trouble(browser: Browser, tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with running(tmp_path, tiny_gguf(context=4096, head_dim=32), code=SLOW) as service:
        browser.open(service.url)
        browser.click("#welcome button")
        browser.until("document.querySelector('.waiting .dots')")  # it thinks
        browser.until("document.querySelector('.writing p')?.textContent")
        browser.click("#stop")
        browser.until(IS_IDLE)
        assert "Stopped." in browser.run("document.querySelector('.answer small').textContent")
        browser.click("#new")
        assert browser.run("document.querySelectorAll('.answer').length") == 0

        service.process.kill()
        service.process.wait(60)
        browser.click("input")
        browser.type("Is anybody there?")
        browser.click("#ask")
        browser.until("document.querySelector('.trouble')")
        assert "cannot be reached" in browser.run("document.querySelector('.answer').textContent")
        assert browser.run(IS_IDLE)


def test_an_answer_that_breaks_off_is_trouble(
    browser: Browser, tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    with running(tmp_path, tiny_gguf(context=4096, head_dim=32), code=SLOW) as service:
        browser.open(service.url)
        browser.click("#welcome button")
        browser.until("document.querySelector('.writing p')?.textContent")
        service.process.kill()
        browser.until("document.querySelector('.trouble')")
        assert browser.run("document.querySelector('.answer p').textContent")


@pytest.mark.model
def test_the_screenshot_is_of_this_page(tmp_path: Path) -> None:
    size, n_rows = pixels(take(tmp_path))
    kept = SCREENSHOT.read_bytes()
    assert pixels(kept)[0] == size and min(n_rows, pixels(kept)[1]) > 50
    assert len(kept) < 150_000
    assert "screenshot.png" in (FOLDER / "README.md").read_text(encoding="utf-8")


def take(folder: Path) -> bytes:
    """A talk with the default model, the last answer still to come."""
    browser = Browser(folder / "browser")
    try:
        with running(folder, code=SLOW) as service:
            browser.open(service.url)
            browser.click("#welcome button")
            browser.until(IS_IDLE)
            assert "8 euros" in browser.run("document.querySelector('.answer p').textContent")
            for question in ("Where are the toilets?", "Is there a lift?"):
                browser.until(IS_IDLE)
                browser.click("input")
                browser.type(question)
                browser.click("#ask")
            browser.until("document.querySelector('.writing p')?.textContent.length > 15")
            browser.run("document.activeElement.blur()")
            png = browser.screenshot()
            browser.click("#stop")
            browser.until(IS_IDLE)
            return png
    finally:
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        SCREENSHOT.write_bytes(take(Path(scratch)))
    print(f"{SCREENSHOT}: {SCREENSHOT.stat().st_size} bytes", file=sys.stderr)
