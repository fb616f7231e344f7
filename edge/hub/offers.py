"""Files of GGUF, grouped into models: all shards of one, its type by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from edge.errors import ModelFileError, UnsupportedError

__all__ = ["Offer", "OfferedFile", "group", "select"]

_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_TYPE = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q[0-9](?:_(?:K|XXS|XS|S|M|XL|L|NL|[0-9]))+|TQ[0-9]_[0-9]"
    r"|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))(?=$|[-_.])",
    re.IGNORECASE,
)
#: GGUF files that are no models by themselves.
_NO_MODEL = re.compile(r"(?:^|[-_./])(?:mmproj|imatrix|lora)(?:[-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class OfferedFile:
    """A file. name: its path in the repository or folder; digest: see
    `edge.disk.download.Remote`.
    """

    name: str
    n_bytes: int
    digest: str = ""


@dataclass(frozen=True)
class Offer:
    """A model. parts: its file, or its shards in order; type: by its name, "": that has none."""

    parts: tuple[OfferedFile, ...]
    type: str

    @property
    def name(self) -> str:
        """The first file's path."""
        return self.parts[0].name

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def is_float(self) -> bool:
        """Whether its weights are not quantised."""
        return self.type in ("F32", "F16", "BF16")


def group(parts: Iterable[OfferedFile]) -> list[Offer]:
    """The models that some files are, the largest first. Shards count when all are there."""
    models: dict[str, list[OfferedFile]] = {}
    for part in sorted(parts, key=lambda part: part.name):
        if part.name.endswith(".gguf") and not _NO_MODEL.search(part.name):
            shard = _SHARD.fullmatch(part.name)
            models.setdefault(f"{shard[1]} of {shard[3]}" if shard else part.name, []).append(part)
    offers = [Offer(tuple(files), _type_of(files[0].name)) for files in models.values()]
    return sorted(filter(_is_whole, offers), key=lambda offer: -offer.n_bytes)


def select(offers: list[Offer], which: str, where: str) -> Offer:
    """The model that was asked for by its type or file. where: for messages.

    Raises UnsupportedError when there is none, ModelFileError when there are several.
    """
    wanted = which.upper()
    found = [o for o in offers if any(part.name == which for part in o.parts)]
    found = found or [o for o in offers if o.type == wanted]
    found = found or [o for o in offers if o.type == f"UD-{wanted}"]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{where}:{offer.name}" for offer in found)
        raise ModelFileError(f"{which} are several, name one: {names}", path=where)
    raise UnsupportedError(
        f"{where} has no {which}, or not all shards of it",
        what=which,
        supported=[offer.type or offer.name for offer in offers],
    )


def _type_of(name: str) -> str:
    """The type that a file's name says, as GGUF spells it; "": it says none."""
    shard = _SHARD.fullmatch(name)
    stem = (shard[1] if shard else name.removesuffix(".gguf")).rpartition("/")[2]
    found = _TYPE.findall(stem)
    return str(found[-1]).upper() if found else ""


def _is_whole(offer: Offer) -> bool:
    shard = _SHARD.fullmatch(offer.name)
    return shard is None or len(offer.parts) == int(shard[3])
