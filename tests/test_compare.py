"""`edge.evaluate` and `edge-run compare`: the table, the picture, bad input, a run that is cut."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_model import assert_one_line, run

import edge
from edge import perplexity
from edge.bench import rounds
from edge.bench.rounds import Measurement, Outcome, Settings, measure_files
from edge.bench.runner import Case
from edge.engine.ledger import Ledger
from edge.errors import (
    CancelledError,
    ContextError,
    InputError,
    MemoryBudgetError,
    ModelFileError,
    UnsupportedError,
)
from edge.evaluate import picture, table
from edge.evaluate.table import Comparison, Evaluation, bits_per_weight, evaluate, recipe_of
from edge.files.gguf import GGUF
from edge.files.text_file import TextFile
from edge.native.cancel import Cancel

Tiny = Callable[..., Path]
WORDS = ("the", "and", "world", "hello", "a", "in", "on", "we", "all", "or", "her")
TEXT = " ".join(random.Random(7).choices(WORDS, k=300))
CONTEXT = 48


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (path := tmp_path / "text.txt").write_text(TEXT + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tiny_gguf: Tiny) -> list[str]:
    """The base, and two files."""
    return [str(tiny_gguf(type=name)) for name in ("F32", "Q8_0", "Q4_0")]


def comparison(files: Sequence[str], **options: Any) -> Comparison:
    options = {"context": CONTEXT, "chunks": 3, "has_speed": False, "threads": 1} | options
    return Comparison(files[0], tuple(files[1:]), **options)


def evaluated(files: Sequence[str], text: str, **options: Any) -> list[Evaluation]:
    return list(evaluate(comparison(files, **options), TextFile.open(text)))


def damaged(path: str, target: Path) -> str:
    """A copy whose logits are absurd."""
    with GGUF.open(path) as gguf:
        norm = gguf.tensors["output_norm.weight"]
    data = bytearray(Path(path).read_bytes())
    data[norm.offset : norm.offset + norm.n_bytes] = struct.pack("<f", 1e30) * (norm.n_bytes // 4)
    target.write_bytes(data)
    return str(target)


# ---- the table ----


def without_time(value: Any) -> dict[str, Any]:
    facts = asdict(value)
    for part in (facts, facts.get("model", {}), facts.get("base", {})):
        part.pop("seconds", None)
    return facts


def test_figures_are_those_of_two_models_in_memory(files: list[str], text: str) -> None:
    """Bit for bit."""
    found = evaluated(files, text)
    with edge.load(files[0], context=CONTEXT, threads=1) as base:
        windows = perplexity.cut(base, TEXT, context=CONTEXT, chunks=3)
        expected = perplexity.measure(base, windows)
        assert without_time(found[0].perplexity) == without_time(expected)
        assert found[0].divergence is None
        for path, evaluation in zip(files[1:], found[1:], strict=True):
            with edge.load(path, context=CONTEXT, threads=1) as model:
                pair = perplexity.compare(model, base, windows)
            assert evaluation.divergence is not None
            assert without_time(evaluation.divergence) == without_time(pair)
            assert evaluation.perplexity == evaluation.divergence.model


def test_one_model_is_in_memory_at_a_time(
    files: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[edge.Model] = []

    def spy(path: str, **options: Any) -> edge.Model:
        assert all(model.closed for model in models)
        models.append(edge.load(path, **options))
        return models[-1]

    monkeypatch.setattr(table, "load", spy)
    evaluated(files, text)
    assert len(models) == 3 and all(model.closed for model in models)


def test_what_does_not_fit_runs_in_parts(
    files: list[str], text: str, found: list[Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers, but without a speed."""
    monkeypatch.setattr(Ledger, "fits", property(lambda self: self.weights < 150_000))

    def fake(paths: Sequence[str], *_: Any) -> list[Measurement]:
        assert list(paths) == files[1:]
        return [Measurement(1, rounds={"edge": [Outcome(speeds=(2.0, 1.0))]}) for _ in paths]

    monkeypatch.setattr(table, "measure_files", fake)
    in_parts = evaluated(files, text, has_speed=True)
    assert [e.facts.fits for e in in_parts] == [False, True, True]
    assert [e.prompt_speed for e in in_parts] == [None, 2, 2]
    for ours, theirs in zip(in_parts[1:], found[1:], strict=True):
        assert without_time(ours.divergence) == without_time(theirs.divergence)


def test_facts_of_the_headers(files: list[str], text: str) -> None:
    found = [evaluation.facts for evaluation in evaluated(files, text)]
    assert [facts.path for facts in found] == files
    assert [facts.n_bytes for facts in found] == [os.path.getsize(path) for path in files]
    assert [facts.layer_bits for facts in found] == [32, 8.5, 4.5]
    assert found[0].bits == 32 and 4.5 < found[2].bits < 5  # norms are in float32
    assert found[0].memory_bytes > found[2].memory_bytes > 0


def test_no_tensors_have_no_bits() -> None:
    assert bits_per_weight([]) == 0


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"edge.quantize.recipe": "edge", "general.file_type": 15}, "edge"),
        ({"edge.quantize.recipe": " a\nb\x1b[1m "}, "ab[1m"),
        ({"edge.quantize.recipe": "x" * 999}, "x" * 80),
        ({"edge.quantize.recipe": "\n", "general.file_type": 15}, "Q4_K_M"),
        ({"edge.quantize.recipe": 1, "general.file_type": 1}, "F16"),
        ({"general.file_type": 999}, "model-x"),
        ({"general.file_type": "15"}, "model-x"),
        ({}, "model-x"),
    ],
)
def test_recipe(metadata: dict[str, Any], name: str) -> None:
    assert recipe_of(metadata, "folder/model-x.gguf") == name


def test_nothing_is_left_in_the_cache(files: list[str], text: str, cache: Path) -> None:
    rows = evaluate(comparison(files), TextFile.open(text))
    next(rows)
    if os.name == "posix":
        assert [*cache.iterdir()] == []  # the file has no name
    rows.close()
    assert [*cache.iterdir()] == []


def test_progress_counts_all_runs(files: list[str], text: str) -> None:
    seen: list[tuple[int, int]] = []

    def report(what: str, *at: int) -> None:
        if what == "measuring":
            seen.append(at)

    list(evaluate(comparison(files), TextFile.open(text), progress=report))
    total = seen[0][1]
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)
    assert total // 3 in {done for done, _ in seen}


# ---- speed ----


def test_speed_is_that_of_processes_which_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def once(path: str, threads: int, *_: Any, has_roofs: bool) -> Outcome:
        assert threads == 2 and not has_roofs
        ran.append(path)
        return Outcome(speeds=(float(len(ran)),))

    monkeypatch.setattr(rounds, "_ours_once", once)
    seen: list[tuple[int, int]] = []
    measured = measure_files(
        ["a", "b", "c"],
        Settings((Case("prompt", 8),), threads=(2,), rounds=2),
        lambda _, *at: seen.append(at),
    )
    assert ran == ["a", "b", "c", "b", "c", "a"] and seen == [(i, 6) for i in range(1, 7)]
    assert [o.speeds for o in measured[0].rounds["edge"]] == [(1.0,), (6.0,)]


def test_speeds_are_medians(files: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(paths: Sequence[str], settings: Settings, _: Any) -> list[Measurement]:
        assert list(paths) == files and settings.options == {"layout": "compact"}
        assert [str(case) for case in settings.cases] == ["prompt 48", "decode 48"]
        outcomes = [Outcome(speeds=(i * 10.0, float(i))) for i in (9, 1, 5)]
        return [Measurement(1, rounds={"edge": outcomes}) for _ in paths]

    monkeypatch.setattr(table, "measure_files", fake)
    found = evaluated(files, text, has_speed=True, loading={"layout": "compact"})
    assert {(e.prompt_speed, e.decode_speed) for e in found} == {(50.0, 5.0)}


def test_real_speeds(files: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ROUNDS", 1)
    monkeypatch.setattr(rounds, "ENOUGH", 0.0)
    found = evaluated(files[:2], text, has_speed=True, chunks=1, context=8)
    assert all(e.prompt_speed and e.decode_speed for e in found)


# ---- bad input ----


def test_files_that_cannot_be_compared(
    files: list[str], text: str, tiny_gguf: Tiny, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    data = Path(files[1]).read_bytes()
    other.write_bytes(data.replace(b"<|unused_0|>", b"<|unused_X|>", 1))
    larger = str(tiny_gguf(vocab=320))
    (link := tmp_path / "link.gguf").symlink_to(files[1])
    for chosen, error, match in (
        ([files[0]], InputError, "no file to compare"),
        ([*files, files[1]], InputError, f"{files[1]} is named twice"),
        ([*files, str(link)], InputError, f"{link} is named twice"),
        ([files[0], files[0]], InputError, "named twice"),
        ([*files, str(other)], InputError, rf"{other} and {files[0]} differ .* '<\|unused_X\|>'"),
        ([*files, larger], InputError, f"{larger} and {files[0]} differ .* 320 and 288 tokens"),
        ([*files, str(tmp_path / "none.gguf")], ModelFileError, "none.gguf"),
        ([*files, str(tmp_path)], UnsupportedError, "GGUF models are compared"),
    ):
        with pytest.raises(error, match=match):
            evaluated(chosen, text)


def test_options_that_do_not_fit(files: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="256"):
        evaluated(files, text, context=300)
    with pytest.raises(MemoryBudgetError, match=re.escape(files[0])):
        evaluated(files, text, loading={"memory": "30MB"})
    (short := tmp_path / "short.txt").write_text("the world", encoding="utf-8")
    with pytest.raises(InputError, match="the text has 3 tokens, a window of 48"):
        evaluated(files, str(short))


def test_no_room_for_the_logits(
    files: list[str], text: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=4 * 3 * 23 * 288 - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=rf"the base's logits need .* in {cache} .*--chunks"):
        evaluated(files, text)
    usage.free += 1
    assert len(evaluated(files, text)) == 3


def test_kept_logits_are_of_their_windows_and_vocabulary(
    files: list[str], tiny_gguf: Tiny, tmp_path: Path
) -> None:
    with (
        (tmp_path / "logits").open("w+b") as file,
        edge.load(files[0], context=CONTEXT) as base,
        edge.load(tiny_gguf(vocab=320), context=CONTEXT) as other,
    ):
        windows = perplexity.cut(base, TEXT, context=CONTEXT, chunks=2)
        kept = perplexity.keep(base, windows, file)
        assert file.tell() == 4 * windows.n_scored * kept.n_vocab
        first = replace(windows, tokens=windows.tokens[:1])
        with pytest.raises(InputError, match="are of other windows"):
            perplexity.compare(base, kept, first)
        with pytest.raises(InputError, match="320 and 288 tokens"):
            perplexity.compare(other, kept, windows)
        for _ in range(2):
            assert perplexity.compare(base, kept, windows).kl == 0


# ---- a run that is cut ----


def test_cancel_leaves_what_is_finished(files: list[str], text: str) -> None:
    cancel = Cancel()
    rows = evaluate(comparison(files), TextFile.open(text), cancel=cancel)
    assert next(rows).divergence is None and next(rows).divergence is not None
    cancel.set()
    with pytest.raises(CancelledError):
        next(rows)


@pytest.mark.parametrize("error", [InputError("ended with signal 2"), None])
def test_cancel_while_speed_is_measured(
    files: list[str], text: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Ctrl-C in a terminal ends the other process, too."""
    cancel = Cancel()

    def fake(paths: Any, settings: Any, progress: Callable[..., None]) -> list[Measurement]:
        cancel.set()
        if error is not None:
            raise error
        progress("measuring speed", 1, 9)
        raise AssertionError("it went on")

    monkeypatch.setattr(table, "measure_files", fake)
    with pytest.raises(CancelledError):
        list(evaluate(comparison(files, has_speed=True), TextFile.open(text), cancel=cancel))


# ---- the picture ----


@pytest.fixture
def found(files: list[str], text: str) -> list[Evaluation]:
    return evaluated(files, text)


@pytest.mark.parametrize("form", ["svg", "png"])
def test_picture(found: list[Evaluation], tmp_path: Path, form: str) -> None:
    named = [replace(e, facts=replace(e.facts, recipe="$x_$")) for e in found]
    picture.draw(named, path := tmp_path / f"x.{form}")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") if form == "png" else b"<!-- $x_$ -->" in data


def test_picture_of_nothing(found: list[Evaluation], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file differs from the base"):
        picture.draw(found[:1], tmp_path / "x.svg")


# ---- the command ----


@pytest.fixture
def args(files: list[str], text: str) -> list[str]:
    options = ["-f", text, "-c", "48", "--chunks", "3", "--threads", "1", "--no-speed"]
    return ["compare", *files, *options]


def test_command(args: list[str], found: list[Evaluation]) -> None:
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    head, base, *rows = result.stdout.splitlines()
    assert head.split()[:3] == ["file", "recipe", "size"] and "prompt/s" not in head
    assert "(base)" in base and len(rows) == 2 and len({*map(len, (head, base, *rows))}) == 1
    d = found[2].divergence
    assert d is not None
    for shown in (f"{d.kl:.5f} ± {d.kl_error:.5f}", f"{100 * d.top1:.2f} %", f"{d.kl_max:.4f}"):
        assert shown in rows[1]
    assert result.stderr == "3 windows of 48 tokens, 69 scored; ± is a standard error\n"


def test_json(args: list[str], found: list[Evaluation]) -> None:
    facts = json.loads(run(*args, "--json").stdout)
    assert (facts["n_windows"], facts["n_scored"], facts["is_complete"]) == (3, 69, True)
    base, *rows = facts["files"]
    assert "divergence" not in base and base["perplexity"] == found[0].perplexity.perplexity
    for row, e in zip(rows, found[1:], strict=True):
        assert e.divergence is not None and row["path"] == e.facts.path
        assert row["divergence"]["kl"] == e.divergence.kl and row["bits"] == e.facts.bits


def test_markdown_and_picture(args: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.svg"
    lines = run(*args, "--markdown", "--plot", str(path)).stdout.splitlines()
    assert lines[0].startswith("| file | recipe |") and lines[1].startswith("| --- | --- | ---: |")
    assert len(lines) == 5 and {line.count("|") for line in lines} == {lines[0].count("|")}
    assert b"<svg" in path.read_bytes()


def test_results_before_an_error_are_shown(
    args: list[str], files: list[str], tmp_path: Path
) -> None:
    bad = damaged(files[1], tmp_path / "bad.gguf")
    result = run(*args[:3], bad, *args[3:])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1 and len(lines) == 3
    assert "2 files not measured" in result.stderr and "weights are damaged" in result.stderr
    result = run(args[0], bad, *args[2:])  # as the base: there is nothing to show
    assert_one_line(result.exit_code, result.stderr_bytes, "bad.gguf")
    assert result.stdout == ""


def test_ctrl_c_shows_what_is_finished(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = perplexity.compare

    def pressed(*models: Any, cancel: Cancel, **options: Any) -> Any:
        divergence = real(*models, cancel=cancel, **options)
        signal.raise_signal(signal.SIGINT)
        end = time.monotonic() + 60
        while not cancel.is_set() and time.monotonic() < end:
            time.sleep(0.001)  # another thread sets it
        return divergence

    monkeypatch.setattr(perplexity, "compare", pressed)
    result = run(*args)
    assert result.exit_code == 130 and len(result.stdout.splitlines()) == 3
    assert "1 file not measured" in result.stderr
    facts = json.loads(run(*args, "--json").stdout)
    assert not facts["is_complete"] and len(facts["files"]) == 2


@pytest.mark.parametrize(
    "extra", [["--json", "--markdown"], ["--plot", "x.pdf"], ["-c", "7"], ["--chunks", "0"]]
)
def test_wrong_usage(args: list[str], extra: list[str]) -> None:
    assert run(*args, *extra).exit_code == 2


def test_usage_without_files_or_text(files: list[str], text: str) -> None:
    assert run("compare", files[0], "-f", text).exit_code == 2
    assert run("compare", *files).exit_code == 2


def test_time_left() -> None:
    from edge.cli import compare

    bar = compare._Timed("measuring")
    assert "left" not in bar.text(0, 10)
    bar._began = (time.monotonic() - 10, 0)
    assert bar.text(5, 10).endswith(" 50 %, 0:10 left")
