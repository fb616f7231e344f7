"""What a model's files recommend of sampling: the default of what a call leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import edge_run, run
from fakes import fake_model
from tiny import write_tiny

import edge
from edge import SamplingOptions
from edge.session.recommended import FIELDS, recommended
from edge.session.sampler import sampling_fields

EXTRA = (
    ("general.sampling.temp", 0.6),
    ("general.sampling.top_k", 20),
    ("general.sampling.penalty_repeat", 1.25),
    ("llama.key_of_tomorrow", 7),
)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({}, {}),
        ({"general.sampling.temp": 0.6000000238418579}, {"temperature": 0.6}),
        ({"general.sampling.top_p": 1, "general.sampling.min_p": 0}, {"top_p": 1.0, "min_p": 0.0}),
        (
            {"general.sampling.penalty_last_n": -1, "general.sampling.penalty_repeat": 1.1},
            {"penalty_window": -1, "repetition_penalty": 1.1},
        ),
        (
            {"temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2], "do_sample": True},
            {"temperature": 0.6, "top_k": 20},
        ),
        ({"general.sampling.xtc_probability": 0.0, "general.sampling.mirostat": 0}, {}),
        ({"general.sampling.xtc_threshold": 0.1, "general.sampling.mirostat_tau": 5.0}, {}),
    ],
)
def test_names(values: dict[str, Any], options: dict[str, Any]) -> None:
    assert recommended(values) == (SamplingOptions(**options), ())


def test_each_option_that_can_be_left_out_has_a_name_in_files() -> None:
    left_out = {option.name for option in sampling_fields() if option.can_be_unset}
    assert set(FIELDS.values()) == left_out
    assert {name for name, value in vars(SamplingOptions()).items() if value is None} == left_out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -1.0),
        ("temp", float("nan")),
        ("temp", "0.6"),
        ("temp", [0.6]),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", True),
        ("penalty_last_n", -2),
        ("xtc_probability", 0.5),
        ("mirostat", 2),
        ("sequence", "temperature;top_k\n"),
        ("of_tomorrow", [1] * 1000),
    ],
)
def test_what_cannot_be_followed_is_named_and_ignored(name: str, value: Any) -> None:
    values = {f"general.sampling.{name}": value, "general.sampling.min_p": 0.25}
    options, (note,) = recommended(values)
    assert options == SamplingOptions(min_p=0.25)
    assert note.startswith(f"general.sampling.{name} is ignored: ")
    assert "\n" not in note and len(note) < 300


def test_what_a_call_says_counts_first() -> None:
    plain = SamplingOptions().settled()
    assert (plain.temperature, plain.top_k, plain.seed) == (0.7, 40, 0)
    model, engine = fake_model()
    engine.recommended = {"general.sampling.temp": 0.5, "general.sampling.top_k": 3}
    asked = SamplingOptions(top_k=40, min_p=0.25)  # 40 is the default, said all the same
    session = model.session(sampling=asked)
    sampling = session.stream("x").request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 40, 0.25)
    assert session.defaults.sampling == asked
    assert model.sampling == SamplingOptions(temperature=0.5, top_k=3)


@pytest.mark.native
def test_load_and_info(tmp_path: Path) -> None:
    bad = (("general.sampling.top_p", 7.0),)
    path = write_tiny(tmp_path / "m.gguf", extra=EXTRA + bad)
    said = r"key_of_tomorrow'; general\.sampling\.top_p is ignored: top_p is 7\.0"
    with pytest.warns(edge.EdgeWarning, match=said) as seen, edge.load(path) as model:
        stream = model.session().stream("a b")
        assert (
            stream.request.sampling.settled()
            == SamplingOptions(temperature=0.6, top_k=20, repetition_penalty=1.25).settled()
        )
    assert len(seen) == 1 and seen[0].filename == __file__
    facts = json.loads(run("info", str(path), "--json").stdout)
    assert facts["sampling"] == {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.25}
    assert facts["runs"] and len(facts["notes"]) == 2
    text = run("info", str(path)).stdout
    assert "sampling       temperature 0.6, top_k 20, repetition_penalty 1.25\n" in text
    assert text.count("\nnote ") == 2


@pytest.mark.native
def test_a_flag_ignores_them(tmp_path: Path) -> None:
    greedy = write_tiny(tmp_path / "m.gguf", extra=(("general.sampling.temp", 0.0),))
    args = ("complete", greedy, "-p", "Hello", "-n", "8", "--quiet", "--seed", "5", "--json")
    plain, ignored, told = (
        edge_run(*args, *more) for more in ((), ("--no-model-sampling",), ("--temperature", "0.7"))
    )
    tokens = [json.loads(done.stdout)["tokens"] for done in (plain, ignored, told)]
    assert tokens[0] != tokens[1] == tokens[2]
    with edge.load(greedy, model_sampling=False) as model:
        assert model.sampling == SamplingOptions()


def test_a_folder_of_onnx(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "m"
    done = run("export", str(tiny_gguf("llama")), "-o", str(folder), "--dialect", "cpu")
    assert done.exit_code == 0, done.stderr
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "top_k": "x"}')
    with pytest.warns(edge.EdgeWarning, match="top_k is ignored"), edge.load(folder) as model:
        assert model.sampling == SamplingOptions(temperature=0.25)
