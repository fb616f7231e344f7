"""The ledger: arithmetic of what a model takes, what is chosen to fit, and what would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge.device import memory
from edge.engine.engine import DescribedFile, Engine
from edge.engine.ledger import _ROOM, Ledger
from edge.errors import InputError, MemoryBudgetError
from edge.kv.shape import kv_types
from edge.loading import Loading, NativeOptions
from edge.sizes import show

MIB = 1 << 20
Tiny = Callable[..., Path]

#: 16 KiB a token in f16, so that the cache is most of it; IQ3_S, so that there are two layouts.
SHAPE: dict[str, Any] = {"context": 8192, "n_heads": 16, "n_kv_heads": 16, "head_dim": 128}


@pytest.fixture
def drawn(tiny_gguf: Tiny, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ledger]:
    """drawn(**options): the ledger of a model, with 100 MiB resident and 1 TiB available."""
    monkeypatch.setattr(memory, "resident", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "available", lambda: 1 << 40)

    def draw(model: dict[str, Any] = SHAPE, **options: Any) -> Ledger:
        with DescribedFile.open(tiny_gguf(**model), NativeOptions(**options)) as described:
            return described.ledger

    return draw


def test_the_parts_are_the_total(drawn: Callable[..., Ledger]) -> None:
    ledger = drawn()
    assert ledger.needed == sum(ledger.parts.values())
    assert ledger.parts["keys and values"] == 4096 * 16384
    assert ledger.parts["program"] >= 100 * MIB
    assert ledger.budget == (1 << 40) + 100 * MIB and not ledger.is_stated
    assert ledger.fits and ledger.most_kv_bytes is None
    ledger.require()


@pytest.mark.parametrize(("context", "pages"), [(1, 1), (64, 1), (65, 2), (8192, 128)])
def test_pages_are_whole(drawn: Callable[..., Ledger], context: int, pages: int) -> None:
    ledger = drawn(context=context, sessions=3)
    assert ledger.planned_pages == [3 * pages]
    assert ledger.parts["keys and values"] == 3 * pages * ledger.kv.page_bytes


def test_a_stated_budget_grants_more_pages(drawn: Callable[..., Ledger]) -> None:
    needed = drawn().needed
    ledger = drawn(memory=needed + 10 * MIB + 1)
    planned = ledger.parts["keys and values"]
    assert ledger.most_kv_bytes == planned + 10 * MIB + 1
    assert drawn(memory=needed).most_kv_bytes == planned


@pytest.mark.parametrize("sessions", [2, 5, 10**18])
def test_sessions_that_fit_are_divided_for(drawn: Callable[..., Ledger], sessions: int) -> None:
    for n in (1, 4):
        ledger = drawn(memory=drawn(sessions=n).needed + 9 * MIB, sessions=sessions)
        found = [option.flags for option in ledger._options()]
        assert (f"--sessions {n}" in found) == (n < sessions)


def test_packing_counts_where_nothing_comes_after_it(drawn: Callable[..., Ledger]) -> None:
    ledger = drawn(context=64)
    assert replace(ledger, packing=0).needed < replace(ledger, packing=50 * MIB).needed
    much = replace(ledger, packing=50 * MIB, context=8192)
    assert much.parts["packing"] == 0


def test_auto_takes_the_most_precise_type_that_fits(drawn: Callable[..., Ledger]) -> None:
    for name in kv_types():
        needed = drawn(kv=name).needed
        assert drawn(kv="auto", memory=needed).kv.type == name
    least = drawn(kv="auto", memory=needed - 1)
    assert least.kv.type == kv_types()[-1] and not least.fits


def test_auto_prefers_the_compact_layout_to_less_precision(drawn: Callable[..., Ledger]) -> None:
    shape = SHAPE | {"type": "IQ3_S", "dim": 512, "ffn": 1024}
    fast, small = drawn(shape, layout="fast"), drawn(shape, layout="compact")
    assert small.weights == fast.least_weights < fast.weights
    ledger = drawn(shape, kv="auto", memory=small.needed)
    assert (ledger.kv.type, ledger.weights) == ("f16", small.weights)


def test_largest_context(drawn: Callable[..., Ledger]) -> None:
    budget = drawn(context=2048).needed
    ledger = drawn(context=4096, memory=budget)
    assert not ledger.fits
    assert ledger.largest_context() == 2048
    assert drawn(context=4096, memory=budget - 1).largest_context() == 2048 - 64
    assert drawn().largest_context() == 8192
    assert drawn(memory=1).largest_context() == 0
    last = SHAPE | {"context": 1000}  # the model ends within a page
    assert drawn(last).largest_context() == 1000


def test_refusal_says_what_would_fit(drawn: Callable[..., Ledger]) -> None:
    ledger = drawn(memory=drawn(context=2048).needed * _ROOM // (_ROOM - 1) + 1)
    with pytest.raises(MemoryBudgetError, match=r"Try --context 2048 \(\d") as caught:
        ledger.require()
    error = caught.value
    assert error.needed == ledger.needed > error.budget == ledger.budget
    assert error.parts == ledger.parts
    assert "\n" not in str(error)
    assert all(show(size) in str(error) for size in ledger.parts.values() if size)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("layout", ["auto", "fast"])
@pytest.mark.parametrize("sessions", [1, 3])
def test_options_fit_indeed(
    drawn: Callable[..., Ledger], share: float, layout: str, sessions: int
) -> None:
    shape = SHAPE | {"type": "IQ3_S", "dim": 512, "ffn": 1024}
    asked: dict[str, Any] = {"layout": layout, "sessions": sessions, "context": 4096}
    whole = drawn(shape, **asked)
    lowest = whole.least().needed
    budget = lowest + int(share * (whole.needed - lowest))
    options = drawn(shape, memory=budget, **asked).options()
    assert options or budget < lowest + MIB
    for option in options:
        words = option.flags.split()
        flags = dict(zip(words[::2], words[1::2], strict=True))
        changed: dict[str, Any] = {name.lstrip("-"): value for name, value in flags.items()}
        for name in changed.keys() & {"context", "sessions"}:
            changed[name] = int(changed[name])
        again = drawn(shape, **(asked | changed), memory=budget)
        assert again.fits
        assert again.needed <= option.needed or layout == "auto"


def test_nothing_fits(drawn: Callable[..., Ledger]) -> None:
    ledger = drawn(memory=MIB, sessions=2)
    assert ledger.options() == []
    least = ledger.least()
    with pytest.raises(MemoryBudgetError, match="The least that runs is") as caught:
        ledger.require()
    assert least.flags in str(caught.value) and "--context 64" in least.flags
    assert drawn(context=64, kv=kv_types()[-1]).needed == least.needed


@pytest.mark.parametrize("value", ["0", "-1", "2GG", "", "1e9", 0, -5, True, 1.5])
def test_bad_budgets(value: Any) -> None:
    with pytest.raises(InputError, match="memory"):
        Loading.of({"memory": value})


def test_bad_type_of_keys_and_values() -> None:
    with pytest.raises(InputError, match="auto, f16"):
        Loading.of({"kv": "f8"})


def test_more_than_the_machine_has(drawn: Callable[..., Ledger]) -> None:
    with pytest.raises(MemoryBudgetError, match=r"2\.00 TiB|2048.00 GiB") as caught:
        drawn(memory="2TiB")
    assert "more than the machine has: 1024.10 GiB" in str(caught.value)


def test_no_budget_where_the_system_is_silent(
    drawn: Callable[..., Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident", lambda: None)
    monkeypatch.setattr(memory, "available", lambda: None)
    ledger = drawn()
    assert ledger.budget is None and ledger.fits
    assert drawn(memory="900TB").budget == 900 * 10**12
    with pytest.raises(MemoryBudgetError):
        drawn(memory="1MB").require()


def test_engine_tells_what_is_resident(tiny_gguf: Tiny) -> None:
    engine = Engine.load(tiny_gguf())
    cache = engine.cache()
    engine.run(cache, list(range(200)))
    found = engine.resident()
    cache.close()
    assert found.keys() <= engine.ledger.parts.keys()
    for name, size in found.items():
        page = 2 * 4096  # the first and the last are shared with others
        assert size is None or 0 < size <= engine.ledger.parts[name] + page
    engine.close()
    with pytest.raises(InputError, match="closed"):
        engine.resident()


def test_resident_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.native import ffi

    with memory.anonymous(1 << 20) as block:
        view = ffi.from_buffer("uint8_t[]", block)
        address = int(ffi.cast("uintptr_t", view))
        before = memory.resident_of(address, 1 << 20)
        block[:] = b"\1" * (1 << 20)
        after = memory.resident_of(address, 1 << 20)
        ffi.release(view)
    if before is not None:
        assert before < after == 1 << 20
    assert memory.resident_of(1 << 62, 4096) is None


def test_cached_files_can_be_had(tmp_path: Path) -> None:
    """In version 1 of control groups, where `inactive_file` leaves out the groups below, too."""
    stat = "cache 9000\ninactive_file 30\nactive_file 4\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert memory._reclaimable(str(tmp_path)) == 34
    (tmp_path / "memory.stat").write_text(f"{stat}total_inactive_file 500\ntotal_active_file 60\n")
    assert memory._reclaimable(str(tmp_path)) == 560
    assert memory._reclaimable(str(tmp_path / "none")) == 0
