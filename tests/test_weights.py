"""Which form each tensor takes, and what is known of weights before they are packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import assert_one_line, run

from edge.device import memory
from edge.engine import ledger
from edge.engine.describe import pack
from edge.engine.engine import DescribedFile, Engine
from edge.errors import InputError, MemoryBudgetError, UnsupportedError
from edge.files.gguf import GGUF
from edge.loading import NativeOptions
from edge.native import ffi
from edge.sizes import parse_size
from edge.weights import packed, weights
from edge.weights.packed import FORMS
from edge.weights.weights import RawWeights, Weights

pytestmark = pytest.mark.native

TOKENS = [5, 17, 200, 3, 77]
SHAPE = (32, 256)


def layouts_of(kind: str) -> list[int]:
    """The layouts of a matrix in both forms."""
    out = []
    for form in FORMS:
        weight = ffi.new("edge_weight *")
        packed.describe_weight(kind, SHAPE, form, weight)
        out.append(weight.layout)
    return out


TWO_FORMS = [kind for kind in weights.supported_types() if len(set(layouts_of(kind))) == 2]
two_forms = pytest.mark.parametrize("kind", TWO_FORMS)


@pytest.fixture
def model(tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Weights whose Q8_0 matrices could be as small as Q4_0 ones: a form for any build."""
    describe = packed.describe_weight

    def with_forms(kind: str, shape: tuple[int, ...], form: str, weight: Any) -> None:
        small = kind == "Q8_0" and form == "compact" and len(shape) == 2
        describe("Q4_0" if small else kind, shape, form, weight)

    monkeypatch.setattr(weights, "describe_weight", with_forms)
    path = tiny_gguf(type=lambda name: "Q4_0" if "attn" in name else "Q8_0")
    with GGUF.open(path) as gguf:
        return RawWeights(gguf, gguf.tensors)


def compact(model: Weights) -> set[str]:
    """The tensors in the compact form."""
    return {name for name, form in zip(model.names, model.forms, strict=True) if form == "compact"}


# ---- the ledger's choice -------------------------------------------------------------------------


def test_all_fast_when_it_fits(model: Weights) -> None:
    before = model.n_bytes
    for room in (None, 10**9, model.n_bytes):
        model.fit("auto", room)
        assert not compact(model) and model.n_bytes == before and not model.is_compact


def test_only_types_with_two_forms_become_compact(model: Weights) -> None:
    saves, before = model.compact_saves, model.n_bytes
    model.fit("compact")
    assert compact(model) == {"token_embd.weight"} | {
        f"blk.{i}.ffn_{part}.weight" for i in range(2) for part in ("gate", "up", "down")
    }
    assert model.n_bytes == before - saves and model.compact_saves == 0
    model.fit("fast")
    assert not compact(model) and model.n_bytes == before


def test_largest_saving_first(model: Weights) -> None:
    model.fit("auto", model.n_bytes - 1)
    assert compact(model) == {"token_embd.weight"}


def test_every_room_is_kept_while_that_is_possible(model: Weights) -> None:
    most = model.n_bytes
    least = most - model.compact_saves
    choices = set()
    for room in range(least, most, 64):
        model.fit("auto", room)
        assert least <= model.n_bytes <= room
        choices.add(frozenset(compact(model)))
    assert 2 <= len(choices) <= weights._STEPS + 1  # few, so that few packed files are made
    model.fit("auto", least - 1000)
    assert model.n_bytes == least


def test_choice_depends_on_the_room_alone(model: Weights) -> None:
    room = model.n_bytes - model.compact_saves // 2
    model.fit("auto", room)
    first = list(model.forms)
    model.fit("compact")
    model.fit("fast")
    model.fit("auto", room)
    assert model.forms == first


def test_unknown_layout(model: Weights, tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="auto, fast, compact"):
        model.fit("small")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="auto, fast, compact"):
        Engine.load(tiny_gguf(), layout="small")  # type: ignore[arg-type]
    assert run("info", str(tiny_gguf()), "--layout", "small").exit_code == 2


# ---- types that really have two forms ------------------------------------------------------------


def grid_model(tiny_gguf: Callable[..., Path], kind: str) -> Path:
    return tiny_gguf(type=kind, dim=256, n_heads=4, ffn=256)


@two_forms
def test_forms_give_the_same_logits(tiny_gguf: Callable[..., Path], kind: str) -> None:
    source, outs, sizes = grid_model(tiny_gguf, kind), [], []
    for layout in ("fast", "compact"):
        engine = Engine.load(source, layout=layout)
        outs.append(engine.run(engine.cache(), TOKENS, logits="all"))
        sizes.append(engine.packed_bytes)
        engine.close()
    assert np.array_equal(*outs) and sizes[1] < sizes[0]


@two_forms
def test_packed_in_a_form_stays_in_it(
    tiny_gguf: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    source, layouts = grid_model(tiny_gguf, kind), []
    for form, other in (FORMS, FORMS[::-1]):
        path = tmp_path / f"{form}.gguf"
        pack(source, path, layout=form)
        for layout in ("auto", form):
            engine = Engine.load(path, layout=layout)
            layouts.append(engine.layouts)
            engine.close()
        with pytest.raises(UnsupportedError, match=f"edge-run pack MODEL --layout {other}"):
            Engine.load(path, layout=other)
    assert layouts[0] == layouts[1] != layouts[2] == layouts[3]


@two_forms
def test_info_shows_both(tiny_gguf: Callable[..., Path], kind: str) -> None:
    source, rows = grid_model(tiny_gguf, kind), []
    for layout in FORMS:
        facts = json.loads(run("info", "--json", "--layout", layout, str(source)).output)
        rows.append(facts["types"][kind])
    assert rows[0]["layouts"] != rows[1]["layouts"]
    assert rows[0]["memory_bytes"] > rows[1]["memory_bytes"]


@two_forms
def test_short_memory_makes_it_compact(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 0)
    monkeypatch.setattr(ledger, "_ROOM", 1 << 40)  # less than the little that is saved here
    source = grid_model(tiny_gguf, kind)
    with DescribedFile.open(source, NativeOptions(layout="fast")) as described:
        fast = described.description
    with DescribedFile.open(source, NativeOptions(layout="compact")) as described:
        small = described.description
    needed = [description.ledger.needed for description in (fast, small)]
    monkeypatch.setattr(memory, "available", lambda: needed[0] - 1)
    engine = Engine.load(source)
    assert small.weights.model.n_bytes <= engine.packed_bytes < fast.weights.model.n_bytes
    engine.close()
    with pytest.raises(MemoryBudgetError, match="--layout compact"):
        Engine.load(source, layout="fast")
    monkeypatch.setattr(memory, "available", lambda: needed[1] - 1)
    with pytest.raises(MemoryBudgetError, match="Try --"):
        Engine.load(source)


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", 0),
        ("1500000", 1_500_000),
        ("12B", 12),
        ("8GB", 8 * 10**9),
        ("1.5gb", 15 * 10**8),
        ("512 MiB", 512 << 20),
        (" 2g ", 2 << 30),
        ("3K", 3 << 10),
        ("1Ti", 1 << 40),
        ("0.5kb", 500),
    ],
)
def test_sizes(text: str, want: int) -> None:
    assert parse_size(text) == want


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1,5GB", "1e9", "1 PB", "8GBs", "0x10", "٣GB"])
def test_text_that_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="such as 8GB"):
        parse_size(text, "EDGE_CACHE_SIZE")


# ---- what loads in the background ----------------------------------------------------------------


def test_broken_vocabulary_is_told_at_its_use(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    import edge
    from edge.errors import ModelFileError

    path, data = tmp_path / "m.gguf", tiny_gguf().read_bytes()
    path.write_bytes(data.replace("Ġ a".encode(), "Ġ_a".encode()))
    with edge.load(path) as model:
        for _ in range(2):
            with pytest.raises(ModelFileError, match="merge"):
                _ = model.tokenizer
    result = run("complete", str(path), "-p", "x")
    assert_one_line(result.exit_code, result.stderr, "merge")


def test_tokenizer_without_a_thread(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import edge
    from edge import model as models

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(models._TokenizerThread, "start", refuse)
    with edge.load(tiny_gguf()) as model:
        assert model.tokenizer.n_vocab == 288
