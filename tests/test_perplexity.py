"""Perplexity and KL divergence: the method against the numpy referee, and the command."""

from __future__ import annotations

import json
import math
import random
import signal
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refgraph
from fake_model import assert_one_line, run

import edge
from edge.errors import CancelledError, ContextError, InputError, ModelFileError
from edge.native.cancel import Cancel
from edge.perplexity import compare, cut, measure
from edge.windows import Windows

Tiny = Callable[..., Path]
WORDS = ("the", "and", "world", "hello", "a", "in", "on", "we", "all", "or", "her")
TEXT = " ".join(random.Random(7).choices(WORDS, k=600))
ENGLISH = Path(__file__).parent / "data" / "english.txt"
CONTEXT = 48


@pytest.fixture
def load(tiny_gguf: Tiny) -> Iterator[Callable[..., edge.Model]]:
    """load(**options of the tiny model) -> the model, closed at the end of the test."""
    models: list[edge.Model] = []

    def make(threads: int = 1, **options: Any) -> edge.Model:
        models.append(edge.load(tiny_gguf(**options), context=CONTEXT, threads=threads))
        return models[-1]

    yield make
    for model in models:
        model.close()


def referee(
    model: edge.Model, windows: Windows, dtype: Any = np.float64, **options: Any
) -> np.ndarray:
    """log-probabilities (n_scored, n_vocab). options: of `refgraph.run`."""
    weights, graph = refgraph.load_weights(model.engine.gguf), model.engine.graph
    rows = [
        refgraph.run(graph, weights, window[:-1], dtype=dtype, **options)[windows.first :]
        for window in windows.tokens
    ]
    return refgraph.log_softmax(np.concatenate(rows).astype(np.float64))


def rounded(model: edge.Model) -> dict[str, Any]:
    """Options of the referee: activations in int8 and keys and values in f16, as in the engine."""
    tensors = model.engine.gguf.tensors.values()
    return {"quantised": {t.name for t in tensors if t.type != "F32"}, "cache": np.float16}


def following(windows: Windows) -> np.ndarray:
    """The token that each scored position predicts, (n_scored,)."""
    return np.array([token for w in windows.tokens for token in w[windows.first + 1 :]])


def mean(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


# ---- windows ----


def test_windows_are_cut_without_overlap(load: Callable[..., edge.Model]) -> None:
    model = load()
    tokens = model.tokenizer.encode(TEXT)
    windows = cut(model, TEXT, context=40)
    assert len(windows.tokens) == len(tokens) // 40 and len(tokens) % 40
    assert [t for window in windows.tokens for t in window] == tokens[: len(tokens) // 40 * 40]
    assert (windows.first, windows.n_scored) == (20, len(windows.tokens) * 19)
    assert cut(model, TEXT, context=40, chunks=2).tokens == windows.tokens[:2]
    assert cut(model, TEXT, context=40, chunks=999) == windows


def test_bos_takes_the_first_place_where_the_model_wants_it(
    load: Callable[..., edge.Model],
) -> None:
    model = load()
    plain = cut(model, TEXT, context=40)
    model.tokenizer.add_bos = True
    bos, tokens = model.tokenizer.bos_id, model.tokenizer.encode(TEXT)
    windows = cut(model, TEXT, context=40).tokens
    assert tokens[:2] == [bos, plain.tokens[0][0]]
    for i, window in enumerate(windows):
        assert tuple(window) == (bos, *tokens[i * 40 + 1 : (i + 1) * 40])


def test_control_tokens_in_a_text_are_letters(load: Callable[..., edge.Model]) -> None:
    windows = cut(load(), "<|im_end|>" * 10, context=8)
    assert max(map(max, windows.tokens)) < 285


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": 7}, "context is 7, it must be a whole number from 8"),
        ({"context": 49}, "windows of 49 tokens, it was loaded for 48"),
        ({"chunks": 0}, "chunks is 0, it must be a whole number from 1"),
        ({"text": "the world and"}, r"the text has \d tokens, a window of 48 needs 48"),
        ({"text": ""}, "the text has 0 tokens"),
        ({"text": "\ud800" * 99}, "surrogate"),
    ],
)
def test_what_cannot_be_cut(
    load: Callable[..., edge.Model], options: dict[str, Any], match: str
) -> None:
    options = {"text": TEXT, "context": CONTEXT} | options
    with pytest.raises(InputError, match=match):
        cut(load(), options.pop("text"), **options)


# ---- numbers ----


@pytest.mark.parametrize("arch", ["llama", "phi3"])
@pytest.mark.parametrize(("type_name", "within"), [("F32", 3e-6), ("Q8_0", 1e-3), ("Q4_0", 1e-3)])
def test_perplexity_is_the_referee_s(
    load: Callable[..., edge.Model], arch: str, type_name: str, within: float
) -> None:
    model = load(arch=arch, type=type_name)
    windows = cut(model, TEXT, context=CONTEXT, chunks=12)
    result = measure(model, windows)
    logs = referee(model, windows, **rounded(model))
    m, error = mean(-logs[np.arange(len(logs)), following(windows)])
    assert result.perplexity == pytest.approx(math.exp(m), rel=within)
    assert result.error == pytest.approx(math.exp(m) * error, rel=3 * within)
    assert (result.n_windows, result.n_scored) == (12, 12 * 23) == (12, windows.n_scored)
    assert result.n_tokens == 12 * 47 and result.tokens_per_second > 0


def test_divergence_is_the_referee_s(load: Callable[..., edge.Model]) -> None:
    model, base = load(type="Q4_0"), load(type="F32")
    windows = cut(model, TEXT, context=CONTEXT, chunks=6)
    result = compare(model, base, windows)
    log_q, log_p = (referee(m, windows, **rounded(m)) for m in (model, base))
    each = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    kl, kl_error = mean(each)
    assert result.kl == pytest.approx(kl, rel=0.01)
    assert result.kl_error == pytest.approx(kl_error, rel=0.03)
    assert result.kl_median == pytest.approx(np.median(each), rel=0.05)
    assert result.kl_99 == pytest.approx(np.quantile(each, 0.99), rel=0.05)
    assert result.kl_max == pytest.approx(each.max(), rel=0.05)
    same = log_q.argmax(-1) == log_p.argmax(-1)
    assert result.top1 == pytest.approx(same.mean(), abs=0.03)
    assert result.top1_error == pytest.approx(
        math.sqrt(result.top1 * (1 - result.top1) / (len(same) - 1))
    )
    rows, tokens = np.arange(len(same)), following(windows)
    m, error = mean((log_p - log_q)[rows, tokens])
    assert result.ratio == pytest.approx(math.exp(m), rel=3e-3)
    assert result.ratio_error == pytest.approx(math.exp(m) * error, rel=0.1)


def test_compare_measures_what_measure_does(load: Callable[..., edge.Model]) -> None:
    model, base = load(type="Q4_0"), load(type="F32")
    windows = cut(model, TEXT, context=CONTEXT, chunks=3)
    result = compare(model, base, windows)
    for loaded, part in ((model, result.model), (base, result.base)):
        alone = measure(loaded, windows)
        assert (part.perplexity, part.error) == (alone.perplexity, alone.error)
    assert result.ratio == pytest.approx(result.model.perplexity / result.base.perplexity)


def test_a_model_is_no_distance_from_itself(load: Callable[..., edge.Model]) -> None:
    model = load(type="Q8_0")
    result = compare(model, model, cut(model, TEXT, context=CONTEXT, chunks=2))
    assert (result.kl, result.kl_max, result.top1, result.top1_error) == (0, 0, 1, 0)
    assert (result.ratio, result.ratio_error) == (1, 0)


def test_threads_change_no_bit(load: Callable[..., edge.Model]) -> None:
    results = []
    for threads in (1, 2):
        model, base = load(threads, type="Q4_0"), load(threads, type="F32")
        result = compare(model, base, cut(model, TEXT, context=CONTEXT, chunks=3))
        results.append((result.model.perplexity, result.kl, result.kl_max, result.ratio))
    assert results[0] == results[1]


def test_a_few_rows_of_logits_are_in_memory_at_a_time(
    load: Callable[..., edge.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load()
    monkeypatch.setattr("edge.windows.ROWS", 10)
    calls: list[tuple[int, str]] = []
    blocks: list[weakref.ref[Any]] = []
    real = model.engine.run

    def spy(cache: Any, tokens: Any, *, logits: str, cancel: Any) -> Any:
        assert not any(block() is not None for block in blocks)
        calls.append((len(tokens), logits))
        out = real(cache, tokens, logits=logits, cancel=cancel)
        blocks.extend([weakref.ref(out)] if out is not None else [])
        return out

    windows = cut(model, TEXT, context=CONTEXT, chunks=2)
    expected = measure(model, windows)
    monkeypatch.setattr(model.engine, "run", spy)
    result = measure(model, windows)
    assert calls == 2 * [(24, "none"), (10, "all"), (10, "all"), (3, "all")]
    assert result.perplexity == expected.perplexity


# ---- progress, cancel, errors ----


def test_progress_counts_the_tokens_of_both(load: Callable[..., edge.Model]) -> None:
    model = load()
    seen: list[tuple[int, int]] = []
    windows = cut(model, TEXT, context=CONTEXT, chunks=2)
    compare(model, model, windows, progress=lambda *at: seen.append(at))
    assert seen[0] == (0, 4 * 47) and seen[-1] == (4 * 47, 4 * 47)
    assert seen == sorted(seen)


def test_cancel_ends_it_and_leaves_the_model_usable(load: Callable[..., edge.Model]) -> None:
    model, cancel = load(), Cancel()
    windows = cut(model, TEXT, context=CONTEXT)
    with pytest.raises(CancelledError):
        measure(model, windows, progress=lambda done, _: done and cancel.set(), cancel=cancel)
    cancel.clear()
    assert measure(model, windows, cancel=cancel).n_windows == len(windows.tokens)


def test_other_vocabularies_are_refused(
    load: Callable[..., edge.Model], tiny_gguf: Tiny, tmp_path: Path
) -> None:
    model = load()
    windows = cut(model, TEXT, context=CONTEXT)
    with pytest.raises(InputError, match="differ in their vocabularies: 288 and 320 tokens"):
        compare(model, load(vocab=320), windows)
    path = tmp_path / "other.gguf"
    path.write_bytes(tiny_gguf().read_bytes().replace(b"<|unused_0|>", b"<|unused_X|>", 1))
    spelled = r"token 276 is '<\|unused_0\|>' and '<\|unused_X\|>'"
    with edge.load(path, context=CONTEXT) as other, pytest.raises(InputError, match=spelled):
        compare(model, other, windows)


def test_a_base_loaded_for_less_is_refused(
    load: Callable[..., edge.Model], tiny_gguf: Tiny
) -> None:
    model = load()
    windows = cut(model, TEXT, context=CONTEXT)
    match = "windows of 48 tokens, it was loaded for 16"
    with edge.load(tiny_gguf(), context=16) as base, pytest.raises(ContextError, match=match):
        compare(model, base, windows)


@pytest.mark.parametrize("scale", [1e30, 1e38])
def test_absurd_weights_are_an_error(tiny_gguf: Tiny, tmp_path: Path, scale: float) -> None:
    from edge.files.gguf import GGUF

    source = tiny_gguf()
    with GGUF.open(source) as gguf:
        norm = gguf.tensors["output_norm.weight"]
    data = bytearray(source.read_bytes())
    data[norm.offset : norm.offset + norm.n_bytes] = struct.pack("<f", scale) * 64
    (path := tmp_path / "loud.gguf").write_bytes(data)
    with edge.load(path, context=CONTEXT) as loud, edge.load(source, context=CONTEXT) as quiet:
        windows = cut(loud, TEXT, context=CONTEXT, chunks=1)
        for attempt in (lambda: measure(loud, windows), lambda: compare(loud, quiet, windows)):
            with pytest.raises(ModelFileError, match="damaged"):
                attempt()


# ---- the command ----


@pytest.fixture
def text(tmp_path: Path) -> str:
    (path := tmp_path / "text.txt").write_text(TEXT + "\n", encoding="utf-8")
    return str(path)


def test_command(load: Callable[..., edge.Model], tiny_gguf: Tiny, text: str) -> None:
    args = ("perplexity", str(tiny_gguf()), "-f", text, "--context", "48", "--chunks", "3")
    result = run(*args)
    model = load()
    expected = measure(model, cut(model, TEXT, context=CONTEXT, chunks=3))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"perplexity {expected.perplexity:.4f} ± {expected.error:.4f}\n"
    assert "3 windows of 48 tokens, 69 scored" in result.stderr and "/s" in result.stderr
    facts = json.loads(run(*args, "--json").stdout)
    assert facts["perplexity"] == expected.perplexity and facts["error"] == expected.error
    assert (facts["context"], facts["n_windows"], facts["n_scored"]) == (48, 3, 69)
    assert facts["tokens_per_second"] > 0 and "base" not in facts


def test_command_with_a_base(load: Callable[..., edge.Model], tiny_gguf: Tiny, text: str) -> None:
    model, base = tiny_gguf(type="Q4_0"), tiny_gguf(type="F32")
    args = ["perplexity", str(model), "-f", text, "-c", "48", "--chunks", "3", "--kl", str(base)]
    facts = json.loads(run(*args, "--json").stdout)
    loaded = load(type="Q4_0")
    windows = cut(loaded, TEXT, context=CONTEXT, chunks=3)
    expected = compare(loaded, load(type="F32"), windows)
    assert facts["perplexity"] == expected.model.perplexity
    assert facts["base"]["perplexity"] == expected.base.perplexity
    assert facts["base"]["model"] == str(base) and facts["model"] == str(model)
    for name in ("kl", "kl_error", "kl_99", "ratio", "ratio_error", "top1", "top1_error"):
        assert facts["divergence"][name] == getattr(expected, name)
    lines = run(*args).stdout.splitlines()
    assert f"{expected.kl:.6f} ± {expected.kl_error:.6f}" in lines[3]
    assert f"{100 * expected.top1:.2f} ± {100 * expected.top1_error:.2f} %" in lines[5]


def test_command_with_another_context_for_the_session(tiny_gguf: Tiny, text: str) -> None:
    """Of a model with LongRoPE it chooses the factors, of others it changes nothing."""
    model = tiny_gguf("phi3", n_rot=8, original_context=64)
    for path, differ in ((model, True), (tiny_gguf(), False)):
        args = ("perplexity", str(path), "-f", text, "-c", "48", "--chunks", "2", "--json")
        short = json.loads(run(*args).stdout)
        same, long = (json.loads(run(*args, "--session-context", n).stdout) for n in ("64", "128"))
        assert short["perplexity"] == same["perplexity"]
        assert (short["perplexity"] != long["perplexity"]) == differ
        assert short["context"] == long["context"] == 48


def test_command_with_bad_input(tiny_gguf: Tiny, text: str, tmp_path: Path) -> None:
    (not_text := tmp_path / "bytes").write_bytes(TEXT.encode() + b"\xff")
    model = str(tiny_gguf())
    for args, match in (
        ([model, "-f", str(not_text)], f"UTF-8: byte {len(TEXT)}"),
        ([model, "-f", str(tmp_path / "none")], "No such file"),
        ([model, "-f", text, "-c", "250", "--chunks", "1", "--kl", "none.gguf"], "none.gguf"),
        ([model, "-f", text, "-c", "300"], "256"),
        ([model, "-f", model], "UTF-8"),
    ):
        result = run("perplexity", *args)
        assert_one_line(result.exit_code, result.stderr_bytes, match)
        assert result.stdout == ""


@pytest.mark.parametrize("args", [[], ["-f", "x", "-c", "7"], ["-f", "x", "--chunks", "0"]])
def test_wrong_usage(args: list[str]) -> None:
    assert run("perplexity", "m.gguf", *args).exit_code == 2


def test_ctrl_c_is_130(tiny_gguf: Tiny, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge.cli import perplexity as command
    from edge.cli.terminal import Progress
    from edge.native.cancel import Cancel

    flags: list[Cancel] = []

    class Seen(Cancel):
        def __init__(self) -> None:
            super().__init__()
            flags.append(self)

    class Pressed(Progress):
        def __call__(self, done: int, total: int) -> None:
            if self._label == "measuring" and not done:
                signal.raise_signal(signal.SIGINT)
                end = time.monotonic() + 60
                while not flags[0].is_set() and time.monotonic() < end:
                    time.sleep(0.001)  # another thread sets it

    monkeypatch.setattr("edge.native.cancel.Cancel", Seen)
    monkeypatch.setattr(command, "Progress", Pressed)
    result = run("perplexity", str(tiny_gguf()), "-f", text, "-c", "16")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


# ---- a real model ----


@pytest.mark.model
def test_perplexity_of_english(smollm2: Path) -> None:
    """Int8 activations move each log-probability by some 0.08: the mean, by their spread."""
    with edge.load(smollm2, context=96) as model:
        text = ENGLISH.read_text(encoding="utf-8")
        windows = cut(model, text, context=96, chunks=3)
        result = measure(model, windows)
        logs = referee(model, windows, np.float32)
    m = -logs[np.arange(len(logs)), following(windows)].mean()
    print(f"{result}, referee {math.exp(m):.4f}")
    assert math.log(result.perplexity) == pytest.approx(m, abs=3 * 0.08 / math.sqrt(len(logs)))
