"""Measurements that are kept: a run that was cut goes on, and another size needs no new one.

They are JSON files in the folder `damages` of the cache, one for each model and text:

    {"losses": {matrix: {type: loss}}, "probed": {matrix: loss}, "harms": {matrix: damage}}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge.disk.atomic import replacing, write_all
from edge.disk.own import open_own
from edge.disk.room import cache_dir, can_keep, make_room
from edge.errors import UnsupportedError

__all__ = ["KeptDamages"]

#: Bytes of all files; one has some 100 kB.
_MOST = 64 << 20
_SAVE_SECONDS = 10.0
_SCRATCH = ".damages-"


@dataclass
class KeptDamages:
    """What `edge.quantizer.damage` measures: losses: matrix -> type -> the mean square of what the
    type changes in the matrix's output; probed: that of PROBE; harms: what PROBE does to the
    model's output.
    """

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    probed: dict[str, float] = field(default_factory=dict)
    harms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._path: Path | None = None
        self._saved = time.monotonic()

    @classmethod
    def of(cls, key: str, names: Iterable[str]) -> KeptDamages:
        """What is kept under a key, of these matrices; nothing where the file is not as it should
        be. key: a digest of all that the measurements depend on.
        """
        kept = cls()
        with contextlib.suppress(OSError, UnsupportedError):
            folder = cache_dir() / "damages"
            if not can_keep(folder):
                return kept
            kept._path = folder / f"{key}.json"
            with open(open_own(kept._path, os.O_RDONLY), "rb") as file:
                kept._take(file.read(), set(names))
        return kept

    def save(self, *, now: bool = False) -> None:
        """Write the file, at most every few seconds unless it must be `now`. A disk that is full
        loses nothing but the file.
        """
        if self._path is None or (not now and time.monotonic() - self._saved < _SAVE_SECONDS):
            return
        data = json.dumps(asdict(self)).encode()
        with contextlib.suppress(OSError):
            others = [path for path in self._path.parent.glob("*.json") if path != self._path]
            held = sorted(others, key=lambda path: path.stat().st_mtime)
            make_room(len(data), _MOST, [(p, p.stat().st_size) for p in held], _remove)
            with replacing(self._path, _SCRATCH) as file:
                write_all(file, data)
        self._saved = time.monotonic()

    def _take(self, data: bytes, names: set[str]) -> None:
        """Take numbers of these matrices from the content of a file."""
        read = KeptDamages()
        try:
            content = json.loads(data)
            for name in names & content["losses"].keys() & content["probed"].keys():
                losses = content["losses"][name]
                read.losses[name] = {str(kind): _number(loss) for kind, loss in losses.items()}
                read.probed[name] = _number(content["probed"][name])
            for name in names & content["harms"].keys():
                read.harms[name] = _number(content["harms"][name])
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
            return
        self.losses, self.probed, self.harms = read.losses, read.probed, read.harms


def _number(value: Any) -> float:
    """A damage or a loss. Raises ValueError, TypeError."""
    if not 0 <= value < math.inf:
        raise ValueError(value)
    return float(value)


def _remove(path: Path) -> int:
    size = path.stat().st_size
    path.unlink()
    return size
