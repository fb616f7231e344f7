"""JSON files of a model's folder. They come from strangers: sizes are limited, types checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from edge.errors import ModelFileError, brief

__all__ = ["JsonFile", "read_text"]

_MOST_BYTES = 16 << 20

_KINDS = {bool: "true or false", dict: "an object", int: "a whole number", str: "a text"}

T = TypeVar("T")


class JsonFile:
    """The object of a JSON file, or an object inside it. path: the file; values: key -> value."""

    def __init__(self, path: Path, values: dict[str, Any], where: str = "") -> None:
        self.path, self.values, self._where = path, values, where

    @classmethod
    def read(cls, path: str | os.PathLike[str], most_bytes: int = _MOST_BYTES) -> JsonFile:
        """Read a file. Raises ModelFileError for one that is missing, too large, or not a JSON
        object.
        """
        file = Path(os.fsdecode(path))
        try:
            values = json.loads(read_text(file, most_bytes))
        except (ValueError, RecursionError) as e:
            raise ModelFileError(f"is no JSON: {e}", path=file) from e
        if not isinstance(values, dict):
            raise ModelFileError(f"holds a {type(values).__name__}, not an object", path=file)
        return cls(file, values)

    @classmethod
    def find(cls, path: Path) -> JsonFile:
        """As `read`, but an empty object where there is no such file."""
        return cls.read(path) if path.exists() else cls(path, {})

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The value of a key; the default where it is missing or null. Raises ModelFileError for a
        value of another type.
        """
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(key, f"{brief(value)}, where {_KINDS.get(kind, 'a list')} belongs")
        return value

    def text(self, key: str) -> str:
        """A text. Raises ModelFileError where it is missing or empty."""
        value = self.get(key, str, "")
        if not value:
            raise self.error(key, "is missing")
        return value

    def whole(self, key: str, default: int | None = None, *, most: int = 1 << 24) -> int:
        """A whole number from 1 to `most`, or the default. Raises ModelFileError."""
        value = self.get(key, int, 0 if default is None else default)
        if key not in self.values and default is None:
            raise self.error(key, "is missing")
        if not 1 <= value <= most and value != default:
            raise self.error(key, f"{brief(value)}: a whole number from 1 to {most} belongs here")
        return value

    def ids(self, key: str) -> list[int]:
        """Token ids: one, several, or none. Raises ModelFileError."""
        value = self.values.get(key)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise self.error(key, f"{brief(token)} is no token id")
        return tokens

    def inside(self, key: str) -> JsonFile:
        """The object of this key; an empty one where it is missing. Raises ModelFileError."""
        return JsonFile(self.path, self.get(key, dict, {}), f"{self._where}{key}.")

    def error(self, key: str, message: str) -> ModelFileError:
        """The error to raise for a wrong value of a key."""
        return ModelFileError(message, path=self.path, field=f"key {self._where}{key}")


def read_text(path: Path, most_bytes: int = _MOST_BYTES) -> str:
    """A file's text, in UTF-8. Raises ModelFileError."""
    try:
        if path.stat().st_size > most_bytes:
            raise ModelFileError(f"more than {most_bytes} bytes", path=path)
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ModelFileError(f"cannot be read: {e.strerror or e}", path=path) from e
    except UnicodeDecodeError as e:
        raise ModelFileError("is not UTF-8", path=path, offset=e.start) from e
