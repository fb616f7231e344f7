"""Files that cannot be gone on with, or not in this way: typed errors, or an earlier state."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sessions import PROMPT, options, resumed, same_pages, seal

import edge
from edge.session.contents import Kind, Part
from edge.session.file import SessionFile

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def kept(model: edge.Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of some turns, trims and appends."""
    file = tmp_path_factory.mktemp("kept") / "s"
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=40)
    session.autosave(file, 16)
    session.generate("", max_tokens=150)
    data = file.read_bytes()
    session.close()
    return data


def check(file: Path, model: edge.Model, whole: list[int]) -> int | None:
    """Resume and go on as without a break; how many tokens there were. None: a typed error."""
    try:
        session = resumed(file, model)
    except edge.SessionFileError:
        return None
    n = len(session.tokens)
    assert session.tokens == whole[:n] and same_pages(session, model)
    session.generate("", max_tokens=3)
    assert session.tokens == whole[: n + 3]
    session.close()
    return n


def test_cut_anywhere(kept: bytes, model: edge.Model, whole: list[int], tmp_path: Path) -> None:
    rng, seen = random.Random(2), set()
    for n in [*rng.sample(range(len(kept)), 100), len(kept)]:
        (tmp_path / "s").write_bytes(kept[:n])
        seen.add(check(tmp_path / "s", model, whole))
    assert None in seen and len(seen) > 4


def test_bits_flipped_anywhere(
    kept: bytes, model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    rng, seen = random.Random(3), list[int | None]()
    for _ in range(100):
        data = bytearray(kept)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "s").write_bytes(data)
        seen.append(check(tmp_path / "s", model, whole))
    assert seen.count(None) > 60


def test_a_flip_in_a_saved_file_is_always_found(
    model: edge.Model, whole: list[int], tmp_path: Path
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=130)
    session.save(tmp_path / "s")
    data, rng = bytearray((tmp_path / "s").read_bytes()), random.Random(4)
    for n in rng.sample(range(len(data)), 150):
        bit = 1 << rng.randrange(8)
        data[n] ^= bit
        (tmp_path / "s").write_bytes(data)
        assert check(tmp_path / "s", model, whole) is None, n
        data[n] ^= bit


def change(file: Path, **meta: Any) -> None:
    """Write a file anew with other facts in it."""
    old = SessionFile.open(file)
    c = old.contents
    parts = [Part.json(Kind.META, c.meta | meta), Part.json(Kind.STATE, c.state)]
    parts.append(Part.tokens(0, c.tokens.tolist()))
    n = len(c.pages)
    parts += [Part(Kind.PAGE, i, c.pages[i][1], bytes(p)) for i, p in enumerate(old.pages(n)) if p]
    old.close()
    SessionFile.create(file, parts).close()


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"fingerprint": "00", "model": "big.gguf"}, r"belongs to big\.gguf, the model here is"),
        ({"fingerprint": "00"}, "another state of"),
        ({"fingerprint": "00", "factors": "x"}, "load it with a context of 2048"),
        ({"kv": {"type": "q3"}}, "keys and values as q3, .* load it with --kv q3"),
        ({"kv": {"type": "f16", "n_layers": 9}}, "--kv f16"),
        ({"kv": {"type": "f16", "groups": [{"layers": [0]}, 5]}}, "--kv f16"),
        ({"native_bf16": True}, "EDGE_NATIVE_BF16=1"),
        ({"defaults": {"reuse": 1, "nothing": 2}}, "does not hold what a session file holds"),
        ({"defaults": 5}, "does not hold what a session file holds"),
        ({"kv": None}, "does not hold what a session file holds"),
    ],
)
def test_another_model(model: edge.Model, tmp_path: Path, meta: dict[str, Any], match: str) -> None:
    session = model.session()
    session.generate([1, 2, 3], max_tokens=2)
    session.save(tmp_path / "s")
    change(tmp_path / "s")
    assert resumed(tmp_path / "s", model).tokens == session.tokens
    change(tmp_path / "s", **meta)
    with pytest.raises(edge.SessionFileError, match=match) as e:
        edge.resume(tmp_path / "s", model, autosave=8)
    assert str(tmp_path / "s") in str(e.value) and "\n" not in str(e.value)
    SessionFile.open(tmp_path / "s", write=True).close()  # its lock is free


def test_another_model_really(model: edge.Model, tiny_gguf: Make, tmp_path: Path) -> None:
    model.session().save(tmp_path / "s")
    with (
        edge.load(tiny_gguf(context=2048, seed=1), threads=1) as other,
        pytest.raises(edge.SessionFileError, match="belongs to"),
    ):
        edge.resume(tmp_path / "s", other)


def test_another_version(model: edge.Model, tmp_path: Path) -> None:
    model.session().save(tmp_path / "s")
    (tmp_path / "s").write_bytes(seal((tmp_path / "s").read_bytes(), version=7))
    with pytest.raises(edge.SessionFileError, match="version 7"):
        edge.resume(tmp_path / "s", model)


@pytest.mark.parametrize("autosave", [None, 16])
def test_pages_of_another_edge_are_computed_anew(
    model: edge.Model, whole: list[int], tmp_path: Path, autosave: int | None
) -> None:
    session = model.session(**options(model))
    session.generate(PROMPT, max_tokens=150)
    session.save(tmp_path / "s")
    change(tmp_path / "s", edge="0.0.1")
    again = resumed(tmp_path / "s", model, autosave=autosave)
    assert (again.tokens, again.transcript.cache.length) == (session.tokens, 0)
    again.generate("", max_tokens=50)
    assert again.tokens == whole[: len(session.tokens) + 50]
    again.close()
    known = resumed(tmp_path / "s", model).transcript.cache.length
    assert known == (0 if autosave is None else len(session.tokens) + 49)


def test_longrope_factors_are_part_of_a_session(tiny_gguf: Make, tmp_path: Path) -> None:
    phi = tiny_gguf("phi3", context=512, original_context=128)
    with edge.load(phi, threads=1, context=400) as long:
        session = long.session()
        session.generate([1, 2, 3], max_tokens=5)
        session.save(tmp_path / "s")
    with (
        edge.load(phi, threads=1, context=128) as short,
        pytest.raises(edge.SessionFileError, match=r"long.*128 chose .*short.*a context of 400"),
    ):
        edge.resume(tmp_path / "s", short)
    with edge.load(phi, threads=1, context=300) as same:
        assert resumed(tmp_path / "s", same).tokens == session.tokens


def test_a_context_that_is_too_small(model: edge.Model, path: Path, tmp_path: Path) -> None:
    session = model.session()
    session.generate([1] * 200, max_tokens=1)
    session.save(tmp_path / "s")
    with edge.load(path, threads=1, context=150) as small:
        match = r"201 tokens, 51 more than the context of 150: load it with a context of 2048"
        with pytest.raises(edge.ContextError, match=match) as e:
            edge.resume(tmp_path / "s", small)
        assert (e.value.needed, e.value.limit) == (201, 150)
    for context in (200, 201):  # the last token has not been run, and with 200 it cannot be
        with edge.load(path, threads=1, context=context) as enough:
            done = resumed(tmp_path / "s", enough).generate("")
            assert done.finish_reason in ("context",) if context == 200 else ("context", "stop")
