"""Sessions for the tests of what survives."""

from __future__ import annotations

import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import edge

PROMPT = "Hello world and the other world"


def options(model: edge.Model) -> Any:
    """Nothing ends the text."""
    bias = dict.fromkeys(model.tokenizer.eos_ids, float("-inf"))
    return {"sampling": edge.SamplingOptions(seed=11, logit_bias=bias)}


def unshared(model: edge.Model) -> edge.Model:
    """Its sessions share no pages: those of a file do not give way to computed ones."""
    model.engine.pool.publish = lambda before, tokens, page: page  # type: ignore[method-assign]
    return model


def resumed(file: Path, model: edge.Model, **more: Any) -> edge.Session:
    session = edge.resume(file, model, **more)
    assert isinstance(session, edge.Session)
    return session


def same_pages(session: edge.Session, model: edge.Model) -> bool:
    """Whether what the cache holds gives the logits of a fresh one, bit for bit."""
    engine, tokens, known = model.engine, session.tokens, session.transcript.cache.length
    fresh = engine.cache(session.transcript.cache.when_full)
    while (i := fresh.length) < known:
        engine.run(fresh, tokens[i : min(known, i + fresh.room(engine.chunk))], logits="none")
    pair = [
        engine.run(cache, [5, 6, 7], logits="all") for cache in (fresh, session.transcript.cache)
    ]
    session.transcript.cache.trim(known)
    fresh.close()
    return bool(np.array_equal(pair[0], pair[1]))


def seal(data: bytes, **fields: int) -> bytes:
    """A file whose header has other fields, and a right checksum."""
    values = dict(zip(("version", "zero", "end"), struct.unpack_from("<IIQ", data, 8), strict=True))
    head = data[:8] + struct.pack("<IIQ", *(values | fields).values()) + data[24:60]
    return head + struct.pack("<I", zlib.crc32(head)) + data[64:]


def limited(n_bytes: int) -> Any:
    """Files may not grow beyond this: the nearest thing to a full disk."""

    class Limit:
        def __enter__(self) -> None:
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, self.old[1]))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    return Limit()
