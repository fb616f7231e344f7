"""Quantising to a size, or to bits: the types are measured and chosen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import write_tiny

import edge
from edge.errors import InputError
from edge.quantizer import damage, job, sensitivity
from edge.quantizer.kept import KeptDamages

pytestmark = [pytest.mark.native, pytest.mark.any_isa]

PROSE = Path(__file__).parent / "data" / "prose.txt"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a model and a text."""
    folder = tmp_path_factory.mktemp("size")
    write_tiny(folder / "model.gguf", n_layers=2, dim=64, ffn=256, tied=False)
    (folder / "text.txt").write_text(PROSE.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return folder


def chosen(folder: Path, **target: float | str) -> job.Quantized:
    return job.explain(folder / "model.gguf", calibration=[folder / "text.txt"], **target)


def test_bits_are_kept_and_used(folder: Path) -> None:
    for bits in (5.0, 6.0):
        result = chosen(folder, bits=bits)
        assert bits - 0.4 < result.bits_per_weight <= bits
    assert len(result.types) > 2  # F32, and more than one type of blocks


def test_a_file_is_no_larger_than_asked(folder: Path, tmp_path: Path) -> None:
    size = 140_000
    text = [folder / "text.txt"]
    result = edge.quantize(
        folder / "model.gguf", tmp_path / "out.gguf", size=size, calibration=text
    )
    written = (tmp_path / "out.gguf").stat().st_size
    assert written == result.bytes
    assert 0.8 * size < written <= size
    with edge.load(tmp_path / "out.gguf", context=64) as model:
        assert model.session().generate("the", max_tokens=4).usage.completion_tokens


def test_the_choice_is_a_recipe(folder: Path, tmp_path: Path) -> None:
    result = chosen(folder, bits=5.5)
    (tmp_path / "mine.toml").write_text(result.recipe, encoding="utf-8")
    again = job.explain(folder / "model.gguf", recipe=tmp_path / "mine.toml")
    assert again.tensors == result.tensors


def test_what_cannot_be_reached_says_what_can(folder: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be reached: with the smallest types it is"):
        chosen(folder, size="20kB")
    with pytest.raises(InputError, match="bits is 33"):
        chosen(folder, bits=33)


def test_a_size_wants_a_text_and_nothing_else(folder: Path) -> None:
    model = folder / "model.gguf"
    with pytest.raises(InputError, match="calibration"):
        job.explain(model, bits=5)
    with pytest.raises(InputError, match="say one of these"):
        chosen(folder, bits=5, type="Q4_0")
    with pytest.raises(InputError, match="say one of these"):
        chosen(folder)


def test_a_memory_counts_the_whole_process(folder: Path) -> None:
    """Packed weights and all else, as the plan of the result counts them."""
    with pytest.raises(InputError, match="cannot be reached") as refused:
        chosen(folder, for_memory="1MB")
    assert "MiB" in str(refused.value)
    most = chosen(folder, for_memory="100GB")  # the process that tests may be large
    assert set(most.types) == {"F32", "Q8_0"}


def test_a_speed_goes_with_a_size(folder: Path) -> None:
    assert chosen(folder, bits=6, min_speed=0.001).bits_per_weight <= 6
    with pytest.raises(InputError, match=r"1e\+06 tokens/s cannot be reached"):
        chosen(folder, bits=6, min_speed=1e6)
    with pytest.raises(InputError, match="goes with a size"):
        job.explain(folder / "model.gguf", type="Q4_0", min_speed=1)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials that are measured, by name."""
    names: list[str] = []

    def counted(model: edge.Model, windows: object, trials: dict[str, object]) -> object:
        for name, harm in sensitivity.damages(model, windows, trials):  # type: ignore[arg-type]
            names.append(name)
            yield name, harm

    monkeypatch.setattr(damage, "damages", counted)
    return names


def test_another_size_needs_no_new_measurement(folder: Path, cache: Path, runs: list[str]) -> None:
    first = chosen(folder, bits=5.0)
    (kept,) = (cache / "damages").glob("*.json")
    measured = list(runs)
    assert len(measured) == len(set(measured)) == 16
    assert chosen(folder, bits=6.0).bits_per_weight > first.bits_per_weight
    assert chosen(folder, bits=5.0).tensors == first.tensors
    assert runs == measured
    kept.write_text("[1, 2")  # a file that is damaged is measured anew
    assert chosen(folder, bits=5.0).tensors == first.tensors
    assert runs == measured * 2


def test_another_text_is_measured_anew(folder: Path, tmp_path: Path, runs: list[str]) -> None:
    chosen(folder, bits=5.0)
    other = tmp_path / "other.txt"
    other.write_text((folder / "text.txt").read_text()[100:])
    job.explain(folder / "model.gguf", calibration=[other], bits=5.0)
    assert len(runs) == 32


def test_a_cut_measurement_goes_on(folder: Path, runs: list[str]) -> None:
    def cut(done: int, total: int) -> None:
        if done == total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.explain(
            folder / "model.gguf", calibration=[folder / "text.txt"], bits=5.0, progress=cut
        )
    before = len(runs)
    assert 0 < before < 16
    result = chosen(folder, bits=5.0)
    assert len(runs) == len(set(runs)) == 16
    assert result.bits_per_weight <= 5.0


@pytest.mark.parametrize("content", ['{"losses": {}, "probed": {}}', "[]", "[" * 100000, "\xff"])
def test_numbers_that_cannot_be_are_not_taken(cache: Path, content: str) -> None:
    (cache / "damages").mkdir(parents=True)
    (cache / "damages" / "key.json").write_text(content, encoding="latin-1")
    assert KeptDamages.of("key", ["a"]) == KeptDamages()


def test_kept_numbers_are_those_that_were_saved(cache: Path) -> None:
    kept = KeptDamages.of("key", ["a", "b"])
    kept.losses["a"], kept.probed["a"], kept.harms["b"] = {"Q4_0": 0.5}, 2.0, 0.25
    kept.save(now=True)
    assert KeptDamages.of("key", ["a", "b"]) == kept
    assert KeptDamages.of("key", ["a"]).harms == {}
    kept.harms["b"] = float("nan")
    kept.save(now=True)
    assert KeptDamages.of("key", ["a", "b"]) == KeptDamages()
