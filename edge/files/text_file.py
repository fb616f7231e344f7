"""Text files that people wrote, in any editor; only as much of them is read as is wanted."""

from __future__ import annotations

import codecs
import os
from typing import BinaryIO

from edge.errors import InputError

__all__ = ["TextFile", "utf8"]

_PIECE = 64 << 10
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begin with one of these


class TextFile:
    """A text in UTF-8. The constructor reads and checks its first 64 KiB.

    A byte order mark in front is not part of the text. file: open for reading bytes; name: for
    messages; closes: whether to close the file once all of it was read.
    Every method raises InputError when the file cannot be read, or is not UTF-8.
    """

    def __init__(self, file: BinaryIO, name: str, *, closes: bool = False) -> None:
        self._file, self.name, self._closes = file, name, closes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._n_bytes = 0  # read so far
        self._texts: list[str] = []
        self.ended = False  # whether all of the file was read
        self._read()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TextFile:
        """Open a file by its path."""
        name = os.fsdecode(path)
        try:
            return cls(open(path, "rb"), name, closes=True)  # stays open for later reads
        except (OSError, ValueError) as e:  # ValueError: a NUL in the path
            raise InputError(f"{name}: {getattr(e, 'strerror', None) or e}") from e

    def read(self, most_bytes: int | None = None) -> str | None:
        """The whole text; None: it has more than most_bytes bytes, and the rest was not read."""
        self._read_on(most_bytes)
        if most_bytes is not None and self._n_bytes > most_bytes:
            return None
        return self._joined()

    def start(self, most_bytes: int) -> str:
        """The text, or its beginning, of most_bytes bytes or up to 64 KiB more."""
        self._read_on(most_bytes)
        return self._joined()

    def _joined(self) -> str:
        texts, self._texts = self._texts, []
        return "".join(texts)

    def _read_on(self, most_bytes: int | None) -> None:
        while not self.ended and (most_bytes is None or self._n_bytes <= most_bytes):
            self._read()

    def _read(self) -> None:
        """Read and decode the next piece."""
        try:
            data = self._file.read(_PIECE)
        except OSError as e:
            raise InputError(f"{self.name}: {e.strerror or e}") from e
        if self._n_bytes == 0 and data.startswith(_UTF16):
            raise InputError(f"{self.name} is UTF-16, not UTF-8: save it as UTF-8")
        self.ended = len(data) < _PIECE
        start = self._n_bytes - len(self._decoder.getstate()[0])
        self._n_bytes += len(data)
        if start == 0:
            start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
            data = data[start:]
        try:
            self._texts.append(self._decoder.decode(data, self.ended))
        except UnicodeDecodeError as e:
            raise _not_utf8(self.name, start + e.start, e.object[e.start]) from None
        if self.ended and self._closes:
            self._file.close()


def utf8(data: bytes | str, what: str) -> str:
    """The text of bytes, or of an argument from the shell. what: its name, for the message.

    Raises InputError with the offset of the first byte that is not UTF-8.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise _not_utf8(what, e.start, data[e.start]) from None


def _not_utf8(what: str, offset: int, byte: int) -> InputError:
    return InputError(f"{what} is not UTF-8: byte {offset} is 0x{byte:02x}")
