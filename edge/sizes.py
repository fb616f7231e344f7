"""Bytes as people write them, and back."""

from __future__ import annotations

import re

from edge.errors import InputError, brief

__all__ = ["Size", "parse_size", "show"]


class Size(int):
    """Bytes, and how a person wrote them, so that messages can show the typed size."""

    written: str

    def __new__(cls, n_bytes: int, written: str) -> Size:
        size = super().__new__(cls, n_bytes)
        size.written = written
        return size

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.written


def show(n_bytes: int) -> str:
    """Bytes for people: "1.20 GiB"; for a typed size: "2GB (1.86 GiB)"."""
    shown = f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
    return f"{n_bytes.written} ({shown})" if isinstance(n_bytes, Size) else shown


_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) ?(?:([KMGT])(I?)B?|B)?", re.IGNORECASE)


def parse_size(text: str, what: str = "size") -> Size:
    """The bytes of a text such as "1500000", "512MB", "1.5 GiB" or "2g". KB, MB, GB and TB are
    powers of 1000; KiB, MiB, GiB, TiB and single letters are powers of 1024.

    what: the name of the option, for the message. Raises InputError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        shown = text if text.isprintable() and len(text) <= 40 else brief(text, 40)
        raise InputError(f"{what}={shown}: a size is a number and a unit, such as 8GB or 512MiB")
    number, letter, binary = match.groups()
    unit = 1
    if letter:
        decimal = not binary and match[0].upper().endswith("B")
        unit = (1000 if decimal else 1024) ** (1 + "KMGT".index(letter.upper()))
    whole, _, part = number.partition(".")
    n_bytes = int(whole) * unit + int(part or 0) * unit // 10 ** len(part)
    return Size(n_bytes, match[0])
